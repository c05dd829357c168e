"""Spectral measurements while a run trains, on held-out states and on the rollout just learned from.

They take nothing from any random stream and change nothing of the agent: training is bitwise the same without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.config import TrainConfig
from sphere_rl.learner.rollout import Rollout
from sphere_rl.spectrum import measure
from sphere_rl.spectrum.kernel import KERNEL_ROWS
from sphere_rl.training.agent import Agent, Policy
from sphere_rl.training.probe import STATES, probe_batch

PER_TASK = 20


class Tracker:
    """Measures an agent where ``spectrum_every`` says, with the changes of that iteration's update."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._every = config.spectrum_every or max(1, config.steps_of_task // PER_TASK)  # the last at the task's end
        self._before: dict[str, Tensor] | None = None

    def begin_iteration(self, agent: Agent, task_step: int) -> None:
        """Before the update: remember the parameters where this iteration will be measured."""
        after = task_step + self.config.steps_per_iteration
        due = self._every > 0 and after // self._every > task_step // self._every
        named = agent.actor.named_parameters()
        self._before = {name: parameter.detach().clone() for name, parameter in named} if due else None

    @property
    def due(self) -> bool:
        """Whether the iteration that has begun is measured."""
        return self._before is not None

    def measurements(self, agent: Agent, rollout: Rollout, task: str) -> Iterator[dict[str, Any]]:
        """After the update: every metric on the probe batch and on the rollout, where this iteration is measured."""
        if self._before is None:
            return
        gradients = {n: p.grad for n, p in agent.actor.named_parameters() if p.grad is not None}
        box = agent.spaces.box
        for batch, observations in (("probe", self.probe(agent, task)), ("rollout", spread(rollout))):
            metrics = measure(
                agent.actor, observations, gradients=gradients, previous=self._before, kernel_rows=KERNEL_ROWS, box=box
            )
            yield {"batch": batch, **metrics}
        self._before = None

    def probe(self, agent: Agent, task: str) -> Float[Tensor, "N D"]:
        """The probe batch of a task as the agent sees it, normalised where it normalises."""
        raw = torch.as_tensor(probe_batch(self.config, task), device=agent.device)
        return Policy(agent.actor, agent.normalizer).normalize(raw)


def spread(rollout: Rollout) -> Float[Tensor, "N D"]:
    """Evenly spaced states of a rollout, as many as the probe batch has where there are as many."""
    rows = rollout.observation.flatten(0, 1)
    chosen = torch.linspace(0, len(rows) - 1, min(STATES, len(rows)), device="cpu").long()  # the same on all devices
    return rows[chosen]
