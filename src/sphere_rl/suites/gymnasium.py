"""Any Gymnasium environment id as a task: ``--suite gym --tasks Pendulum-v1 ...``.

Observation spaces must be flat boxes; action spaces boxes or discrete. Success is unknown unless an environment puts
``success`` (or ``is_success``) into its info.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from sphere_rl.errors import ConfigError


class _SuccessName(gymnasium.Wrapper):
    """Gives robotics environments' ``is_success`` the name that the rest of the library reads."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "is_success" in info:
            info = {**info, "success": float(info["is_success"])}
        return observation, reward, terminated, truncated, info


class _SeededVectorEnv(SyncVectorEnv):
    """Environments that take their seeds when made, one each, so that every suite is seeded alike."""

    def __init__(self, makers: list[Any], seeds: list[int]) -> None:
        super().__init__(makers, autoreset_mode=AutoresetMode.SAME_STEP)
        self._seeds: list[int] | None = seeds

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seed, self._seeds = (self._seeds if seed is None else seed), None
        return super().reset(seed=seed, options=options)


class Gymnasium:
    """Registered Gymnasium environments by id."""

    name = "gym"
    summary = "any registered Gymnasium environment id, named with --tasks"
    tasks: tuple[str, ...] = ()
    all_tasks: tuple[str, ...] = ()
    same_spaces = False
    preset: Mapping[str, Any] = {
        "steps_per_task": 100_000,
        "num_steps": 256,
        "checkpoint_every": 50_000,
        "eval_every": 20_000,
    }

    def make(self, task: str, num_envs: int, seed: int, num_threads: int) -> VectorEnv:
        """Make the environments in this process (``num_threads`` is not used: Gymnasium has no threads)."""
        self._check(task)
        seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
        return _SeededVectorEnv([lambda: _SuccessName(gymnasium.make(task))] * num_envs, seeds)

    def render_env(self, task: str, seed: int) -> gymnasium.Env:
        """Make one environment that draws its frames."""
        self._check(task)
        env = gymnasium.make(task, render_mode="rgb_array")
        env.reset(seed=seed)
        return env

    def _check(self, task: str) -> None:
        try:
            spec = gymnasium.spec(task)
        except gymnasium.error.Error as error:
            raise ConfigError("tasks", task, f"a registered Gymnasium id ({error})") from None
        env = gymnasium.make(spec)
        observation, action = env.observation_space, env.action_space
        env.close()
        if not isinstance(observation, gymnasium.spaces.Box) or len(observation.shape) != 1:
            raise ConfigError("tasks", task, f"a task with a flat Box of observations, not {observation}")
        flat_box = isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1
        if not flat_box and not isinstance(action, gymnasium.spaces.Discrete):
            raise ConfigError("tasks", task, f"a task with Box or Discrete actions, not {action}")


SUITES = (Gymnasium(),)
