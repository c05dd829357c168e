"""Normalise and project: LayerNorm before every nonlinearity, weight matrices held at their initial norm.

After every step W_e ← ‖W_e(0)‖_F · W_e/‖W_e‖_F for each expert's matrix, so that the effective learning rate of the
scale-invariant layers does not decay as their norms grow. A matrix that another method replaces as a whole, so that
Adam starts anew on it, is held at its new norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import Method
from sphere_rl.methods._layers import linear_layers, networks


class NaP(Method):
    """All weight matrices of actor and critic, the gate's and the output layers' included; biases are free."""

    summary = "LayerNorm, and every weight matrix projected to its initial norm after each step"
    citation = "Lyle et al. 2024, Normalization and Effective Learning Rates in Reinforcement Learning (NeurIPS)"

    def network_options(self) -> dict[str, Any]:
        """LayerNorm in every hidden layer."""
        return {"layer_norm": True}

    def start(self, agent: ActorCritic) -> None:
        """Measure the initial norms."""
        self._norms = [matrix_norms(weight) for weight in weights(agent)]

    def after_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Measure those that were replaced."""
        for weight, norm in zip(weights(agent), self._norms, strict=True):
            if agent.is_new(weight):
                norm.copy_(matrix_norms(weight))

    @torch.no_grad()
    def after_minibatch(self, agent: ActorCritic, batch: Minibatch) -> None:
        """Project."""
        for weight, norm in zip(weights(agent), self._norms, strict=True):
            weight.mul_(norm / matrix_norms(weight).clamp(min=1e-12))  # all units recycled at once: zero stays

    def state_dict(self) -> dict[str, Any]:
        """The norms."""
        return {"norms": self._norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        for mine, theirs in zip(self._norms, state["norms"], strict=True):
            mine.copy_(theirs)


def weights(agent: ActorCritic) -> list[Tensor]:
    """Every weight tensor [E, out, in]."""
    return [layer.weight for network in networks(agent).values() for layer in linear_layers(network)]


def matrix_norms(weight: Tensor) -> Tensor:
    """‖W_e‖_F of each expert, [E, 1, 1]."""
    return weight.detach().flatten(1).norm(dim=1)[:, None, None]
