"""Inherit: the actor of a run that has learned other tasks begins a new one; critic and optimisers are fresh.

    PYTHONPATH=benchmarks sphere train --plugin inherit --suite cw10 --protocol rl --tasks peg-unplug-side \
        --steps-per-task 1e6 --method inherit --inherit.policy RUN/checkpoints/task-08-window-close.pt \
        [--inherit.log-std 0] [--inherit.parts gate] [--inherit.output-scale 0.1] --out OUT

A plugin for one question: where an agent no longer learns, is it the network that cannot, or has the policy become too
narrow to find anything? ``log_std`` 0 gives the Gaussian the width of a fresh one and leaves the network as it is; with
some ``parts`` alone the others are fresh; ``output_scale`` shrinks the mean actions and leaves features and routing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.methods import Method, MethodConfig
from sphere_rl.runs import checkpoint


@dataclass(frozen=True)
class InheritConfig(MethodConfig):
    """Whose actor, and how wide."""

    policy: str = ""
    """The checkpoint of a run with the same networks, such as checkpoints/task-08-window-close.pt."""
    parts: tuple[str, ...] = ("gate", "experts", "head")
    """Parts of the actor that are copied."""
    log_std: float | None = None
    """log σ of every action at the start; when not given that of the policy."""
    output_scale: float = 1.0
    """What the experts' last layer, and with it every mean action, is multiplied by."""


class Inherit(Method):
    """Weights are copied when the task begins, and are trained as usual from there."""

    summary = "begin with the actor of another run, its exploration as it was or wide again"
    citation = "benchmarks/inherit.py"
    Config = InheritConfig

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """Copy the actor into the first task's agent."""
        if task_index > 0:
            return
        saved = checkpoint.load(Path(self.config.policy))["agent"]["actor"]
        kept = {name: value for name, value in saved.items() if name.partition(".")[0] in self.config.parts}
        state = agent.actor.state_dict() | kept
        if self.config.log_std is not None:
            state["head.log_std"] = torch.full_like(state["head.log_std"], self.config.log_std)
        for name in ("experts.head.weight", "experts.head.bias"):
            state[name] = state[name] * self.config.output_scale
        agent.actor.load_state_dict(state)
