"""Bound loss: mean actions beyond the bounds of the action box are pulled back to them.

Adds β·mean Σ_a e_a² to the actor's loss, e_a by how many half widths of the box the mean action μ_a lies outside of
it. Out there the environment clips: whatever the mean and most of the noise, it does the same, and nothing leads back.
A side without a bound costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.learner.actor_critic import ActorCritic, Settings
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range
from sphere_rl.suites.spaces import LARGEST


@dataclass(frozen=True)
class BoundLossConfig(MethodConfig):
    """Strength of the loss."""

    coefficient: float = 0.1
    """β, the weight of the loss."""

    def __post_init__(self) -> None:
        check_range("bound_loss", self, "coefficient")


class BoundLoss(Method):
    """The actor's alone. In a sequence whose tasks have other boxes, that of the first task counts."""

    summary = "penalty on mean actions outside the action box"
    citation = "Makoviichuk & Makoviychuk 2021, rl_games"
    Config = BoundLossConfig

    def __init__(self, config: BoundLossConfig) -> None:
        super().__init__(config)
        self._metrics: dict[str, float | Tensor] = {}

    def check(self, config: Settings, discrete: bool) -> None:
        """There must be mean actions."""
        if discrete:
            raise ConfigError("method", "bound_loss", "a task with continuous actions")

    def start(self, agent: ActorCritic) -> None:
        """Know the box; one that is not known has no bounds."""
        bounds = agent.spaces.box or ((-LARGEST,), (LARGEST,))
        self._low, self._high = (torch.tensor(bound, device=agent.device) for bound in bounds)
        closed = (self._low > -LARGEST) & (self._high < LARGEST) & (self._low < self._high)
        self._unit = torch.where(closed, (self._high - self._low) / 2, 1.0)

    def outside(self, mean: Float[Tensor, "N A"]) -> Float[Tensor, "N A"]:
        """How far mean actions lie outside the box, in its half widths, or as they are where it is open or a point."""
        return (torch.relu(mean - self._high) + torch.relu(self._low - mean)) / self._unit

    def actor_penalty(self, step: ActorStep) -> Tensor:
        """β · mean Σ_a e_a²."""
        outside = self.outside(step.trace.output)
        loss = outside.square().sum(1).mean()
        self._metrics = {"bound_loss": loss.detach(), "bound_loss_share": (outside > 0).to(loss.dtype).mean()}
        return self.config.coefficient * loss

    def metrics(self) -> dict[str, float | Tensor]:
        """Of the last minibatch, Σ_a e_a² as a mean over states, and the share of mean actions that are outside."""
        return self._metrics
