"""Environments under guard: whatever they raise is said in one line, and a call that hangs can be ended.

Users bring environments. Every place that steps one takes it from `make_envs`, so that a fault of an environment is an
`EnvironmentFault` with its own words, never a traceback of this library, and no run waits for one for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper

from sphere_rl.errors import ConfigError, EnvironmentFault, TrainingError, described
from sphere_rl.extras import explained

if TYPE_CHECKING:
    from sphere_rl.suites import Suite

GRACE = 2.0
"""Times the limit after which the process itself ends: the call is in compiled code that hears no signal."""


@contextmanager
def call_limit(seconds: float) -> Iterator[None]:
    """Environments that are made in here may take so many seconds for a call, as `time_limit`; 0: any time."""
    before = LIMIT.set(seconds)
    try:
        yield
    finally:
        LIMIT.reset(before)


LIMIT: ContextVar[float] = ContextVar("LIMIT", default=0.0)


def make_envs(
    suite: Suite, task: str, num_envs: int, seed: int, num_threads: int, arguments: Mapping[str, Any]
) -> VectorEnv:
    """``suite.make`` under guard, each call within the `call_limit`.

    Raises:
        ConfigError: the suite cannot make them.
        EnvironmentFault: they hang while they are made.
    """
    with _faults("making them", LIMIT.get()):
        envs = suite.make(task, num_envs, seed, num_threads, **arguments)
    return Guarded(envs, LIMIT.get())


class Guarded(VectorWrapper):
    """Vector environments whose faults are `EnvironmentFault`s."""

    def __init__(self, env: VectorEnv, seconds: float = 0.0) -> None:
        super().__init__(env)
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        """Whatever else the environments have: ``get_state``, ``set_state``."""
        if name.startswith("_") or name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset all."""
        with _faults("reset", self._seconds):
            observation, info = super().reset(seed=seed, options=options)
            self._check("reset", observation)
        return observation, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all."""
        with _faults("step", self._seconds):
            observation, reward, terminated, truncated, info = super().step(actions)
            self._check("step", observation)
            reward = self._column("rewards", reward)
            terminated, truncated = (
                self._column(name, ends).astype(bool, copy=False)
                for name, ends in (("terminated", terminated), ("truncated", truncated))
            )
            info = self._told("info", info)
            if (done := terminated | truncated).any() and "final_obs" in info:
                self._check_last(info["final_obs"], done)
        return observation, reward, terminated, truncated, info

    def _column(self, what: str, values: Any) -> np.ndarray:
        """A number of each environment [B]."""
        found = np.asarray(values)
        if found.shape != (self.num_envs,):
            raise EnvironmentFault(f"step gave {what} of shape {found.shape}, not {(self.num_envs,)}")
        if found.dtype.kind not in "biuf":
            raise EnvironmentFault(f"step gave {what} of type {found.dtype}, not real numbers")
        return found

    def _told(self, what: str, info: Any) -> dict[str, Any]:
        """An info whose success, and that of its ``final_info``, are numbers of all environments.

        Gymnasium's own vector environments put NumPy's truth values side by side as objects, ``None`` where there are
        none.
        """
        if not isinstance(info, dict):
            raise EnvironmentFault(f"step gave {what} that is a {type(info).__name__}, not a dict")
        if np.asarray(success := info.get("success", 0.0)).dtype == object:
            success = [one if one is not None else 0.0 for one in np.ravel(success)]
            info = info | {"success": np.array(success, dtype=np.float64)}
        if np.shape(success):
            self._column(f"{what}['success']", info["success"])
        if "final_info" in info:
            info = info | {"final_info": self._told("info['final_info']", info["final_info"])}
        return info

    def _check_last(self, last: Any, done: np.ndarray) -> None:
        """The last observations of the environments whose episodes ended."""
        space, number = self.single_observation_space.shape, self.num_envs
        if not isinstance(last, np.ndarray) or len(last) != number:
            got = f"{len(last)} rows" if isinstance(last, np.ndarray) else f"a {type(last).__name__}"
            raise EnvironmentFault(f"step gave info['final_obs'] that is {got}, not an array of {number} rows")
        for index in np.flatnonzero(done):
            if np.shape(last[index]) != space:
                got = f"shape {np.shape(last[index])}"
                raise EnvironmentFault(f"step gave info['final_obs'][{index}] of {got}, not {space}")

    def close(self, **kwargs: Any) -> None:
        """Close all; what goes wrong with that spoils no result that is there already, and is only told."""
        try:
            with _faults("close", self._seconds):
                super().close(**kwargs)
        except EnvironmentFault as fault:
            print(f"sphere: {fault}", file=sys.stderr)

    def _check(self, what: str, observation: Any) -> None:
        shape, space = np.shape(observation), self.single_observation_space.shape
        if space is not None and shape != (self.num_envs, *space):
            raise EnvironmentFault(f"{what} gave observations of shape {shape}, not {(self.num_envs, *space)}")


@contextmanager
def _faults(what: str, seconds: float) -> Iterator[None]:
    """Name what an environment does wrong in here."""
    try:
        with time_limit(seconds, f"the environments: {what} took longer than {seconds:g} s (env_timeout)"):
            yield
    except (TrainingError, ConfigError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and explained(error, ""):
            raise  # an extra of this package that is not installed, which the command line names
        raise EnvironmentFault(f"the environments: {what} raised {described(error)}") from error


@contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """Raise `EnvironmentFault` after so many seconds, where Python runs in the main thread; 0: never.

    Compiled code that does not come back hears of no exception: after `GRACE` times as long the process says
    ``message`` and ends with exit code 3, as if it had been killed. Its run goes on from the last checkpoint.
    """
    if not seconds:
        yield
        return
    WATCHDOG.expect(monotonic() + GRACE * seconds, message)
    try:
        with _alarm(seconds, message):
            yield
    finally:
        WATCHDOG.expect(inf, "")


@contextmanager
def _alarm(seconds: float, message: str) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # signals reach no other
        yield
        return

    def ring(*_: object) -> NoReturn:
        raise EnvironmentFault(message)

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class Watchdog:
    """Ends the process at a moment that is moved on as long as all is well; one thread, from its first use on."""

    PERIOD = 0.25

    def __init__(self) -> None:
        self._due = (inf, "")
        self._thread: threading.Thread | None = None

    def expect(self, moment: float, message: str) -> None:
        """End the process at this moment of the monotonic clock, with these words; ``inf``: never."""
        self._due = (moment, message)
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while True:
            sleep(self.PERIOD)
            moment, message = self._due
            if monotonic() >= moment:
                print(f"sphere: {message}", file=sys.stderr, flush=True)
                os._exit(3)


WATCHDOG = Watchdog()
