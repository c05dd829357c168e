"""Task suites: named sequences of environments behind one vectorised interface.

A module of this package that defines ``SUITES`` (a tuple of `Suite` objects) is found by itself. Every suite makes
`gymnasium.vector.VectorEnv`s in **same-step autoreset** mode: the step that ends an episode returns the first
observation of the next one, and ``info["final_obs"]`` (rows marked by ``info["_final_obs"]``) is the true last
observation, so that every transition a learner sees is real. Where a task knows success, ``info["success"]`` [B]
belongs to the step just taken and ``info["final_info"]["success"]`` to the last step of the episodes that just ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sphere_rl.errors import ConfigError

if TYPE_CHECKING:
    import gymnasium


@runtime_checkable
class Suite(Protocol):
    """A benchmark: its task sequence, its training preset and its environments."""

    name: str
    summary: str
    tasks: tuple[str, ...]
    """The benchmark's sequence, trained in this order when no tasks are named."""
    all_tasks: tuple[str, ...]
    """Every task that `make` accepts; empty where any name is tried."""
    same_spaces: bool
    """Whether all tasks have the same observation and action space; otherwise they are opened to see it."""
    preset: Mapping[str, Any]
    """What this suite sets differently from the defaults of `TrainConfig`, by field name."""

    def make(self, task: str, num_envs: int, seed: int, num_threads: int) -> gymnasium.vector.VectorEnv:
        """Make ``num_envs`` copies of a task; equal seeds give equal trajectories whatever ``num_threads`` is."""
        ...

    def render_env(self, task: str, seed: int) -> gymnasium.Env:
        """Make one environment with ``render_mode="rgb_array"``."""
        ...


@cache
def suites() -> dict[str, Suite]:
    """All suites by name."""
    found: dict[str, Suite] = {}
    for module in iter_modules(__path__):
        for suite in getattr(import_module(f"{__name__}.{module.name}"), "SUITES", ()):
            found[suite.name] = suite
    return found


def make_suite(name: str) -> Suite:
    """Look a suite up by name.

    Raises:
        ConfigError: no suite has this name.
    """
    if name not in suites():
        raise ConfigError("suite", name, f"one of {', '.join(sorted(suites()))}")
    return suites()[name]


def check_task(suite: Suite, task: str) -> None:
    """Raise `ConfigError` where the suite has no such task."""
    if suite.all_tasks and task not in suite.all_tasks:
        raise ConfigError("tasks", task, f"tasks of {suite.name}: {', '.join(suite.all_tasks)}")
