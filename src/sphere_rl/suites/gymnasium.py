"""Any Gymnasium environment id as a task: ``--suite gym --tasks Pendulum-v1 my_module:My-v0 ...``.

Observations of boxes and discrete numbers become a flat box; actions are boxes or discrete, several at once, too.
Success is unknown unless an environment puts ``success`` (or ``is_success``) into its info.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from sphere_rl.errors import ConfigError
from sphere_rl.suites.spaces import check_spaces, flattened


class _Adapted(gymnasium.Wrapper):
    """What the rest of the library relies on: success by one name, and observations that a later step leaves alone.

    Robotics environments say ``is_success``. An environment that writes every observation into the same array would
    overwrite an episode's last one with the reset that follows it.
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if "is_success" in info:
            info = {**info, "success": float(info["is_success"])}
        return np.array(observation), reward, terminated, truncated, info


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
    summary = "any Gymnasium environment id, or module:id, named with --tasks"
    tasks: tuple[str, ...] = ()
    all_tasks: tuple[str, ...] = ()
    same_spaces = False
    preset: Mapping[str, Any] = {
        "steps_per_task": 100_000,
        "num_steps": 256,
        "minibatch_size": 64,
        "network.width": 64,  # of environments with a handful of numbers
        "network.depth": 2,
        "checkpoint_every": 50_000,
        "eval_every": 20_000,
    }

    def make(
        self,
        task: str,
        num_envs: int,
        seed: int,
        num_threads: int,
        max_episode_steps: int | None = None,
        **env_args: Any,
    ) -> VectorEnv:
        """Make the environments in this process (``num_threads`` is not used: Gymnasium has no threads).

        ``max_episode_steps`` takes the place of the environment's own time limit; ``env_args`` go to its constructor.
        """
        env_args["max_episode_steps"] = max_episode_steps
        self._make(task, env_args).close()  # says what is wrong
        seeds = np.random.SeedSequence(seed).generate_state(num_envs).tolist()
        return _SeededVectorEnv([lambda: _Adapted(self._make(task, env_args))] * num_envs, seeds)

    def render_env(self, task: str, seed: int, max_episode_steps: int | None = None, **env_args: Any) -> gymnasium.Env:
        """Make one environment that draws its frames."""
        env = self._make(task, env_args | {"max_episode_steps": max_episode_steps, "render_mode": "rgb_array"})
        env.reset(seed=seed)
        return env

    @staticmethod
    def _make(task: str, arguments: Mapping[str, Any]) -> gymnasium.Env:
        """One environment.

        Raises:
            ConfigError: there is none of this name, it cannot be made with these arguments, or cannot be trained on.
        """
        name = _registered(task)
        try:
            env = gymnasium.make(name, **arguments)
        except Exception as error:  # whatever its constructor does
            given = {key: value for key, value in arguments.items() if value is not None and key != "render_mode"}
            what = f"arguments with which {task} can be made" if given else "an environment that can be made"
            cause = f"{type(error).__name__}: {error}"
            field, value = ("env_args", given) if given else ("tasks", task)
            raise ConfigError(field, value, f"{what} ({cause})") from error
        try:
            flat = flattened(task, env)
            check_spaces(task, flat.observation_space, flat.action_space)
        except ConfigError:
            env.close()
            raise
        return flat


def _registered(task: str) -> str:
    """The id of ``[module:]id``; the module, which registers it, is imported as from a script in this folder.

    Raises:
        ConfigError: no such module, or no such id.
    """
    module, _, name = task.rpartition(":")
    if module:
        if os.getcwd() not in sys.path:  # the console script, unlike ``python``, does not look there
            sys.path.append(os.getcwd())
        try:
            import_module(module)
        except Exception as error:  # whatever the module does
            allowed = f"a module that can be imported before the colon ({type(error).__name__}: {error})"
            raise ConfigError("tasks", task, allowed) from error
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise ConfigError("tasks", task, f"a registered Gymnasium id ({error})") from None
    return name


SUITES = (Gymnasium(),)
