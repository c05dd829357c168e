"""SPHERE: spectral plasticity for Mixture-of-Experts policies in deep reinforcement learning.

Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphere_rl.hooks import track
    from sphere_rl.networks import make_actor
    from sphere_rl.penalty import gate_penalty, layers_penalty, per_expert_penalty, sphere_penalty, weighted_features
    from sphere_rl.policies import load_policy
    from sphere_rl.regularizer import regularize
    from sphere_rl.spectrum import effective_rank, entk, gram_effective_rank
    from sphere_rl.suites import make_suite

_HOMES = {
    "effective_rank": "spectrum",
    "entk": "spectrum",
    "gate_penalty": "penalty",
    "gram_effective_rank": "spectrum",
    "layers_penalty": "penalty",
    "load_policy": "policies",
    "make_actor": "networks",
    "make_suite": "suites",
    "per_expert_penalty": "penalty",
    "regularize": "regularizer",
    "sphere_penalty": "penalty",
    "track": "hooks",
    "weighted_features": "penalty",
}

__all__ = [
    "effective_rank",
    "entk",
    "gate_penalty",
    "gram_effective_rank",
    "layers_penalty",
    "load_policy",
    "make_actor",
    "make_suite",
    "per_expert_penalty",
    "regularize",
    "sphere_penalty",
    "track",
    "weighted_features",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
