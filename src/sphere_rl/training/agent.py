"""An agent: actor, critic, their optimisers, normalisers, its methods and its random stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from sphere_rl.config import TrainConfig
from sphere_rl.errors import ConfigError, OutsideError, meant
from sphere_rl.experts.network import Actor
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.learner.actor_critic import ActorCritic, Spaces
from sphere_rl.learner.normalizer import EPSILON, ObservationNormalizer, RewardNormalizer
from sphere_rl.methods import Method, methods


def made_methods(config: TrainConfig) -> list[Method]:
    """The configured methods, in their order."""
    return [methods()[name](getattr(config.options, name)) for name in config.method]


def options_with(chosen: Iterable[Method], config: TrainConfig) -> NetworkOptions:
    """The configured options of networks with those that the methods set.

    Raises:
        ConfigError: a method sets what is none.
    """
    changes: dict[str, Any] = {}
    for method in chosen:
        given = method.network_options()
        if unknown := given.keys() - vars(config.network).keys():
            wrong = f"{min(unknown)}{meant(min(unknown), vars(config.network))}"
            raise ConfigError("method", method.name, f"network_options of fields of NetworkOptions, not {wrong}")
        changes |= given
    return NetworkOptions(**(vars(config.network) | changes))


class Agent(ActorCritic):
    """Everything that learns: actor and critic with their methods and normalisers."""

    config: TrainConfig

    def __init__(self, config: TrainConfig, spaces: Spaces, seed: int, learns: bool = True) -> None:
        self.methods = made_methods(config)
        for method in self.methods:
            method.check(config, spaces.discrete)
        super().__init__(config, spaces, seed, learns)
        self.normalizer = (
            ObservationNormalizer(spaces.observation_dim, config.observation_clip)
            if config.normalize_observations
            else None
        )
        self.reward_normalizer = RewardNormalizer(config.gamma) if config.normalize_rewards else None
        for method in self.methods:
            method.start(self)

    @property
    def network_options(self) -> NetworkOptions:
        """The configured options with those that the methods set."""
        return options_with(self.methods, self.config)

    def make_optimizer(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Adam, or what a method puts in its place."""
        for method in self.methods:
            optimizer = method.make_optimizer(parameters, self.config)
            if optimizer is not None:
                return optimizer
        return super().make_optimizer(parameters)

    def begin_task(self, task_index: int) -> None:
        """Start the learning rate anew and let the methods do what they do at a change of task (0: none before it)."""
        self.set_learning_rate(self.config.learning_rate)
        for method in self.methods:
            method.on_task_start(self, task_index)
        for method in self.methods:
            method.after_task_start(self, task_index)

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Add what the methods measured to a row of ``train.jsonl``.

        Raises:
            OutsideError: a method's number has the name of one that is there.
        """
        for method in self.methods:
            found = {name: float(value) for name, value in method.metrics().items()}
            if taken := [name for name in found if name in row]:
                allowed = f"names that no other column of train.jsonl has, such as {method.name}_{taken[0]}"
                raise OutsideError(f"metrics of method {method.name}: {taken[0]!r} is not allowed; expected {allowed}")
            row |= found

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""
        return {
            "actor": self.actor.state_dict(),
            "critic": self.critic.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "normalizer": self.normalizer.state_dict() if self.normalizer else None,
            "reward_normalizer": self.reward_normalizer.state_dict() if self.reward_normalizer else None,
            "generator": self.generator.get_state(),
            "learning_rate": self.learning_rate,
            "methods": {method.name: method.state_dict() for method in self.methods},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, into an agent made from the same config."""
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        for parameter in (*self.actor_parameters, *self.critic_parameters):
            if any(moment.shape != parameter.shape for moment in self.moments(parameter)):
                raise ValueError(f"an optimiser's moments are not of shape {[*parameter.shape]}")
        if self.normalizer:
            self.normalizer.load_state_dict(state["normalizer"])
        if self.reward_normalizer:
            self.reward_normalizer.load_state_dict(state["reward_normalizer"])
        self.generator.set_state(state["generator"])
        self.set_learning_rate(state["learning_rate"])


class Policy(nn.Module):
    """A trained policy as a plain module: raw observations [N, D] → mean action (or logits) [N, A].

    The normaliser's statistics are buffers, so ``state_dict`` is the whole policy. `torch.export.export` and
    `torch.jit.trace` work for any batch size; TorchScript cannot read it.
    """

    def __init__(self, actor: Actor, normalizer: ObservationNormalizer | None) -> None:
        super().__init__()
        self.actor, self.clip = actor, normalizer.clip if normalizer else None
        if normalizer is not None:
            device = actor.experts.head.weight.device
            self.register_buffer("mean", torch.as_tensor(normalizer.mean.copy(), device=device))
            self.register_buffer("var", torch.as_tensor(normalizer.var.copy(), device=device))

    def normalize(self, observation: Tensor) -> Tensor:
        """What the actor sees of raw observations."""
        dtype = self.actor.experts.head.weight.dtype
        if self.clip is None:
            return observation.to(dtype)
        scaled = (observation - self.mean) / (self.var + EPSILON).sqrt()  # type: ignore[operator]
        return scaled.clip(-self.clip, self.clip).to(dtype)

    @overload
    def forward(self, observation: Tensor) -> Tensor: ...

    @overload
    def forward(self, observation: np.ndarray) -> np.ndarray: ...

    def forward(self, observation: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Mean action or logits, [N, A] of [N, D] or [A] of one state [D], of any type of number.

        A NumPy array gives a NumPy array, without gradients.

        Raises:
            ValueError: the observation has another shape.
        """
        if isinstance(observation, Tensor):
            return self._act(observation)
        array = np.array(observation, dtype=np.float64)  # own memory: Torch takes neither all strides nor all orders
        with torch.no_grad():
            return self._act(torch.from_numpy(array).to(self.actor.experts.head.weight.device)).cpu().numpy()

    def _act(self, observation: Tensor) -> Tensor:
        if not torch.jit.is_tracing():  # type: ignore[reportPrivateImportUsage] # it would warn of the comparison
            self._check(observation)
        if observation.ndim == 1:
            return self.actor(self.normalize(observation[None]))[0]
        return self.actor(self.normalize(observation))

    def _check(self, observation: Tensor) -> None:
        shape, dim = observation.shape, self.actor.observation_dim
        if len(shape) not in (1, 2) or shape[-1] != dim:
            raise ValueError(f"observation: shape {[*shape]} is not allowed; expected [{dim}] or [N, {dim}]")
