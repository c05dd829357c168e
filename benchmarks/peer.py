"""Stable-Baselines3's PPO on our vector environments, with the numbers of one of our presets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sphere_rl.config import TrainConfig

Watch = Callable[[np.ndarray, np.ndarray, dict[str, Any]], None]
"""Called with reward [B], done [B] and info after every step."""


class Adapter(VecEnv):
    """A vector environment in same-step autoreset mode as theirs: both reset ended environments in the same step."""

    def __init__(self, envs: VectorEnv, watch: Watch | None = None) -> None:
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.envs, self.watch = envs, watch

    def reset(self) -> np.ndarray:
        return self.envs.reset()[0].astype(np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        observation, reward, terminated, truncated, info = self.envs.step(self.actions)
        done = terminated | truncated
        if self.watch:
            self.watch(reward, done, info)
        infos: list[dict[str, Any]] = [{} for _ in done]
        for i in np.flatnonzero(done):
            infos[i] = {
                "terminal_observation": info["final_obs"][i].astype(np.float32),
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
            }
        return observation.astype(np.float32), reward.astype(np.float32), done, infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def make_ppo(config: TrainConfig, envs: VectorEnv, seed: int = 0, watch: Watch | None = None, **changes: Any) -> PPO:
    """Their PPO with MLPs of our sizes and our numbers; the learning rate falls linearly over what is learned.

    Two points cannot be set: actor and critic share one gradient clip, and weights start as PyTorch's defaults.
    """
    width, depth = config.network.width, config.network.depth
    start, end = config.learning_rate, config.learning_rate_end
    options: dict[str, Any] = {
        "n_steps": config.num_steps,
        "batch_size": config.minibatch_size,
        "n_epochs": config.num_epochs,
        "learning_rate": lambda left: end + left * (start - end),
        "gamma": config.gamma,
        "gae_lambda": config.gae_lambda,
        "clip_range": config.clip,
        "ent_coef": config.entropy_coefficient,
        "vf_coef": config.value_coefficient,
        "max_grad_norm": config.max_grad_norm,
        "seed": seed,
        "device": "cpu",
        "policy_kwargs": {
            "net_arch": {"pi": [width] * depth, "vf": [width] * depth},
            "activation_fn": torch.nn.ReLU,
            "ortho_init": False,
            "optimizer_kwargs": {"eps": config.adam_eps},
        },
    }
    return PPO("MlpPolicy", Adapter(envs, watch), **options | changes)
