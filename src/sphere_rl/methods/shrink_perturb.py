"""Shrink and perturb: θ ← shrink·θ + perturb·θ_fresh, θ_fresh newly initialised.

At each change of task, or softly after every minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods import Method, MethodConfig, check_range
from sphere_rl.methods._layers import fresh_networks, mix, networks, renew


@dataclass(frozen=True)
class ShrinkPerturbConfig(MethodConfig):
    """When, and how much of old and new."""

    when: Literal["task", "minibatch"] = "task"
    """At each change of task, or softly after every minibatch."""
    shrink: float = 0.5
    """Factor of the old parameters at a change of task."""
    perturb: float = 0.5
    """Factor of the fresh parameters at a change of task."""
    soft_shrink: float = 0.999999
    """Factor of the old parameters after a minibatch."""
    soft_perturb: float = 1e-6
    """Factor of the fresh parameters after a minibatch."""

    def __post_init__(self) -> None:
        check_range("shrink_perturb", self, "shrink perturb soft_shrink soft_perturb", high=1)


class ShrinkPerturb(Method):
    """All parameters of actor and critic. At a change of task Adam starts anew; the soft form leaves it alone."""

    summary = "shrink all parameters and add fresh ones, at each change of task or softly all the time"
    citation = "Ash & Adams 2020, On Warm-Starting Neural Network Training (NeurIPS)"
    Config = ShrinkPerturbConfig

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """The hard form, at every task but the first."""
        if self.config.when == "task" and task_index > 0:
            for network, fresh in zip(networks(agent).values(), fresh_networks(agent), strict=True):
                renew(agent, network, fresh, self.config.shrink, self.config.perturb)

    def after_minibatch(self, agent: ActorCritic, batch: Minibatch) -> None:
        """The soft form."""
        if self.config.when == "minibatch":
            for network, fresh in zip(networks(agent).values(), fresh_networks(agent), strict=True):
                mix(network, fresh, self.config.soft_shrink, self.config.soft_perturb)
