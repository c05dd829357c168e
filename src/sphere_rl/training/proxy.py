"""How well r_e(A) of the last expert layer stands for r_e(K): both on many small batches of checkpoints' policies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.config import TrainConfig
from sphere_rl.runs import RunFolder
from sphere_rl.seeding import derive_seed
from sphere_rl.spectrum import entk, gram_effective_rank
from sphere_rl.spectrum.kernel import KERNEL_ROWS, kernel_states
from sphere_rl.spectrum.ranks import kernel_rank
from sphere_rl.suites import make_suite
from sphere_rl.suites.spaces import action_sender
from sphere_rl.training.agent import Policy
from sphere_rl.training.diagnosis import collecting
from sphere_rl.training.policies import Chosen, read_policies
from sphere_rl.training.probe import Act, alike, probe_observations, visit
from sphere_rl.training.saved import config_of

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

BATCH = 64
"""States of a batch: enough for r_e to move freely, few enough for hundreds of exact kernels."""


def proxy_table(folder: RunFolder, chosen: Sequence[Chosen], batches: int, device: str = "cpu") -> pl.DataFrame:
    """r_e(A) of the last expert layer and r_e(K) of disjoint batches of `BATCH` states, a row a batch.

    Of the policies as they collect experience. For each checkpoint ``batches`` of random actions ("probe") and as many
    of its own, sampled, actions ("visited"), each of one task; the tasks are those of the run that have
    observations of the policy's size, or the checkpoint's own where the suite has no sequence.
    """
    config, rows = config_of(folder), []
    suite = make_suite(config.suite)
    for one in chosen:
        task = config.task_sequence[one.task_index]
        tasks = alike(config, config.task_sequence, task) if suite.tasks else (task,)
        policy = read_policies(folder, suite, [(task, one) for task in tasks], device)[one.path]
        with collecting(policy):
            for source, task, states in batches_of(policy, config, tasks, batches):
                names = {"checkpoint": one.path.stem, "source": source, "task": task}
                rows.append(names | ranks(policy, states))
    return pl.DataFrame(rows)


def ranks(policy: Policy, states: Float[ndarray, "N D"]) -> dict[str, float]:
    """r_e(A) of the last expert layer and r_e(K) on raw states, fewer of them where K had more than `KERNEL_ROWS`."""
    observation = policy.normalize(torch.as_tensor(states, device=next(policy.parameters()).device))
    with torch.no_grad():
        outputs = policy.actor(observation[:1]).shape[1]
        observation = observation[kernel_states(len(states), outputs, KERNEL_ROWS)]
        features = policy.actor.trace(observation).features[-1].weighted()
    return {"r_e_A": gram_effective_rank(features), "r_e_K": kernel_rank(entk(policy.actor, observation))}


def batches_of(
    policy: Policy, config: TrainConfig, tasks: Sequence[str], batches: int
) -> Iterator[tuple[str, str, Float[ndarray, "N D"]]]:
    """(source, task, states) of every batch; all batches of a source are disjoint."""
    for i, task in enumerate(tasks):
        mine = len(range(i, batches, len(tasks)))  # of batch 0, 1, … each task in turn gets one
        if mine:
            probe = _probe_states(config, task, mine * BATCH)
            visited = visited_states(policy, config.suite, task, mine * BATCH, config.environment)
            for source, states in (("probe", probe), ("visited", visited)):
                yield from ((source, task, batch) for batch in np.split(states, mine))


@cache
def _probe_states(config: TrainConfig, task: str, count: int) -> Float[ndarray, "N D"]:
    """States of random actions in random order: batches of them are alike."""
    states = probe_observations(make_suite(config.suite), (task,), count, arguments=config.environment)
    return np.random.default_rng(0).permutation(states)


@torch.no_grad()
def visited_states(
    policy: Policy, suite: str, task: str, count: int, arguments: Mapping[str, Any] = MappingProxyType({})
) -> Float[ndarray, "N D"]:
    """Return ``count`` raw observations of a policy that samples its actions, in random order; the same each time."""
    seed = derive_seed(0, "visited", task)
    device = next(policy.parameters()).device

    def sampling(envs: VectorEnv) -> Act:
        send, generator = action_sender(envs.single_action_space), torch.Generator(device).manual_seed(seed)

        def act(observation: ndarray) -> Any:
            output = policy(torch.as_tensor(observation, dtype=torch.float32, device=device))
            return send(policy.actor.head.sample(output, generator))

        return act

    states = visit(make_suite(suite), task, seed, count, arguments, sampling, f"task {task}")
    return states[np.random.default_rng(seed).choice(len(states), count, replace=False)]
