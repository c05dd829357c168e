from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import toy_runs
from hypothesis import given
from hypothesis import strategies as st

from sphere_rl.errors import TrainingError
from sphere_rl.experts.network import Actor, MoENetwork, make_actor
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.learner.normalizer import ObservationNormalizer
from sphere_rl.learner.rollout import Collector, EpisodeRecorder, gae
from sphere_rl.suites import make_suite

CPU = torch.device("cpu")


def test_gae_by_hand() -> None:
    column = lambda *values: torch.tensor(values)[:, None]  # noqa: E731
    reward, value = column(1.0, 2.0, 3.0, 4.0), column(0.5, 0.6, 0.7, 0.8)
    next_value = column(0.6, 9.0, 0.8, 0.9)
    terminated, done = column(False, False, False, True), column(False, True, False, True)
    advantage = gae(reward, value, next_value, terminated, done, gamma=0.9, gae_lambda=0.5)
    last = 4.0 - 0.8  # terminated: no bootstrap
    third = 3.0 + 0.9 * 0.8 - 0.7 + 0.45 * last
    second = 2.0 + 0.9 * 9.0 - 0.6  # truncated: bootstraps from its own last observation, nothing flows back into it
    first = 1.0 + 0.9 * 0.6 - 0.5 + 0.45 * second
    torch.testing.assert_close(advantage, column(first, second, third, last))


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gae_is_the_discounted_sum_of_deltas(steps: int, envs: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, steps, envs, generator=g, dtype=torch.float64).unbind()
    done = torch.rand(steps, envs, generator=g) < 0.3
    terminated = done & (torch.rand(steps, envs, generator=g) < 0.5)
    advantage = gae(reward, value, next_value, terminated, done, 0.97, 0.9)
    for b in range(envs):
        for t in range(steps):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                bootstrap = 0.0 if terminated[k, b] else 0.97 * next_value[k, b]
                expected += weight * (reward[k, b] + bootstrap - value[k, b])
                weight *= 0.97 * 0.9
                if done[k, b]:
                    break
            torch.testing.assert_close(advantage[t, b], torch.as_tensor(expected, dtype=torch.float64))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_normalizer_merges_batches_to_the_statistics_of_all(sizes: list[int], seed: int) -> None:
    data = np.random.default_rng(seed).normal(3.0, 2.0, (sum(sizes), 4))
    normalizer = ObservationNormalizer(4, clip=10.0)
    for batch in np.split(data, np.cumsum(sizes)[:-1]):
        normalizer.update(batch)
    np.testing.assert_allclose(normalizer.mean, data.mean(0))
    np.testing.assert_allclose(normalizer.var, data.var(0), atol=1e-12)
    np.testing.assert_allclose(normalizer(data.mean(0)), 0, atol=1e-6)
    assert np.abs(normalizer(data * 1e9)).max() <= 10


def networks(observation_dim: int, action_dim: int) -> tuple[Actor, MoENetwork]:
    options = NetworkOptions(width=8, depth=1, num_experts=3)
    critic = MoENetwork("dense", observation_dim, 1, options, torch.Generator().manual_seed(1))
    return make_actor("topk_moe", observation_dim, action_dim, width=8, depth=1, num_experts=3), critic


def test_normalizer_is_frozen_during_a_rollout_and_learns_after_it() -> None:
    envs, normalizer = make_suite("gym").make("Pendulum-v1", 2, 0, 1), ObservationNormalizer(3, 10.0)
    collector = Collector(envs, normalizer, CPU)
    first = collector.observation.copy()
    generator = torch.Generator().manual_seed(0)
    rollout = collector.collect(*networks(3, 1), 16, generator)
    # mean 0, variance 1 until the rollout is over: the policy saw the raw observations
    np.testing.assert_allclose(rollout.observation[0], first, rtol=1e-6)
    np.testing.assert_allclose(normalizer.mean, rollout.observation.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-6)
    assert normalizer.count == 32
    mean, var, raw = normalizer.mean, normalizer.var, collector.observation.copy()
    seen = collector.collect(*networks(3, 1), 16, generator).observation[0]
    np.testing.assert_allclose(seen, (raw - mean) / np.sqrt(var + 1e-8), rtol=1e-5)


def test_truncation_bootstraps_from_the_true_last_observation() -> None:
    envs = make_suite("gym").make("Pendulum-v1", 2, 0, 1)
    finals: list[np.ndarray] = []
    step = envs.step

    def spy(action: np.ndarray) -> Any:
        result = step(action)
        if "final_obs" in result[4]:
            finals.append(np.stack(result[4]["final_obs"]))
        return result

    envs.step = spy  # type: ignore[method-assign]
    actor, critic = networks(3, 1)
    collector = Collector(envs, None, CPU)
    rollout = collector.collect(actor, critic, 250, torch.Generator().manual_seed(0))
    assert rollout.done.sum(1).nonzero().tolist() == [[199]]  # Pendulum's time limit is 200 steps
    assert not rollout.terminated.any()
    values = critic(torch.as_tensor(finals[0])).detach().squeeze(1)
    torch.testing.assert_close(rollout.next_value[199], values)
    assert not torch.allclose(rollout.next_value[199], rollout.value[200])
    within = [t for t in range(249) if t != 199]
    torch.testing.assert_close(rollout.next_value[within], rollout.value[1:][within])
    last = critic(torch.as_tensor(collector.observation)).detach().squeeze(1)
    torch.testing.assert_close(rollout.next_value[249], last)


def test_rollout_log_probabilities_and_policy_are_those_of_its_actions() -> None:
    actor, critic = networks(3, 1)
    envs = make_suite("gym").make("Pendulum-v1", 2, 0, 1)
    rollout = Collector(envs, None, CPU).collect(actor, critic, 8, torch.Generator().manual_seed(0))
    rows = rollout.observation.flatten(0, 1)
    expected = actor.head.log_prob(actor(rows), rollout.action.flatten(0, 1))
    torch.testing.assert_close(rollout.log_prob.flatten(), expected.detach())
    assert actor.head.kl(rollout.policy.flatten(0, 1), actor(rows)).abs().max() < 1e-6


def test_actions_are_clipped_for_the_environment_only() -> None:
    envs = make_suite("gym").make("Pendulum-v1", 2, 0, 1)
    sent: list[np.ndarray] = []
    step = envs.step
    envs.step = lambda action: (sent.append(action), step(action))[1]  # type: ignore[method-assign]
    actor, critic = networks(3, 1)
    (log_std,) = actor.head.parameters()
    log_std.data += 2.0
    rollout = Collector(envs, None, CPU).collect(actor, critic, 64, torch.Generator().manual_seed(0))
    assert rollout.action.abs().max() > 2
    np.testing.assert_array_equal(np.stack(sent), rollout.action.numpy().clip(-2, 2))


def test_a_policy_that_is_not_finite_stops_the_rollout() -> None:
    actor, critic = networks(3, 1)
    actor.experts.head.bias.data[:] = float("nan")
    collector = Collector(make_suite("gym").make("Pendulum-v1", 2, 0, 1), None, CPU)
    with pytest.raises(TrainingError, match="output at rollout step 1 of 8 is not finite"):
        collector.collect(actor, critic, 8, torch.Generator())


def test_discrete_policies_that_are_not_finite_are_told_before_an_action_is_drawn() -> None:
    """Every weight is finite, so nothing else would say what is wrong."""
    actor, critic = toy_runs.networks(3, discrete=True)
    actor.experts.head.weight.data[:] = torch.finfo(torch.float32).max
    collector = Collector(make_suite("gym").make("toy_envs:FromMinusOne-v0", 2, 0, 1), None, CPU)
    with pytest.raises(TrainingError, match="output at rollout step 1 of 8 is not finite"):
        collector.collect(actor, critic, 8, torch.Generator())


def test_metaworld_rollout_holds_real_transitions_only() -> None:
    """The rewards over an episode's end are those of EnvPool stepped and reset by hand."""
    import envpool

    suite = make_suite("cw10")
    actor, critic = networks(39, 4)
    rollout = Collector(suite.make("reach", 2, 7, 1), None, CPU).collect(
        actor, critic, 510, torch.Generator().manual_seed(0)
    )
    assert rollout.done.all(1).nonzero().tolist() == [[499]]
    pool: Any = envpool.make_gymnasium(
        "MetaWorld/Reach-v3", num_envs=2, num_threads=1, seed=7, partially_observable=False
    )
    observation, _ = pool.reset()
    for t, action in enumerate(rollout.action.numpy().clip(-1, 1)):
        np.testing.assert_array_equal(rollout.observation[t].numpy(), observation.astype(np.float32))
        observation, reward, _, truncated, info = pool.step(action)
        np.testing.assert_array_equal(rollout.reward[t].numpy(), reward.astype(np.float32))
        assert (info["elapsed_step"] > 0).all()
        if truncated.any():
            final = torch.as_tensor(observation, dtype=torch.float32)
            torch.testing.assert_close(rollout.next_value[t], critic(final).detach().squeeze(1))
            observation, _, _, _, info = pool.step(action)  # EnvPool's own reset step, action and reward ignored
            assert (info["elapsed_step"] == 0).all()
    assert [episode.length for episode in rollout.episodes] == [500, 500]
    np.testing.assert_allclose(
        [episode.total_reward for episode in rollout.episodes], rollout.reward[:500].sum(0), rtol=1e-5
    )


def test_episode_recorder_tells_final_success_from_success_once() -> None:
    recorder = EpisodeRecorder(2)
    steps = [([1.0, 0.0], [False, False]), ([0.0, 0.0], [False, False]), ([0.0, 1.0], [True, True])]
    ended = []
    for success, done in steps:
        info: dict[str, Any] = {"success": np.array(success)}
        if any(done):
            info["final_info"] = dict(info)
        ended += recorder.step(np.array([1.0, 2.0]), np.array(done), info)
    first, second = (episode for _, episode in ended)
    assert (first.length, first.total_reward, first.success_final, first.success_once) == (3, 3.0, False, True)
    assert (second.length, second.total_reward, second.success_final, second.success_once) == (3, 6.0, True, True)
    assert not recorder.length.any()
    assert recorder.step(np.zeros(2), np.array([True, False]), {})[0][1].success_final is None


def test_an_environment_that_tells_success_by_itself_alone_is_judged_by_itself_alone() -> None:
    """Side by side as Gymnasium puts them: with masks, and with the info of the reset where an episode ended."""
    recorder, first, second = EpisodeRecorder(2), np.array([True, False]), np.array([False, True])
    here = {"success": np.array([1.0, 0.0]), "_success": first}
    ended = recorder.step(np.zeros(2), second, here | {"final_info": {}})  # the second tells nothing, the first does
    assert [(i, episode.success_final, episode.success_once) for i, episode in ended] == [(1, None, None)]
    ended = recorder.step(np.zeros(2), first, {"final_info": {}})  # success in mid-episode, nothing at its end
    assert [(i, episode.success_final, episode.success_once) for i, episode in ended] == [(0, False, True)]
    ended = recorder.step(np.zeros(2), first, here | {"final_info": {}})  # what the reset says is not the episode's
    assert [(i, episode.success_final, episode.success_once) for i, episode in ended] == [(0, None, None)]
    last = {"final_info": {"success": np.array([0.0, 1.0]), "_success": second}}
    ended = recorder.step(np.zeros(2), np.ones(2, bool), last)
    assert [(i, episode.success_final, episode.success_once) for i, episode in ended] == [
        (0, None, None),
        (1, True, True),
    ]
    assert not recorder.told.any()
