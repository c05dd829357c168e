"""Spectral regularisation: every layer's largest singular value stays near 1, its bias near 0.

Adds λ Σ_layers (σ₁(W)^k − 1)² + ‖b‖^{2k} to the loss, for each expert alone. σ₁ = uᵀWv with u and v from one power
iteration in each minibatch that starts from the last one's u; its gradient is u vᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sphere_rl.experts.network import Trace
from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range
from sphere_rl.methods._layers import linear_layers, networks


@dataclass(frozen=True)
class SpectralRegConfig(MethodConfig):
    """Strength and exponent of the penalty."""

    strength: float = 1e-4
    """λ."""
    power: int = 2
    """k."""

    def __post_init__(self) -> None:
        check_range("spectral_reg", self, "strength")
        check_range("spectral_reg", self, "power", low=1)


class SpectralReg(Method):
    """The penalty on all linear layers of actor and critic, the gate's included."""

    summary = "penalty that keeps each layer's largest singular value at 1"
    citation = "Lewandowski et al. 2024, Learning Continually by Spectral Regularization (ICLR 2025)"
    Config = SpectralRegConfig

    def start(self, agent: ActorCritic) -> None:
        """Begin the power iterations at W·1, which takes no random numbers."""
        self._u = {
            name: [F.normalize(layer.weight.detach().sum(2), dim=1) for layer in linear_layers(network)]
            for name, network in networks(agent).items()
        }

    def actor_penalty(self, step: ActorStep) -> Tensor:
        """The penalty on the actor."""
        return self._penalty(step.agent, "actor")

    def critic_penalty(self, agent: ActorCritic, batch: Minibatch, trace: Trace) -> Tensor:
        """The penalty on the critic."""
        return self._penalty(agent, "critic")

    def _penalty(self, agent: ActorCritic, name: str) -> Tensor:
        power, terms = self.config.power, []
        for layer, u in zip(linear_layers(networks(agent)[name]), self._u[name], strict=True):
            terms.append((largest_singular_value(layer.weight, u).pow(power) - 1).square().sum())
            terms.append(layer.bias.square().sum(1).pow(power).sum())
        return self.config.strength * torch.stack(terms).sum()

    def state_dict(self) -> dict[str, Any]:
        """The vectors of the power iterations."""
        return self._u

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        for name, vectors in self._u.items():
            for mine, theirs in zip(vectors, state[name], strict=True):
                mine.copy_(theirs)


def largest_singular_value(weight: Float[Tensor, "E out in"], u: Float[Tensor, "E out"]) -> Float[Tensor, "E"]:
    """σ₁ of each matrix after one power iteration, which moves ``u`` in place."""
    with torch.no_grad():
        v = F.normalize(torch.einsum("eoi,eo->ei", weight, u), dim=1)
        u.copy_(F.normalize(torch.einsum("eoi,ei->eo", weight, v), dim=1))
    return torch.einsum("eo,eoi,ei->e", u.clone(), weight, v)  # a clone: the graph may outlive this u
