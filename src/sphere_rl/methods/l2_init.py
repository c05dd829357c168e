"""Regenerative regularisation: the loss pulls parameters to their initial values.

Adds λ Σ_p ‖p − p₀‖²/numel(p) over all parameters of the network to its loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method, MethodConfig, check_range
from sphere_rl.methods._layers import networks


@dataclass(frozen=True)
class L2InitConfig(MethodConfig):
    """Strength of the pull."""

    strength: float = 1e-2
    """λ."""

    def __post_init__(self) -> None:
        check_range("l2_init", self, "strength")


class L2Init(Method):
    """p₀ are the parameters that training began with, for the whole task sequence."""

    summary = "L2 penalty on the distance to the initial parameters"
    citation = "Kumar et al. 2023, Maintaining Plasticity in Continual Learning via Regenerative Regularization"
    Config = L2InitConfig

    def start(self, agent: ActorCritic) -> None:
        """Keep a copy of the initial parameters."""
        self._initial = {
            name: [p.detach().clone() for p in network.parameters()] for name, network in networks(agent).items()
        }

    def parameter_gradients(self, agent: ActorCritic, network: str, gradients: Mapping[Tensor, Tensor]) -> None:
        """∂/∂p of the penalty: 2λ (p − p₀)/numel(p)."""
        for p, p0 in zip(networks(agent)[network].parameters(), self._initial[network], strict=True):
            gradients[p].add_((p - p0).mul_(2 * self.config.strength / p.numel()))

    def state_dict(self) -> dict[str, Any]:
        """p₀."""
        return self._initial

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore p₀."""
        for name, initial in self._initial.items():
            for mine, theirs in zip(initial, state[name], strict=True):
                mine.copy_(theirs)
