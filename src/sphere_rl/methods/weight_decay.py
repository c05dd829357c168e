"""Decoupled weight decay: θ ← θ − η·decay·θ beside every Adam step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sphere_rl.learner.actor_critic import Settings
from sphere_rl.methods import Method, MethodConfig, check_range


@dataclass(frozen=True)
class WeightDecayConfig(MethodConfig):
    """Strength of the decay."""

    decay: float = 1e-3
    """Share of each parameter, times the learning rate, that a step takes away."""

    def __post_init__(self) -> None:
        check_range("weight_decay", self, "decay")


class WeightDecay(Method):
    """AdamW for actor and critic."""

    summary = "AdamW: decoupled weight decay"
    citation = "Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization (ICLR)"
    Config = WeightDecayConfig

    def make_optimizer(self, parameters: Sequence[Tensor], config: Settings) -> torch.optim.Optimizer:
        """Adam's settings, with the decay."""
        decay = self.config.decay
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, eps=config.adam_eps, weight_decay=decay, fused=True
        )
