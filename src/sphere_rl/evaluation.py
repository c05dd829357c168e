"""Deterministic episodes of a policy on one task."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sphere_rl.agent import Policy
from sphere_rl.rollout import Episode, EpisodeRecorder, clip_action
from sphere_rl.suites import Suite

MAX_ENVS = 10
"""Environments of an evaluation at most: a MetaWorld environment holds 16 MB."""


@dataclass(frozen=True)
class Evaluation:
    """Means over deterministic episodes; success is ``None`` where the task does not define it.

    ``success_final`` counts success at an episode's last step, ``success_once`` at any step.
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
def evaluate(policy: Policy, suite: Suite, task: str, episodes: int, seed: int, num_threads: int = 1) -> Evaluation:
    """Run exactly ``episodes`` episodes with the mean (or most likely) action.

    Every environment gets an equal share of the episodes, fixed in advance, so that short episodes are not
    over-represented.
    """
    envs = suite.make(task, min(episodes, MAX_ENVS), seed, num_threads)
    space: Any = envs.single_action_space
    bounds = (space.low, space.high) if hasattr(space, "low") else None
    device = next(policy.parameters()).device
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    recorder, finished = EpisodeRecorder(envs.num_envs), list[Episode]()
    was_training = policy.training
    policy.eval()
    observation, _ = envs.reset()
    while quota.any():
        output = policy(torch.as_tensor(observation, dtype=torch.float32, device=device))
        action = policy.actor.head.mode(output)
        observation, reward, terminated, truncated, info = envs.step(clip_action(action, bounds))
        for i, episode in recorder.step(reward, terminated | truncated, info):
            if quota[i]:
                quota[i] -= 1
                finished.append(episode)
    policy.train(was_training)
    envs.close()
    return summarize(finished)


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
    known = [flag for flag in flags if flag is not None]
    return float(np.mean(known)) if known else None
