"""SPHERE: spectral plasticity for Mixture-of-Experts policies in deep reinforcement learning.

Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphere_rl.experts.network import make_actor
    from sphere_rl.integrations.hooks import track
    from sphere_rl.integrations.regularizer import regularize
    from sphere_rl.penalty import gate_penalty, layers_penalty, per_expert_penalty, sphere_penalty, weighted_features
    from sphere_rl.results import load_results
    from sphere_rl.spectrum import effective_rank, entk, gram_effective_rank
    from sphere_rl.suites import make_suite
    from sphere_rl.training.policies import load_policy

_HOMES = {
    "effective_rank": "spectrum",
    "entk": "spectrum",
    "gate_penalty": "penalty",
    "gram_effective_rank": "spectrum",
    "layers_penalty": "penalty",
    "load_policy": "training.policies",
    "load_results": "results",
    "make_actor": "experts.network",
    "make_suite": "suites",
    "per_expert_penalty": "penalty",
    "regularize": "integrations.regularizer",
    "sphere_penalty": "penalty",
    "track": "integrations.hooks",
    "weighted_features": "penalty",
}

_EXTRAS = {"load_policy": "train", "load_results": "report", "make_suite": "suites"}
"""Extras that a name needs; the others need none."""

__all__ = [
    "effective_rank",
    "entk",
    "gate_penalty",
    "gram_effective_rank",
    "layers_penalty",
    "load_policy",
    "load_results",
    "make_actor",
    "make_suite",
    "per_expert_penalty",
    "regularize",
    "sphere_penalty",
    "track",
    "weighted_features",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sphere-rl")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _EXTRAS:
        from sphere_rl.extras import require

        require(_EXTRAS[name], f"sphere_rl.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
