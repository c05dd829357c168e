"""FIRE: at each change of task every weight matrix is replaced by the isometry nearest to it, scaled.

W ← √(d_out/d_in)·X with X from W/‖W‖_F by Newton–Schulz steps X ← 1.5 X − 0.5 X Xᵀ X, which move all singular values
towards 1: the least change of direction that makes the spectrum flat.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method, MethodConfig, check_range
from sphere_rl.methods._layers import linear_layers, networks


@dataclass(frozen=True)
class FireConfig(MethodConfig):
    """Accuracy of the projection."""

    iterations: int = 10
    """Newton–Schulz steps."""

    def __post_init__(self) -> None:
        check_range("fire", self, "iterations", low=1)


class Fire(Method):
    """All weight matrices of actor and critic, for each expert alone, with fresh Adam state; biases stay."""

    summary = "at each change of task replace weights by the nearest scaled isometry"
    citation = "Han et al. 2026, FIRE: Frobenius-Isometry Reinitialization (ICLR), arXiv 2602.08040"
    Config = FireConfig

    @torch.no_grad()
    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Project, at every task but the first."""
        if task_index == 0:
            return
        for network in networks(agent).values():
            for layer in linear_layers(network):
                layer.weight.copy_(nearest_isometry(layer.weight, self.config.iterations))
                agent.forget(layer.weight)


def nearest_isometry(weight: Float[Tensor, "E out in"], iterations: int) -> Float[Tensor, "E out in"]:
    """√(out/in) times the Newton–Schulz iterate of each W_e/‖W_e‖_F; zero stays zero."""
    x = weight / weight.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    for _ in range(iterations):
        cubed = x @ x.mT @ x if x.shape[1] <= x.shape[2] else x @ (x.mT @ x)
        x = 1.5 * x - 0.5 * cubed
    return (weight.shape[1] / weight.shape[2]) ** 0.5 * x
