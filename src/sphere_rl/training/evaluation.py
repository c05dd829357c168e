"""Deterministic episodes of a policy on one task."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from sphere_rl.config import TrainConfig
from sphere_rl.errors import TrainingError
from sphere_rl.learner.rollout import Episode, EpisodeRecorder, check_step
from sphere_rl.seeding import derive_seed, global_streams
from sphere_rl.suites import Suite
from sphere_rl.suites.guard import make_envs
from sphere_rl.suites.spaces import action_sender, check_numbers
from sphere_rl.training.agent import Policy

MAX_ENVS = 10
"""Environments of an evaluation at most: a MetaWorld environment holds 16 MB."""
MAX_STEPS = TrainConfig.eval_max_steps
"""Steps of an episode at most, by default: no task of the suites and none that Gymnasium registers has longer ones."""


@dataclass(frozen=True)
class Evaluation:
    """Means over deterministic episodes; success is ``None`` where the environment told it in none of them.

    ``success_final`` counts success at an episode's last step, ``success_once`` at any step. Once one episode told
    success, those that told nothing had none: many environments name it only when it is there.
    """

    episodes: int
    success_final: float | None
    success_once: float | None
    mean_return: float
    std_return: float
    mean_length: float

    def row(self) -> dict[str, Any]:
        """Columns of ``eval.jsonl``."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    policy: Policy,
    suite: Suite,
    task: str,
    episodes: int,
    seed: int,
    num_threads: int = 1,
    *,
    arguments: Mapping[str, Any] = MappingProxyType({}),
    max_steps: int = MAX_STEPS,
    phase: str = "evaluation",
) -> Evaluation:
    """Run exactly ``episodes`` episodes with the mean (or most likely) action.

    Every environment gets an equal share of the episodes, fixed in advance, so that short episodes are not
    over-represented. An episode is ended, as by a time limit, after ``max_steps`` steps; as its environment cannot be
    reset alone, its other episodes are those of a new one. ``arguments`` are those of the environments.

    Raises:
        TrainingError: an environment gave, or the policy put out, what is not a finite number; names ``phase``, too.
    """
    quota = _shares(episodes)
    was_training, finished = policy.training, list[Episode]()
    policy.eval()
    try:
        for made in count():
            fresh = derive_seed(seed, "again", made) if made else seed
            with global_streams(fresh):
                envs = make_envs(suite, task, len(quota), fresh, num_threads, arguments)
                with closing(envs):
                    finished += _run(policy, envs, quota, max_steps)
            if not quota.any():
                return summarize(finished)
            _tell(task, max_steps)
            quota = quota[quota > 0]
    except TrainingError as error:
        raise type(error)(f"task {task}, {phase}, {error}") from error
    finally:
        policy.train(was_training)
    raise AssertionError


def _shares(episodes: int) -> np.ndarray:
    """Episodes of each environment."""
    number = min(episodes, MAX_ENVS)
    return np.full(number, episodes // number) + (np.arange(number) < episodes % number)


def _run(policy: Policy, envs: VectorEnv, quota: np.ndarray, max_steps: int) -> list[Episode]:
    """Episodes of every environment until its quota, which is counted down, is empty or its episode had to be ended."""
    send, device = action_sender(envs.single_action_space), next(policy.parameters()).device
    recorder, finished, going = EpisodeRecorder(envs.num_envs), list[Episode](), quota > 0
    observation = envs.reset()[0]
    check_numbers("step 0: the observation of the reset", observation)
    for step in count(1):
        output = policy(torch.as_tensor(observation, device=device))
        if not torch.isfinite(output).all():
            raise TrainingError(f"step {step}: the policy's output is not finite")
        observation, reward, terminated, truncated, info = envs.step(send(policy.actor.head.mode(output)))
        done = terminated | truncated
        try:
            check_step(observation, reward, done, info)
        except TrainingError as error:
            raise type(error)(f"step {step}: {error}") from None
        cut = ~done & (recorder.length + 1 >= max_steps)
        for i, episode in recorder.step(reward, done, info, cut):
            if going[i]:
                quota[i] -= 1
                finished.append(episode)
        going &= ~cut & (quota > 0)
        if not going.any():
            return finished
    raise AssertionError


@cache
def _tell(task: str, max_steps: int) -> None:
    """Say once what was done to episodes without an end."""
    print(f"sphere: {task}: an episode was ended after {max_steps} steps (eval_max_steps)", file=sys.stderr)


def summarize(episodes: list[Episode]) -> Evaluation:
    """Means over episodes (at least one); the standard deviation of returns is the population's."""
    returns = np.array([episode.total_reward for episode in episodes])
    return Evaluation(
        episodes=len(episodes),
        success_final=_share([episode.success_final for episode in episodes]),
        success_once=_share([episode.success_once for episode in episodes]),
        mean_return=float(returns.mean()),
        std_return=float(returns.std()),
        mean_length=float(np.mean([episode.length for episode in episodes])),
    )


def _share(flags: list[bool | None]) -> float | None:
    return None if all(flag is None for flag in flags) else float(np.mean([bool(flag) for flag in flags]))


class ToldSuccess:
    """The tasks of a run that have told success: where later episodes of theirs tell nothing, none had success.

    It follows from the rows that the run logs, so that a resumed run knows what it knew.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._tasks: set[str] = set()
        for row in rows:
            self.complete(row)

    def complete(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of a log, with a success of 0 instead of ``None`` where its task told success in an earlier one."""
        if row.get("success_final") is not None:
            self._tasks.add(row["task"])
        elif "success_final" in row and row["task"] in self._tasks:
            return row | {"success_final": 0.0, "success_once": 0.0}
        return row
