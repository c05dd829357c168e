from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sphere_rl.config import TrainConfig, override
from sphere_rl.experts.network import MoENetwork, make_actor
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.normalizer import RewardNormalizer
from sphere_rl.learner.rollout import Collector
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return_by_hand() -> None:
    normalizer, discounted = RewardNormalizer(0.5), np.zeros(1)
    reward, done = np.array([[1.0], [2.0], [4.0], [-60.0]]), np.array([[False], [True], [False], [False]])
    normalized = normalizer(reward, done, discounted)
    returns = [1, 0.5 * 1 + 2, 4, 0.5 * 4 - 60]  # the third begins an episode
    scale = np.sqrt(np.var(returns) + 1e-8)
    np.testing.assert_allclose(normalizer.var, np.var(returns))
    np.testing.assert_allclose(normalized, reward / scale)
    assert discounted == returns[-1]
    np.testing.assert_array_equal(np.sign(normalized), np.sign(reward))  # not shifted
    assert normalizer(np.array([[1e6]]), np.array([[False]]), discounted * 0)[0, 0] <= 10


@pytest.mark.parametrize("length", [7, 50])
def test_rollouts_make_one_stream(length: int) -> None:
    """Cut into rollouts the returns go on where they were: the last statistics are those of all at once."""
    rng = np.random.default_rng(length)
    reward, done = rng.normal(3, 2, (100, 4)), rng.random((100, 4)) < 0.1
    whole, parts = RewardNormalizer(0.9), RewardNormalizer(0.9)
    ends = [np.zeros(4), np.zeros(4)]
    whole(reward, done, ends[0])
    for start in range(0, 100, length):
        parts(reward[start : start + length], done[start : start + length], ends[1])
    np.testing.assert_allclose(parts.var, whole.var)
    np.testing.assert_allclose(parts.mean, whole.mean)
    np.testing.assert_array_equal(ends[0], ends[1])


class Given(gymnasium.Env):
    """Gives these rewards, one a step; an episode ends where it is told."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, reward: np.ndarray, done: np.ndarray) -> None:
        self.rows = iter(zip(reward.tolist(), done.tolist(), strict=True))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, done = next(self.rows)
        return np.zeros(1, np.float32), reward, False, done, {}


def test_the_scale_is_stable_baselines3s() -> None:
    rng = np.random.default_rng(0)
    reward, done = rng.normal(5, 40, (600, 3)), rng.random((600, 3)) < 0.02
    peer = VecNormalize(
        DummyVecEnv([lambda i=i: Given(reward[:, i], done[:, i]) for i in range(3)]), norm_obs=False, gamma=0.97
    )
    peer.reset()
    last = [peer.step(np.zeros((3, 1)))[1] for _ in range(600)][-1]
    normalizer = RewardNormalizer(0.97)
    own = normalizer(reward, done, np.zeros(3))
    # It begins with a count of 1e-4 samples of variance 1, which 1800 samples drown.
    np.testing.assert_allclose(normalizer.var, peer.ret_rms.var, rtol=1e-6)
    np.testing.assert_allclose(own[-1], last, rtol=1e-6)


def test_a_collector_normalises_what_the_learner_sees_and_reports_what_happened() -> None:
    options = NetworkOptions(width=8, depth=1, num_experts=3)
    critic = MoENetwork("dense", 3, 1, options, torch.Generator().manual_seed(1))
    actor = make_actor("topk_moe", 3, 1, width=8, depth=1, num_experts=3)
    results = []
    for normalizer in (None, RewardNormalizer(0.99)):
        envs = make_suite("gym").make("Pendulum-v1", 2, 0, 1)
        collector = Collector(envs, None, torch.device("cpu"), normalizer)
        results.append(collector.collect(actor, critic, 250, torch.Generator().manual_seed(0)))
    raw, normalized = results
    assert normalizer is not None
    assert raw.episodes == normalized.episodes
    torch.testing.assert_close(normalized.reward * np.sqrt(float(normalizer.var)), raw.reward)
    torch.testing.assert_close(normalized.value, raw.value)


def test_checkpoints_hold_the_scale(tiny: TrainConfig) -> None:
    config = override(tiny, {"normalize_rewards": True})
    first, second = (Agent(config, Spaces(3, 1, discrete=False), seed) for seed in (0, 1))
    assert first.reward_normalizer is not None
    assert second.reward_normalizer is not None
    first.reward_normalizer(np.arange(8.0).reshape(4, 2), np.zeros((4, 2), bool), np.zeros(2))
    second.load_state_dict(first.state_dict())
    assert second.reward_normalizer.state_dict() == first.reward_normalizer.state_dict()
    assert second.reward_normalizer.count == 8
