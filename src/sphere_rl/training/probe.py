"""The probe batch: held-out states, the same for every method and seed.

For every task, too, in suites with a sequence of their own, as far as observations are of one size; elsewhere the
states are of the tasks that a policy learns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.seeding import derive_seed, global_streams
from sphere_rl.suites import Suite, make_suite
from sphere_rl.suites.guard import make_envs
from sphere_rl.suites.spaces import check_numbers

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from sphere_rl.config import TrainConfig

STATES = 256
ENVS, STEPS = 2, 100
"""Environments that states are visited in, and the steps taken in each at least."""

Arguments = tuple[tuple[str, Any], ...]
Act = Callable[[ndarray], Any]


def probe_batch(config: TrainConfig, task: str) -> Float[ndarray, "N D"]:
    """Raw states that the policy a run has on ``task`` is measured on: while it trains, by reports and diagnoses.

    They are of the tasks that `probe_tasks` says, an equal share of each.
    """
    return _batch(config.suite, probe_tasks(config, task), tuple(config.environment.items()))


def probe_tasks(config: TrainConfig, task: str) -> tuple[str, ...]:
    """The tasks whose states the policy a run has on ``task`` is measured on; all have observations of its size.

    Those of the suite's own sequence, whatever tasks the run trains. Where there are none (``gym`` has no sequence,
    H1's has 51 numbers and ``reach`` 57), those that the policy learns: all of a crl run's, this one in rl.
    """
    return alike(config, make_suite(config.suite).tasks, task) or alike(config, learned_tasks(config, task), task)


def same_probe(one: TrainConfig, other: TrainConfig, task: str) -> bool:
    """Whether two runs of a suite measure their policies on ``task`` on the same states, or do not measure at all."""
    if one.spectrum_every < 0 or task in make_suite(one.suite).tasks:  # no environment is opened to see it
        return True
    alone, together = ({*learned_tasks(config, task)} for config in (one, other))
    return alone == together or bool(alike(one, make_suite(one.suite).tasks, task))


def learned_tasks(config: TrainConfig, task: str) -> tuple[str, ...]:
    """The tasks that the policy a run has on ``task`` learns."""
    return config.task_sequence if config.protocol == "crl" else (task,)


def alike(config: TrainConfig, tasks: Sequence[str], task: str) -> tuple[str, ...]:
    """Those of the tasks, each once, that have observations of as many numbers as ``task``."""
    once, arguments = tuple(dict.fromkeys(tasks)), tuple(config.environment.items())
    if not once or make_suite(config.suite).same_spaces:
        return once
    size = _observation_size(config.suite, task, arguments)
    return tuple(one for one in once if _observation_size(config.suite, one, arguments) == size)


@cache
def _batch(suite: str, tasks: tuple[str, ...], arguments: Arguments) -> Float[ndarray, "N D"]:
    return probe_observations(make_suite(suite), tasks, arguments=dict(arguments))


@cache
def _observation_size(suite: str, task: str, arguments: Arguments) -> int:
    with global_streams(0):
        envs = make_envs(make_suite(suite), task, 1, 0, 1, dict(arguments))
        envs.close()
    shape = envs.single_observation_space.shape
    assert shape is not None
    return int(np.prod(shape))


def probe_observations(
    suite: Suite,
    tasks: Sequence[str],
    count: int = STATES,
    seed: int = 0,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Float[ndarray, "N D"]:
    """Return ``count`` raw observations under uniformly random actions, an equal share of each task, in task order.

    They depend on the arguments alone; the tasks must have observations of one size.
    """
    shares = np.full(len(tasks), count // len(tasks))
    shares[: count % len(tasks)] += 1
    batches = [
        _visited(suite, task, int(share), seed, arguments) for task, share in zip(tasks, shares, strict=True) if share
    ]
    return np.concatenate(batches)


def _visited(suite: Suite, task: str, count: int, seed: int, arguments: Mapping[str, Any]) -> Float[ndarray, "n D"]:
    """States drawn without replacement from random episodes of a task."""
    seed = derive_seed(seed, "probe", task)

    def at_random(envs: VectorEnv) -> Act:
        envs.action_space.seed(seed)
        return lambda _: envs.action_space.sample()

    states = visit(suite, task, seed, -(-count // ENVS), arguments, at_random, f"task {task} under random actions")
    return states[np.sort(np.random.default_rng(seed).choice(len(states), count, replace=False))]


def visit(
    suite: Suite,
    task: str,
    seed: int,
    steps: int,
    arguments: Mapping[str, Any],
    acting: Callable[[VectorEnv], Act],
    where: str,
) -> Float[ndarray, "n D"]:
    """Every raw observation of `ENVS` environments in this many steps, `STEPS` at least; the same each time.

    ``acting``: told the environments, how their next actions follow from observations [ENVS, D]. ``where``: what the
    error names before an observation that is not a number.
    """
    with global_streams(seed):
        envs = make_envs(suite, task, ENVS, seed, 1, arguments)
        act = acting(envs)
        seen = [np.array(envs.reset()[0])]
        for _ in range(max(STEPS, steps)):
            seen.append(np.array(envs.step(act(seen[-1]))[0]))
            check_numbers(f"{where}: the observation", seen[-1])
        envs.close()
    return np.concatenate([observation.reshape(ENVS, -1) for observation in seen]).astype(np.float32)
