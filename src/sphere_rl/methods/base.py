"""What every method is: hooks at fixed places of training, each of which does nothing until it is overridden."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.experts.network import Actor, Trace
from sphere_rl.learner.actor_critic import ActorCritic, Settings
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.learner.policy_step import FeaturePenalty, Improved
from sphere_rl.learner.rollout import Rollout


@dataclass(frozen=True)
class MethodConfig:
    """Options of a method; subclasses add fields, each with a sentence, and check them in ``__post_init__``."""

    @classmethod
    def updated(cls, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """Options that an earlier version saved, by today's fields: what is not there keeps the meaning it had."""
        return saved


def check_range(
    method: str, config: MethodConfig, names: str, low: float | int = 0, high: float | int = math.inf
) -> None:
    """Raise `ConfigError` unless each of these fields (space-separated) is a finite number from low to high."""
    allowed = f"a finite number, {low} or more" if high == math.inf else f"a number from {low} to {high}"
    for name in names.split():
        value = getattr(config, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise ConfigError(f"{method}.{name}", value, allowed)


@dataclass(frozen=True)
class ActorStep:
    """One minibatch's actor forward pass, as penalties and gradient rules see it.

    ``trace`` and ``loss`` (the PPO loss, a scalar) belong to the same graph; ``parameters`` are all of the actor's.
    """

    agent: ActorCritic
    batch: Minibatch
    trace: Trace
    loss: Tensor
    parameters: Sequence[Tensor]


class Method:
    """A mitigation of plasticity loss. Subclass it in a module of this package; override only what the rule needs."""

    name: ClassVar[str]
    """The module's name; set on discovery."""
    summary: ClassVar[str]
    """One line for ``sphere list``."""
    citation: ClassVar[str]
    """Whose rule it is."""
    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, config: Settings, discrete: bool) -> None:
        """Raise `ConfigError` where the method cannot apply to this actor and critic."""

    def network_options(self) -> dict[str, Any]:
        """Fields of `NetworkOptions` that the method sets, for actor and critic."""
        return {}

    def make_optimizer(self, parameters: Sequence[Tensor], config: Settings) -> torch.optim.Optimizer | None:
        """Make the optimiser of these parameters that replaces Adam, or ``None``."""
        return None

    def start(self, agent: ActorCritic) -> None:
        """The agent has just been made: networks and optimisers are fresh. Also called before a state is loaded."""

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """A task of the sequence begins (0 for the first)."""

    def observe(self, network: str, trace: Trace) -> None:
        """Look at a minibatch's forward pass of the ``actor`` or the ``critic``, its graph included.

        The critic's may be shown on another thread.
        """

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        """Compute a scalar to add to the actor's loss."""
        return None

    def feature_penalty(self, actor: Actor, observation: Tensor) -> FeaturePenalty | None:
        """Say what `actor_penalty` and `actor_gradients` would do, where `is_direct` and one of them does something.

        It holds for some minibatches, of which this one is the first.
        """
        return None

    def penalised(self, improved: Improved) -> None:
        """The steps with what `feature_penalty` said have been taken."""

    def critic_penalty(self, agent: ActorCritic, batch: Minibatch, trace: Trace) -> Tensor | None:
        """Compute a scalar to add to the critic's loss; perhaps while the actor's hooks run."""
        return None

    def actor_gradients(self, step: ActorStep, gradients: list[Tensor]) -> list[Tensor]:
        """Change the gradients of the actor's loss before they are clipped; the graph of ``step`` is still alive."""
        return gradients

    def after_minibatch(self, agent: ActorCritic, batch: Minibatch) -> None:
        """Both optimisers have taken their step."""

    def after_iteration(self, agent: ActorCritic, rollout: Rollout) -> None:
        """All epochs on this rollout are done."""

    def metrics(self) -> dict[str, float | Tensor]:
        """Numbers for ``train.jsonl`` about the last iteration; their names carry the method's."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next minibatch depends on: nested dicts and lists of tensors, numbers and strings."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    @property
    def acts_between_minibatches(self) -> bool:
        """Whether `after_minibatch` is overridden."""
        return getattr(self.after_minibatch, "__func__", None) is not Method.after_minibatch

    @property
    def uses_actor_gradients(self) -> bool:
        """Whether `actor_gradients` is overridden and active: the graph is kept for it."""
        return type(self).actor_gradients is not Method.actor_gradients

    @property
    def is_direct(self) -> bool:
        """Whether the actor's step can go without autograd: its hooks do nothing, or what `feature_penalty` says."""
        own = type(self).actor_penalty is not Method.actor_penalty or self.uses_actor_gradients
        return not (own or self.observes)

    @property
    def describes_penalty(self) -> bool:
        """Whether `feature_penalty` is overridden; where two methods do, both go through autograd."""
        return type(self).feature_penalty is not Method.feature_penalty

    @property
    def observes(self) -> bool:
        """Whether `observe` is overridden: both networks go through autograd to be seen."""
        return type(self).observe is not Method.observe

    @property
    def uses_critic_penalty(self) -> bool:
        """Whether `critic_penalty` is overridden: the critic's step goes through autograd for it."""
        return type(self).critic_penalty is not Method.critic_penalty
