"""Collecting experience: rollouts [T, B, …] and their advantages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from sphere_rl.errors import EnvironmentFault, TrainingError
from sphere_rl.experts.network import Actor, MoENetwork
from sphere_rl.learner.normalizer import ObservationNormalizer, RewardNormalizer
from sphere_rl.suites.spaces import action_sender, check_numbers


@dataclass(frozen=True)
class Rollout:
    """T steps of B environments. Observations are as the policy saw them (normalised, where that is on).

    Attributes:
        observation: o_t [T, B, D].
        action: sampled, before clipping to the action box: [T, B, A], or [T, B] indices of discrete actions.
        policy: parameters of the distribution that each action was drawn from.
        log_prob: log π(a_t | o_t).
        reward: r_t, as the learner is to see it (normalised, where that is on).
        value: V(o_t).
        next_value: V of the true next observation, also where the episode ended there.
        terminated: the episode ended by its own rule; nothing is bootstrapped.
        done: the episode ended, by its own rule or by the time limit.
        episodes: what the episodes that ended in this rollout amounted to.
    """

    observation: Float[Tensor, "T B D"]
    action: Shaped[Tensor, "T B *A"]
    policy: Float[Tensor, "T B P"]
    log_prob: Float[Tensor, "T B"]
    reward: Float[Tensor, "T B"]
    value: Float[Tensor, "T B"]
    next_value: Float[Tensor, "T B"]
    terminated: Bool[Tensor, "T B"]
    done: Bool[Tensor, "T B"]
    episodes: list[Episode]


@dataclass(frozen=True)
class Episode:
    """One finished episode; success is ``None`` where the environment told none of it in all its steps."""

    length: int
    total_reward: float
    success_final: bool | None
    success_once: bool | None


@dataclass
class EpisodeRecorder:
    """Adds up rewards and success of B running episodes and hands over those that end.

    An episode's success is known as soon as one of its steps told it: a step that does not has none.
    """

    num_envs: int
    length: np.ndarray = field(init=False)
    total_reward: np.ndarray = field(init=False)
    success_once: np.ndarray = field(init=False)
    told: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.length, self.total_reward = np.zeros(self.num_envs, np.int64), np.zeros(self.num_envs)
        self.success_once, self.told = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is known of the running episodes, each [B]."""
        return {
            "length": self.length,
            "total_reward": self.total_reward,
            "success_once": self.success_once,
            "told": self.told,
        }

    def step(
        self, reward: np.ndarray, done: np.ndarray, info: dict[str, Any], cut: np.ndarray | None = None
    ) -> list[tuple[int, Episode]]:
        """Take one step of all environments; return (environment, episode) for every episode that ended with it.

        Episodes of the environments in ``cut`` [B] end here, too, though the environments would go on.
        """
        self.length += 1
        self.total_reward += reward
        success, told = step_success(done, info)
        self.success_once |= success
        self.told |= told
        ended = []
        done = done if cut is None else done | cut
        for i in np.flatnonzero(done):
            flags = (bool(success[i]), bool(self.success_once[i])) if self.told[i] else (None, None)
            ended.append((int(i), Episode(int(self.length[i]), float(self.total_reward[i]), *flags)))
        for array in self.arrays().values():
            array[done] = 0
        return ended


def step_success(done: np.ndarray, info: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Success of the step just taken [B], and which environments told it [B].

    From ``info`` or, where the episode ended, from ``final_info``. Environments that Gymnasium puts side by side tell
    one by one, as the masks ``_success`` say; their ``info`` is after an episode's end that of the reset.
    """
    success, told = _told(info, len(done))
    last, told_last = _told(info.get("final_info", {}), len(done))
    if "success" not in info.get("final_info", {}) and "_success" not in info:
        last, told_last = success, told
    return np.where(done, last, success), np.where(done, told_last, told)


def _told(info: dict[str, Any], num_envs: int) -> tuple[np.ndarray, np.ndarray]:
    """Success [B] as one ``info`` has it, False where it has none, and where it has it [B]."""
    told = np.broadcast_to(np.asarray(info.get("_success", "success" in info), bool), num_envs)
    return told & (np.asarray(info.get("success", 0.0)) > 0), told


class Collector:
    """Steps one vector environment with a policy, from one rollout to the next."""

    def __init__(
        self,
        envs: VectorEnv,
        normalizer: ObservationNormalizer | None,
        device: torch.device,
        reward_normalizer: RewardNormalizer | None = None,
    ) -> None:
        self.envs, self.normalizer, self.device = envs, normalizer, device
        self.reward_normalizer, self.discounted = reward_normalizer, np.zeros(envs.num_envs)
        self.recorder = EpisodeRecorder(envs.num_envs)
        self.observation = np.array(envs.reset()[0])
        check_numbers("the observation of the reset", self.observation)
        self.send = action_sender(envs.single_action_space)

    def state_dict(self) -> dict[str, Any] | None:
        """State of the environments and their running episodes; ``None`` where the environments cannot give theirs."""
        get_state = getattr(self.envs, "get_state", None)
        if get_state is None:
            return None
        arrays = {"observation": self.observation} | self._sums()
        return {"envs": get_state()} | {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}

    def _sums(self) -> dict[str, np.ndarray]:
        """What has been added up of the running episodes, each [B]."""
        discounted = {} if self.reward_normalizer is None else {"discounted": self.discounted}
        return self.recorder.arrays() | discounted

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, into environments made with the same arguments."""
        self.envs.set_state(state["envs"])  # type: ignore[attr-defined]
        self.observation = state["observation"].numpy().copy()
        state = {"told": state["success_once"]} | state  # checkpoints of version 0.2.0 have no ``told``
        for key, array in self._sums().items():
            array[:] = state[key].numpy()

    @torch.no_grad()
    def collect(self, actor: Actor, critic: MoENetwork, num_steps: int, generator: torch.Generator) -> Rollout:
        """Take T steps; the normaliser learns from their observations only after the last."""
        steps, raw, finals, episodes = [], [], [], []
        check_spread(actor)
        for t in range(num_steps):
            number = f"{t + 1} of {num_steps}"
            observation, output, action = self._act(actor, generator, number)
            raw.append(self.observation)
            self.observation, reward, terminated, truncated, info = self._step(action, number)
            done = terminated | truncated
            if done.any():
                ended = np.flatnonzero(done)
                finals.append((t, ended, self._tensor(np.stack(info["final_obs"][ended]))))
            episodes += [episode for _, episode in self.recorder.step(reward, done, info)]
            steps.append((observation, action, output, reward, terminated, done))
        observations, actions, outputs, rewards, terminations, dones = zip(*steps, strict=True)
        observation, action, output = (torch.stack(x) for x in (observations, actions, outputs))
        value = self._values(critic, observation)
        next_value = self._next_values(critic, value, finals)
        if self.normalizer is not None:
            self.normalizer.update(np.concatenate(raw).astype(np.float64))
        reward, done = np.stack(rewards), np.stack(dones)
        if self.reward_normalizer is not None:
            reward = self.reward_normalizer(reward, done, self.discounted)
        rows = output.flatten(0, 1)
        return Rollout(
            observation=observation,
            action=action,
            policy=actor.head.parameters_of(rows).unflatten(0, value.shape),
            log_prob=actor.head.log_prob(rows, action.flatten(0, 1)).unflatten(0, value.shape),
            reward=torch.as_tensor(reward, dtype=torch.float32, device=self.device),
            value=value,
            next_value=next_value,
            terminated=torch.as_tensor(np.stack(terminations), device=self.device),
            done=torch.as_tensor(done, device=self.device),
            episodes=episodes,
        )

    def _act(self, actor: Actor, generator: torch.Generator, number: str) -> tuple[Tensor, Tensor, Tensor]:
        """What the policy sees of the present state, its output, and the action sampled from it."""
        observation = self._tensor(self.observation)
        with torch.inference_mode():
            output = actor(observation)
            if not torch.isfinite(output).all():  # before an action is drawn: of no probabilities there is none
                raise TrainingError(f"the policy's output at rollout step {number} is not finite")
            return observation, output, actor.head.sample(output, generator)

    def _step(self, action: Tensor, number: str) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step the environments; arrays are copied, for the next step may write into the same ones."""
        observation, reward, terminated, truncated, info = self.envs.step(self.send(action))
        try:
            check_step(observation, reward, terminated | truncated, info)
        except TrainingError as error:
            raise type(error)(f"rollout step {number}: {error}") from None
        return np.array(observation), np.array(reward), np.array(terminated), np.array(truncated), info

    def _tensor(self, observation: np.ndarray) -> Float[Tensor, "B D"]:
        if self.normalizer is not None:
            observation = self.normalizer(observation)
        return torch.as_tensor(observation, dtype=torch.float32, device=self.device)

    @staticmethod
    def _values(critic: MoENetwork, observation: Float[Tensor, "T B D"]) -> Float[Tensor, "T B"]:
        # In slices: all T·B rows at once would hold hundreds of megabytes of hidden features.
        return torch.cat([critic(rows) for rows in observation.flatten(0, 1).split(4096)]).view(observation.shape[:2])

    def _next_values(
        self, critic: MoENetwork, value: Float[Tensor, "T B"], finals: list[tuple[int, np.ndarray, Tensor]]
    ) -> Float[Tensor, "T B"]:
        """Of the states that the steps led to; ``finals``: step, environments and last states of ended episodes."""
        following = torch.cat((value[1:], critic(self._tensor(self.observation)).T))
        for t, ended, final in finals:
            following[t, torch.from_numpy(ended)] = critic(final).squeeze(-1)
        return following


LARGEST_LOG_STD = 40.0
"""The probability ratio and KL have σ² and 1/σ² in them, which must be float32 numbers: e⁸⁸ is the largest."""


def check_spread(actor: Actor) -> None:
    """Raise `TrainingError` where the standard deviation of a Gaussian policy has left the range of numbers."""
    log_std = getattr(actor.head, "log_std", None)
    if log_std is None or bool((log_std.abs() <= LARGEST_LOG_STD).all()):
        return
    index = int((~(log_std.abs() <= LARGEST_LOG_STD)).nonzero()[0])
    value = float(log_std[index])
    verb = "vanished" if value < 0 else "exploded"
    raise TrainingError(f"the policy's standard deviation has {verb}: log σ = {value:.4g} of action {index}")


def check_step(observation: np.ndarray, reward: np.ndarray, done: np.ndarray, info: dict[str, Any]) -> None:
    """Raise `TrainingError` where a step of B environments gave something that is not a number, or no last state."""
    check_numbers("the reward", reward)
    if done.any():
        if "final_obs" not in info:
            raise EnvironmentFault("an episode ended without info['final_obs']: same-step autoreset has it")
        ended = np.flatnonzero(done)
        check_numbers("the last observation of an episode", np.stack(info["final_obs"][ended]), ended)
    check_numbers("the observation", observation)


def gae(
    reward: Float[Tensor, "T B"],
    value: Float[Tensor, "T B"],
    next_value: Float[Tensor, "T B"],
    terminated: Bool[Tensor, "T B"],
    done: Bool[Tensor, "T B"],
    gamma: float,
    gae_lambda: float,
) -> Float[Tensor, "T B"]:
    """Generalised advantage estimates (Schulman et al. 2016).

    δ_t = r_t + γ (1 − terminated_t) V(o'_t) − V(o_t),  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}: a time limit is
    bootstrapped from the true last observation o'_t, and no advantage flows over an episode's end.
    """
    delta = reward + gamma * next_value * ~terminated - value
    decay = gamma * gae_lambda * (~done).to(delta.dtype)
    advantage = torch.zeros_like(delta)
    following = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        following = delta[t] + decay[t] * following
        advantage[t] = following
    return advantage
