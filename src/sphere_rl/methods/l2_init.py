"""Regenerative regularisation: the loss pulls parameters to their initial values.

Adds λ Σ_p ‖p − p₀‖²/numel(p) over all parameters of the network to its loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphere_rl.experts.network import Trace
from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range
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

    def actor_penalty(self, step: ActorStep) -> Tensor:
        """The pull on the actor."""
        return self._penalty(step.agent, "actor")

    def critic_penalty(self, agent: ActorCritic, batch: Minibatch, trace: Trace) -> Tensor:
        """The pull on the critic."""
        return self._penalty(agent, "critic")

    def _penalty(self, agent: ActorCritic, name: str) -> Tensor:
        pairs = zip(networks(agent)[name].parameters(), self._initial[name], strict=True)
        return self.config.strength * torch.stack([(p - p0).square().mean() for p, p0 in pairs]).sum()

    def state_dict(self) -> dict[str, Any]:
        """p₀."""
        return self._initial

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore p₀."""
        for name, initial in self._initial.items():
            for mine, theirs in zip(initial, state[name], strict=True):
                mine.copy_(theirs)
