"""Networks, their optimisers and random stream: what learns, whoever trains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.spaces.utils import flatdim
from gymnasium.vector import VectorEnv
from torch import Tensor

from sphere_rl.experts.network import Actor, MoENetwork
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.kernels.gradients import GradientStore
from sphere_rl.learner.optimizer import ExpertAdam
from sphere_rl.seeding import derive_seed
from sphere_rl.suites.spaces import LARGEST, branches_of


@dataclass(frozen=True)
class Spaces:
    """What an agent must know of its environment.

    ``action_dim`` is the number of actions where they are discrete. ``branches``: of several that are taken at once,
    how many values each has; ``action_dim`` is their sum. ``low`` and ``high``: the bounds to which actions of a box
    are clipped, float32's largest number where there is none; empty without a box. Spaces that differ in these alone
    are equal: an agent can go from one to the other.
    """

    observation_dim: int
    action_dim: int
    discrete: bool
    branches: tuple[int, ...] = ()
    low: tuple[float, ...] = field(default=(), compare=False)
    high: tuple[float, ...] = field(default=(), compare=False)

    @property
    def box(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The bounds of a box of actions, lower and upper ones; None without a box."""
        return (self.low, self.high) if self.low else None

    def __str__(self) -> str:
        """For messages."""
        if self.branches:
            values = ", ".join(map(str, self.branches))
            return f"{self.observation_dim} observations and {len(self.branches)} discrete actions of {values} values"
        return f"{self.observation_dim} observations and {self.action_dim} {'discrete ' * self.discrete}actions"

    @classmethod
    def of(cls, envs: VectorEnv) -> Spaces:
        """The spaces of one of these environments."""
        action = envs.single_action_space
        observation_dim, branches = flatdim(envs.single_observation_space), branches_of(action)
        if branches:
            return cls(observation_dim, sum(branches), discrete=True, branches=branches)
        if isinstance(action, Discrete):
            return cls(observation_dim, flatdim(action), discrete=True)
        box: Any = action
        low, high = (tuple(map(float, np.clip(bound, -LARGEST, LARGEST))) for bound in (box.low, box.high))
        return cls(observation_dim, flatdim(action), discrete=False, low=low, high=high)


@runtime_checkable
class Settings(Protocol):
    """What learners and methods read of a run's configuration, `sphere_rl.config.TrainConfig`."""

    @property
    def actor(self) -> str:
        """One of `sphere_rl.experts.network.kinds`, those of plugins included."""
        ...

    @property
    def critic(self) -> str:
        """Likewise."""
        ...

    @property
    def method(self) -> Sequence[str]:
        """Names of methods."""
        ...

    @property
    def network(self) -> NetworkOptions:
        """Shape of both networks."""
        ...

    @property
    def learning_rate(self) -> float:
        """Adam's."""
        ...

    @property
    def adam_eps(self) -> float:
        """Adam's ε."""
        ...

    @property
    def iterations_per_task(self) -> int:
        """Rollouts of a task."""
        ...

    @property
    def device(self) -> str:
        """Where networks are."""
        ...


def make_networks(
    config: Settings, spaces: Spaces, options: NetworkOptions, generator: torch.Generator
) -> tuple[Actor, MoENetwork]:
    """Actor and critic of these kinds and sizes, with new weights."""
    sizes = spaces.observation_dim, spaces.action_dim
    actor = Actor(config.actor, *sizes, options, generator, spaces.discrete, spaces.branches)
    return actor, MoENetwork(config.critic, spaces.observation_dim, 1, options, generator)


class ActorCritic:
    """Actor and critic. Equal arguments give equal weights; no global random state is used.

    ``learns`` false: optimisers are made only when asked for; PyTorch loads its compiler for them.
    """

    def __init__(self, config: Settings, spaces: Spaces, seed: int, learns: bool = True) -> None:
        self.config, self.spaces, self.device = config, spaces, torch.device(config.device)
        init = torch.Generator().manual_seed(derive_seed(seed, "init"))
        self.generator = torch.Generator(self.device).manual_seed(derive_seed(seed, "training"))
        self.actor, self.critic = self.fresh_networks(init)
        self.learning_rate = config.learning_rate
        self.actor_parameters: list[Tensor] = list(self.actor.parameters())
        self.critic_parameters: list[Tensor] = list(self.critic.parameters())
        if learns:  # now: an optimiser may keep the initial weights
            _ = self.actor_optimizer, self.critic_optimizer
        self.actor_gradients, self.critic_gradients = GradientStore(), GradientStore()

    @cached_property
    def actor_optimizer(self) -> torch.optim.Optimizer:
        """Of the actor's parameters."""
        return self.make_optimizer(self.actor_parameters)

    @cached_property
    def critic_optimizer(self) -> torch.optim.Optimizer:
        """Of the critic's parameters."""
        return self.make_optimizer(self.critic_parameters)

    def fresh_networks(self, generator: torch.Generator) -> tuple[Actor, MoENetwork]:
        """Build an actor and a critic with new weights, on this agent's device."""
        with self.device:
            return make_networks(self.config, self.spaces, self.network_options, generator)

    @property
    def network_options(self) -> NetworkOptions:
        """The shape of both networks."""
        return self.config.network

    def make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Make the optimiser of these parameters."""
        return ExpertAdam(parameters, lr=self.config.learning_rate, eps=self.config.adam_eps)

    def moments(self, parameter: Tensor) -> list[Tensor]:
        """Adam's moment estimates of a parameter, to be changed in place; empty before its first step."""
        state = self._optimizer_state(parameter)
        return [state[key] for key in ("exp_avg", "exp_avg_sq") if key in state]

    def forget(self, parameter: Tensor) -> None:
        """Let its optimiser start anew on a parameter that was replaced: moments and step count are zero again."""
        state = self._optimizer_state(parameter)
        for key, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif type(value) in (int, float):
                state[key] = type(value)()

    def is_new(self, parameter: Tensor) -> bool:
        """Whether its optimiser knows nothing of a parameter: before its first step, or since `forget`."""
        return not any(moment.any() for moment in self.moments(parameter))

    def _optimizer_state(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            if parameter in optimizer.state:
                return optimizer.state[parameter]
        return {}

    def set_learning_rate(self, rate: float) -> None:
        """Set the step size of both optimisers."""
        self.learning_rate = rate
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = rate
