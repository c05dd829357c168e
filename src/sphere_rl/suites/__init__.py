"""Task suites: named sequences of environments behind one vectorised interface.

A module of this package that defines ``SUITES`` (a tuple of `Suite` objects) is found by itself. Every suite makes
`gymnasium.vector.VectorEnv`s in **same-step autoreset** mode: the step that ends an episode returns the first
observation of the next one, and ``info["final_obs"]`` (rows marked by ``info["_final_obs"]``) is the true last
observation, so that every transition a learner sees is real. Where a task knows success, ``info["success"]`` [B]
belongs to the step just taken and ``info["final_info"]["success"]`` to the last step of the episodes that just ended;
masks ``_success`` [B] beside them say of which environments, where not of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sphere_rl import plugins
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

    @property
    def make(self) -> Callable[..., gymnasium.vector.VectorEnv]:
        """``make(task, num_envs, seed, num_threads, **env_args)``: ``num_envs`` copies of a task.

        Equal seeds give equal trajectories whatever ``num_threads`` is. Parameters after these four, which a suite
        need not have, are the arguments that ``--env-args`` may set.
        """
        ...

    @property
    def render_env(self) -> Callable[..., gymnasium.Env]:
        """``render_env(task, seed, **env_args)``: one environment with ``render_mode="rgb_array"``."""
        ...


PARTS = (*Suite.__annotations__, "make", "render_env")
"""What every suite has."""


@cache
def own_suites() -> dict[str, Suite]:
    """Those of this package."""
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    return {suite.name: suite for module in modules for suite in getattr(module, "SUITES", ())}


def suites() -> dict[str, Suite]:
    """All suites by name, those of plugins included.

    Raises:
        ConfigError: a plugin's is no `Suite`, or has the name of another.
    """
    found = dict(own_suites())
    others = [(name, made if isinstance(made, tuple) else (made,)) for name, made in plugins.offered("suites")]
    others += [(name, getattr(module, "SUITES", ())) for name, module in plugins.loaded().items()]
    for name, several in others:
        if not isinstance(several, list | tuple):
            raise ConfigError("suite", name, f"SUITES that are a tuple, not {type(several).__name__}")
        for suite in several:
            check_whole(name, suite)
            if found.setdefault(suite.name, suite) is not suite:
                raise ConfigError("suite", suite.name, "another name: there is one of that name")
    return found


def check_whole(place: str, suite: object) -> None:
    """Raise `ConfigError` where what a plugin offers as a suite is none."""
    if isinstance(suite, type):
        raise ConfigError("suite", place, f"a sphere_rl.suites.Suite, not the class {suite.__name__}: make one of it")
    if missing := [name for name in PARTS if not hasattr(suite, name)]:
        kind, lacks = type(suite).__name__, ", ".join(missing)
        raise ConfigError("suite", place, f"a sphere_rl.suites.Suite, not {kind}, which has no {lacks}")


def make_suite(name: str) -> Suite:
    """Look a suite up by name.

    Raises:
        ConfigError: no suite has this name.
    """
    if name not in suites():
        raise ConfigError("suite", name, f"one of {', '.join(sorted(suites()))}")
    return suites()[name]


def check_arguments(suite: Suite, arguments: Mapping[str, object]) -> None:
    """Raise `ConfigError` where the suite's environments take no such argument."""
    parameters = list(signature(suite.make).parameters.values())
    own = ("task", "num_envs", "seed", "num_threads")
    named = [p.name for p in parameters[len(own) :] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name, value in arguments.items():
        field = name if name == "max_episode_steps" else f"env_args.{name}"
        if name in own:
            raise ConfigError(field, value, f"another argument than {', '.join(own)}, which are the suite's own")
        if not open_ended and name not in named:
            raise ConfigError(field, value, f"an argument that suite {suite.name} takes: {', '.join(named) or 'none'}")


def check_task(suite: Suite, task: str) -> None:
    """Raise `ConfigError` where the suite has no such task."""
    if suite.all_tasks and task not in suite.all_tasks:
        raise ConfigError("tasks", task, f"tasks of {suite.name}: {', '.join(suite.all_tasks)}")
