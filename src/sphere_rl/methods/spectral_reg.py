"""Spectral regularisation: every layer's largest singular value stays near 1, its bias near 0.

Adds λ Σ_layers (σ₁(W)^k − 1)² + ‖b‖^{2k} to the loss, for each expert alone. σ₁ = uᵀWv with u and v from one power
iteration in each minibatch that starts from the last one's u; its gradient is u vᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method, MethodConfig, check_range
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

    def parameter_gradients(self, agent: ActorCritic, network: str, gradients: Mapping[Tensor, Tensor]) -> None:
        """∂/∂W = 2kλ (σ₁^k − 1) σ₁^{k−1} u vᵀ for each expert, and ∂/∂b = 2kλ ‖b‖^{2(k−1)} b."""
        k, twice = self.config.power, 2 * self.config.power * self.config.strength
        for layer, u in zip(linear_layers(networks(agent)[network]), self._u[network], strict=True):
            sigma, v = power_iteration(layer.weight, u)
            slope = twice * (sigma.pow(k) - 1) * sigma.pow(k - 1)
            gradients[layer.weight].baddbmm_((slope[:, None] * u)[:, :, None], v[:, None])
            gradients[layer.bias].add_(twice * layer.bias.square().sum(1, keepdim=True).pow(k - 1) * layer.bias)

    def state_dict(self) -> dict[str, Any]:
        """The vectors of the power iterations."""
        return self._u

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        for name, vectors in self._u.items():
            for mine, theirs in zip(vectors, state[name], strict=True):
                mine.copy_(theirs)


@torch.no_grad()
def power_iteration(
    weight: Float[Tensor, "E out in"], u: Float[Tensor, "E out"]
) -> tuple[Float[Tensor, "E"], Float[Tensor, "E in"]]:
    """σ₁ = uᵀWv of each matrix after one power iteration, which moves ``u`` in place, and v."""
    v = F.normalize(torch.einsum("eoi,eo->ei", weight, u), dim=1)
    image = torch.einsum("eoi,ei->eo", weight, v)
    u.copy_(F.normalize(image, dim=1))
    return (u * image).sum(1), v
