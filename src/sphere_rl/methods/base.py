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
from sphere_rl.learner.feature_penalty import FeaturePenalty
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.learner.policy_step import StepResults
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
    ``policy_loss``: the loss without the entropy's part, a number.
    """

    agent: ActorCritic
    batch: Minibatch
    trace: Trace
    loss: Tensor
    parameters: Sequence[Tensor]
    policy_loss: Tensor


class Method:
    """A mitigation of plasticity loss. Subclass it in a module of this package or a plugin; override only
    what the rule needs.

    `feature_penalty`, and `penalised` for the numbers that come of it, are for speed alone: they say a second time what
    `actor_penalty` and `actor_gradients` compute, in a form that a step without autograd can take.
    """

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

    def after_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """All methods have had their `on_task_start`: what they replaced (`ActorCritic.is_new`) is in place."""

    def observe(self, network: str, trace: Trace) -> None:
        """Look at a minibatch's forward pass of the ``actor`` or the ``critic``, its graph included.

        The critic's may be shown on another thread.
        """

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        """Compute a scalar to add to the actor's loss."""
        return None

    def feature_penalty(self, actor: Actor, observation: Tensor) -> FeaturePenalty | None:
        """Describe all that `actor_penalty` and `actor_gradients` do, so that steps can go without calling them.

        ``None`` where that says too little: they are called, and the step goes through autograd. The description holds
        for some minibatches, of which ``observation`` [N, D] is the first.
        """
        return None

    def penalised(self, results: StepResults) -> None:
        """Look at the steps that have been taken with what `feature_penalty` said."""

    def critic_penalty(self, agent: ActorCritic, batch: Minibatch, trace: Trace) -> Tensor | None:
        """Compute a scalar to add to the critic's loss; perhaps while the actor's hooks run."""
        return None

    def parameter_gradients(self, agent: ActorCritic, network: str, gradients: Mapping[Tensor, Tensor]) -> None:
        """Add the gradient of a penalty on the parameters alone of the ``actor`` or the ``critic``, in place.

        ``gradients`` has that of the network's loss for each of its parameters; autograd is off. Such a penalty may be
        an `actor_penalty` as well: this is the same step for less, without a graph as large as the network. The
        critic's may be asked for while the actor's hooks run.
        """

    def actor_gradients(self, step: ActorStep, gradients: list[Tensor]) -> list[Tensor]:
        """Change the gradients of the actor's loss before they are clipped; the graph of ``step`` is still alive."""
        return gradients

    def after_minibatch(self, agent: ActorCritic, batch: Minibatch) -> None:
        """Both optimisers have taken their step; where ``target_kl`` ends the update the critic's alone."""

    def after_iteration(self, agent: ActorCritic, rollout: Rollout) -> None:
        """All epochs on this rollout are done."""

    def metrics(self) -> dict[str, float | Tensor]:
        """Numbers for ``train.jsonl`` about the last iteration; their names carry the method's and are no others'."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next minibatch depends on: nested dicts and lists of tensors, numbers and strings.

        NumPy's numbers and arrays are none of these: a checkpoint refuses them.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    @property
    def describes_its_step(self) -> bool:
        """Whether `feature_penalty` is overridden, and by no class further up than what it stands for.

        That is `actor_penalty`, `actor_gradients`, and whatever its class has that is no hook: they may call it.
        """
        order = type(self).__mro__
        owner = next(number for number, one in enumerate(order) if "feature_penalty" in vars(one))
        others = {*dir(Method), "name", "summary", "citation"} - {"actor_penalty", "actor_gradients"}
        stands_for = set(dir(order[owner])) - others
        return order[owner] is not Method and not any(stands_for & vars(one).keys() for one in order[:owner])

    def overrides(self, *hooks: str) -> bool:
        """Whether one of these hooks is more than the one here, which does nothing and need not be called.

        What a step needs follows from this alone; no method declares it.
        """
        return any(getattr(getattr(self, hook), "__func__", None) is not getattr(Method, hook) for hook in hooks)
