"""Parseval regularisation: hidden weights stay near a multiple of an orthogonal matrix.

Adds λ Σ_W ‖W Wᵀ − s I‖_F² over hidden layers to the loss, W with its smaller side as rows, for each expert alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method, MethodConfig, check_range
from sphere_rl.methods._layers import hidden_layers, networks


@dataclass(frozen=True)
class ParsevalConfig(MethodConfig):
    """Strength and target of the penalty."""

    strength: float = 1e-3
    """λ."""
    scale: float = 2.0
    """s: the squared length that rows are held at."""

    def __post_init__(self) -> None:
        check_range("parseval", self, "strength scale")


class Parseval(Method):
    """The penalty on hidden layers of actor and critic, the gate's included."""

    summary = "penalty that keeps hidden weights orthogonal"
    citation = "Chung et al. 2024, Parseval Regularization for Continual Reinforcement Learning (NeurIPS)"
    Config = ParsevalConfig

    def parameter_gradients(self, agent: ActorCritic, network: str, gradients: Mapping[Tensor, Tensor]) -> None:
        """∂/∂W of λ Σ_W of the network."""
        for layer in hidden_layers(networks(agent)[network]):
            add_gradient(layer.weight, self.config.scale, self.config.strength, gradients[layer.weight])


def add_gradient(weight: Float[Tensor, "E out in"], scale: float, strength: float, to: Tensor) -> None:
    """Add the gradient of λ Σ_e ‖W_e W_eᵀ − s I‖_F², 4λ (W_e W_eᵀ − s I) W_e; with W_eᵀ W_e where out > in."""
    wide = weight.shape[1] <= weight.shape[2]
    gram = weight @ weight.mT if wide else weight.mT @ weight
    gram.diagonal(dim1=1, dim2=2).sub_(scale)
    to.baddbmm_(*((gram, weight) if wide else (weight, gram)), alpha=4 * strength)
