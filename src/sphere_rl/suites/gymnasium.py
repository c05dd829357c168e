"""Any Gymnasium environment id as a task: ``--suite gym --tasks Pendulum-v1 my_module:My-v0 ...``.

Observations of boxes and discrete numbers become a flat box; actions are boxes or discrete, several at once, too.
Success is unknown until an environment puts ``success`` (or ``is_success``) into its info.
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

from sphere_rl.errors import ConfigError, EnvironmentFault, described
from sphere_rl.suites.picture import offscreen
from sphere_rl.suites.spaces import check_spaces, flattened


class _Adapted(gymnasium.Wrapper):
    """What the rest of the library relies on, of environment ``index``; all else is an `EnvironmentFault`.

    Observations have the shape of their space and are left alone by later steps: an environment that writes every one
    into the same array would overwrite an episode's last one with the reset that follows it. Rewards and ends are
    single numbers. Success goes by one name; robotics environments say ``is_success``. Nothing else of the info is
    passed on: what is of another length or kind from step to step cannot be put side by side for several environments.
    """

    def __init__(self, env: gymnasium.Env, index: int) -> None:
        super().__init__(env)
        self._index, self._step = index, 0

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self._step = 0
        try:
            observation, info = self.env.reset(**options)
        except (Exception, SystemExit) as error:  # whatever it does
            raise self._fault(f"reset raised {described(error)}") from error
        return self._observation(observation), self._info(info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._step += 1
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except (Exception, SystemExit) as error:
            raise self._fault(f"step raised {described(error)}") from error
        ends = self._number("terminated", terminated), self._number("truncated", truncated)
        found = self._number("the reward", reward), bool(ends[0]), bool(ends[1])
        return self._observation(observation), *found, self._info(info)

    def _observation(self, observation: Any) -> np.ndarray:
        try:
            array = np.array(observation)
        except ValueError:  # nested lists of unequal lengths
            raise self._fault("the observation is no array") from None
        if array.shape != self.observation_space.shape:
            raise self._fault(f"the observation has shape {array.shape}, not {self.observation_space.shape}")
        return self._numbers("the observation", array)

    def _number(self, what: str, value: Any) -> Any:
        """A single number as it is; an array of one as its element."""
        if isinstance(value, bool | int | float):
            return value
        array = np.asarray(value)
        if array.size != 1:
            raise self._fault(f"{what} has shape {array.shape}, not ()")
        return self._numbers(what, array).reshape(())[()]

    def _numbers(self, what: str, array: np.ndarray) -> np.ndarray:
        if array.dtype.kind not in "biuf":
            raise self._fault(f"{what} is of type {array.dtype}, not a real number")
        return array

    def _info(self, info: Any) -> dict[str, Any]:
        if not isinstance(info, dict):
            raise self._fault(f"info is a {type(info).__name__}, not a dict")
        name = "is_success" if "is_success" in info else "success"
        if name not in info:
            return {}
        success = self._number(name, info[name])
        if success != success:
            raise self._fault(f"{name} is {success}, not a number")
        return {"success": float(success)}

    def _fault(self, what: str) -> EnvironmentFault:
        return EnvironmentFault(f"environment {self._index}, step {self._step} of its episode: {what}")


class _Drawn(_Adapted):
    """One that draws, with or without a display."""

    def render(self) -> Any:
        with offscreen():
            return super().render()


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
        makers = [lambda i=i: _Adapted(self._make(task, env_args), i) for i in range(num_envs)]
        return _SeededVectorEnv(makers, seeds)

    def render_env(self, task: str, seed: int, max_episode_steps: int | None = None, **env_args: Any) -> gymnasium.Env:
        """Make one environment that draws its frames."""
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # of pygame: into memory, without a look for a display
        env = self._make(task, env_args | {"max_episode_steps": max_episode_steps, "render_mode": "rgb_array"})
        env = _Drawn(env, 0)
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
        except EnvironmentFault:  # it hangs
            raise
        except (Exception, SystemExit) as error:  # whatever its constructor does
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
        except (Exception, SystemExit) as error:  # whatever the module does
            allowed = f"a module that can be imported before the colon ({type(error).__name__}: {error})"
            raise ConfigError("tasks", task, allowed) from error
    try:
        gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise ConfigError("tasks", task, f"a registered Gymnasium id ({error})") from None
    return name


SUITES = (Gymnasium(),)
