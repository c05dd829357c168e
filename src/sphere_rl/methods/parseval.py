"""Parseval regularisation: hidden weights stay near a multiple of an orthogonal matrix.

Adds λ Σ_W ‖W Wᵀ − s I‖_F² over hidden layers to the loss, W with its smaller side as rows, for each expert alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.experts.network import MoENetwork, Trace
from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range
from sphere_rl.methods._layers import hidden_layers


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

    def actor_penalty(self, step: ActorStep) -> Tensor:
        """λ Σ_W of the actor."""
        return self._penalty(step.agent.actor)

    def critic_penalty(self, agent: ActorCritic, batch: Minibatch, trace: Trace) -> Tensor:
        """λ Σ_W of the critic."""
        return self._penalty(agent.critic)

    def _penalty(self, network: MoENetwork) -> Tensor:
        terms = [orthogonality(layer.weight, self.config.scale) for layer in hidden_layers(network)]
        return self.config.strength * torch.stack(terms).sum()


def orthogonality(weight: Float[Tensor, "E out in"], scale: float) -> Float[Tensor, ""]:
    """Σ_e ‖W_e W_eᵀ − s I‖_F², with W_eᵀ W_e where out > in."""
    gram = weight @ weight.mT if weight.shape[1] <= weight.shape[2] else weight.mT @ weight
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - scale * identity).square().sum()
