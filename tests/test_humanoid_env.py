"""The batched H1 environments: seeds, threads, autoreset, episodes, state, pictures."""

import io

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_rl.errors import ConfigError
from sphere_rl.suites import make_suite
from sphere_rl.suites.humanoid.env import HumanoidEnv, HumanoidVectorEnv
from sphere_rl.suites.humanoid.tasks import SEQUENCE, TASKS, standing_pose

BENT = [0, 0, -0.4, 0.8, -0.4]


def trajectory(env: HumanoidVectorEnv, steps: int, actions: np.ndarray) -> list[np.ndarray]:
    """Everything that `steps` steps give, in a row."""
    rows: list[np.ndarray] = [env.reset()[0]]
    for t in range(steps):
        observation, reward, terminated, truncated, _ = env.step(actions[t, : env.num_envs])
        rows += [observation, reward, terminated, truncated]
    env.close()
    return rows


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (80, 6, 19))


def test_trajectories_depend_on_the_seed_alone(actions: np.ndarray) -> None:
    """Not on threads nor on the size of the batch; robots fall and restart on the way."""
    reference = trajectory(HumanoidVectorEnv("slide", 6, seed=3, num_threads=1), 60, actions)
    assert sum(flags.sum() for flags in reference[3::4]) > 0
    for threads, num_envs in ((3, 6), (1, 2)):
        other = trajectory(HumanoidVectorEnv("slide", num_envs, seed=3, num_threads=threads), 60, actions)
        for mine, theirs in zip(reference, other, strict=True):
            np.testing.assert_array_equal(mine[:num_envs], theirs)
    different = trajectory(HumanoidVectorEnv("slide", 6, seed=4, num_threads=1), 1, actions)
    assert (different[0][:, :26] != reference[0][:, :26]).all()


def test_seed_at_reset() -> None:
    env = HumanoidVectorEnv("walk", 3, seed=7)
    first, again, restarted = env.reset()[0], env.reset()[0], env.reset(seed=7)[0]
    np.testing.assert_array_equal(first, restarted)
    assert (first[:, :26] != again[:, :26]).any(axis=1).all()
    np.testing.assert_array_equal(env.reset(seed=[7, 8, 7])[0][[0, 2]], np.stack([first[0]] * 2))
    with pytest.raises(ConfigError, match="seed: -1 is not allowed"):
        env.reset(seed=-1)
    with pytest.raises(ValueError, match="seed: 2 seeds for 3 envs"):
        env.reset(seed=[1, 2])
    env.close()


@given(seed=st.integers(0, 2**63))
@settings(max_examples=20, deadline=None)
def test_reset_noise(seed: int) -> None:
    """Uniform on every coordinate of qpos, none on qvel."""
    env = HumanoidVectorEnv("stand", 4, seed=seed)
    observation, info = env.reset()
    noise = observation[:, :26] - np.array([0, 0, 0.98, 1, 0, 0, 0, *BENT, *BENT, *[0] * 9])
    assert np.abs(noise).max() <= 0.01
    assert noise.std() == pytest.approx(0.02 / 12**0.5, rel=0.35)
    assert len(np.unique(noise)) == noise.size
    np.testing.assert_array_equal(observation[:, 26:], 0)
    assert info == {}
    env.close()


def test_interface() -> None:
    suite = make_suite("h1")
    assert suite.tasks == SEQUENCE == ("stand", "walk", "pole", "slide", "run")
    env = suite.make("stand", 3, 0, 1)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.metadata["render_fps"] == 50
    assert env.single_observation_space.shape == (51,)
    assert env.single_action_space.shape == (19,)
    observation, _ = env.reset()
    assert env.observation_space.contains(observation)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert reward.dtype == np.float64
    assert terminated.dtype == truncated.dtype == bool
    shapes = {name: value.shape for name, value in info.items()}
    assert set(shapes.values()) == {(3,)}
    assert {"standing", "upright", "control", "still", "success", "episode_return", "episode_length"} <= set(shapes)
    env.close()


def test_an_ended_episode_shows_its_last_observation_and_the_next_ones_first() -> None:
    """One robot lies on its back, the other stands: only the first is reset."""
    env = HumanoidVectorEnv("walk", 2, seed=0)
    qpos = np.tile(standing_pose(), (2, 1))
    qpos[0, 2:7] = 0.15, 0.5**0.5, 0.0, -(0.5**0.5), 0.0
    qpos[0, 7:] = 0.0
    env.place(qpos, np.zeros((2, 25)))
    observation, _, terminated, truncated, info = env.step(np.zeros((2, 19)))
    assert terminated.tolist() == info["_final_obs"].tolist() == info["_final_info"].tolist() == [True, False]
    assert not truncated.any()
    assert info["final_obs"][0, 2] < 0.2 < 0.9 < observation[0, 2]
    np.testing.assert_array_equal(observation[0, 26:], 0)
    assert np.abs(observation[0, :26] - standing_pose()).max() <= 0.01
    assert observation[1, 26:].any()
    np.testing.assert_array_equal(info["final_obs"][1], observation[1])
    assert info["episode_length"].tolist() == info["final_info"]["episode_length"].tolist() == [1, 1]
    info = env.step(np.zeros((2, 19)))[-1]
    assert info["episode_length"].tolist() == [1, 2]
    assert "final_obs" not in info
    env.close()


def test_the_thousandth_step_truncates_with_the_true_last_observation() -> None:
    """crawl never terminates; a second env that takes the same steps from its own state knows what comes last."""
    env, twin = HumanoidVectorEnv("crawl", 1, seed=1), HumanoidVectorEnv("crawl", 1, seed=1)
    observation, _ = env.reset()
    total, zero = 0.0, np.zeros((1, 19))
    for _ in range(999):
        observation, reward, terminated, truncated, _ = env.step(zero)
        total += reward[0]
        assert [*terminated, *truncated] == [False, False]
    twin.place(observation[:, :26], observation[:, 26:])
    _, reward, terminated, truncated, info = env.step(zero)
    assert truncated[0]
    assert not terminated[0]
    assert info["episode_return"][0] == pytest.approx(total + reward[0])
    np.testing.assert_array_equal(info["final_obs"], twin.step(zero)[0])
    assert info["final_info"]["episode_length"].tolist() == [1000]
    assert env.step(zero)[-1]["episode_length"].tolist() == [1]
    env.close()
    twin.close()


def test_success_is_the_return_reaching_the_bar() -> None:
    """Standing still pays nearly 1 a step: 799.5 before it becomes a success, 790 does not."""
    env = HumanoidVectorEnv("stand", 2)
    env.place(np.tile(standing_pose(), (2, 1)), np.zeros((2, 25)))
    env.set_state(env.get_state() | {"returns": torch.tensor([799.5, 790.0], dtype=torch.float64)})
    _, reward, _, _, info = env.step(np.zeros((2, 19)))
    assert (reward > 0.5).all()
    assert info["success"].tolist() == [1.0, 0.0]
    assert info["episode_return"] == pytest.approx(reward + np.array([799.5, 790.0]))
    env.close()


def test_a_step_leaves_no_trace_in_the_next() -> None:
    """The same state and action give the same step, whatever was simulated before."""
    env = HumanoidVectorEnv("run", 2, seed=2)
    observation, _ = env.reset()
    action = np.full((2, 19), 0.3)
    first = env.step(action)
    for _ in range(20):
        env.step(-action)
    env.place(observation[:, :26], observation[:, 26:])
    again = env.step(action)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    env.close()


@pytest.mark.parametrize("task", ["pole", "reach", "maze"])
def test_saved_state_continues_bitwise(task: str, actions: np.ndarray) -> None:
    """Through a checkpoint file and into new environments of another seed."""
    env = HumanoidVectorEnv(task, 4, seed=0)
    env.reset()
    for t in range(40):
        env.step(actions[t, :4])
    buffer = io.BytesIO()
    torch.save(env.get_state(), buffer)
    buffer.seek(0)
    other = HumanoidVectorEnv(task, 4, seed=9, num_threads=2)
    other.reset()
    other.set_state(torch.load(buffer, weights_only=True))
    for t in range(40, 80):
        mine, theirs = env.step(actions[t, :4]), other.step(actions[t, :4])
        for a, b in zip(mine[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(a, b)
        for name in mine[4].keys() - {"final_info"}:
            np.testing.assert_array_equal(mine[4][name], theirs[4][name])
    env.close()
    other.close()


@pytest.mark.parametrize("task", TASKS)
def test_random_steps_stay_finite(task: str) -> None:
    env = HumanoidVectorEnv(task, 1, seed=0)
    generator = np.random.default_rng(0)
    observation, _ = env.reset()
    assert observation.shape == env.observation_space.shape
    ended = 0
    for _ in range(1000):
        observation, reward, terminated, _, info = env.step(generator.uniform(-1, 1, (1, 19)))
        assert np.isfinite(observation).all()
        assert np.isfinite(reward).all()
        assert all(np.isfinite(value).all() for name, value in info.items() if name != "final_info")
        if task != "reach" and task != "maze":
            assert (reward >= 0).all()
            assert (reward <= 1).all()
        ended += terminated.sum()
    assert ended > 0 or task in ("crawl", "reach")
    env.close()


def test_actions_map_linearly_onto_joint_ranges_and_are_clipped() -> None:
    """Where a servo is told its joint's own position, it gives no force but damping."""
    env = HumanoidVectorEnv("stand", 3)
    low, high = env.model.actuator_ctrlrange.T
    pose = standing_pose()
    pose[2] = 5.0  # in the air
    env.place(np.tile(pose, (3, 1)), np.zeros((3, 25)))
    hold = 2 * (pose[7:] - low) / (high - low) - 1
    env.step(np.stack([hold, np.full(19, 1.0), np.full(19, 7.0)]))
    np.testing.assert_allclose(env.controls[0, 0], pose[7:], atol=1e-12)
    np.testing.assert_allclose(env.controls[1, 0], high)
    np.testing.assert_array_equal(env.controls[1], env.controls[2])
    assert np.abs(env.readings().forces[0]).max() < 2.0 < np.abs(env.readings().forces[1]).max()
    env.close()


def test_reach_observes_hand_and_goal() -> None:
    """From the first observation on; the goal stays through the episode, the hand is where the body is."""
    env = HumanoidVectorEnv("reach", 5, seed=0)
    observation, _ = env.reset()
    goal = observation[:, 54:]
    assert (goal >= [-2, -2, 0.2]).all()
    assert (goal <= 2).all()
    assert np.linalg.norm(observation[:, 51:54] - observation[:, :3], axis=1) == pytest.approx(0.46, abs=0.1)
    after = env.step(np.zeros((5, 19)))[0]
    np.testing.assert_array_equal(after[:, 54:], goal)
    assert (after[:, 51:54] != observation[:, 51:54]).all()
    np.testing.assert_allclose(after[:, 51:54], observation[:, 51:54], atol=0.1)
    env.close()


def test_errors_of_use() -> None:
    with pytest.raises(ConfigError, match="tasks: 'fly' is not allowed; expected tasks of h1: stand, walk"):
        make_suite("h1").make("fly", 1, 0, 1)
    with pytest.raises(ConfigError, match="num_envs: 0 is not allowed; expected 1 or more"):
        HumanoidVectorEnv("walk", 0)
    with pytest.raises(ConfigError, match="num_threads: -2 is not allowed"):
        HumanoidVectorEnv("walk", 1, num_threads=-2)
    env = HumanoidVectorEnv("walk", 2)
    with pytest.raises(ValueError, match=r"actions: shape \(2, 3\) is not \(2, 19\)"):
        env.step(np.zeros((2, 3)))
    broken = np.zeros((2, 19))
    broken[1, 4] = np.nan
    with pytest.raises(ValueError, match="actions: not finite in env 1"):
        env.step(broken)
    env.close()


def test_single_env_is_the_vector_env_without_autoreset() -> None:
    single, vector = HumanoidEnv("slide", seed=4), HumanoidVectorEnv("slide", 1, seed=4)
    with pytest.raises(ValueError, match="call reset first"):
        single.step(np.zeros(19))
    np.testing.assert_array_equal(single.reset()[0], vector.reset()[0][0])
    action = np.full(19, 0.9)
    for _ in range(200):
        last, reward, terminated, truncated, info = single.step(action)
        _, rewards, _, _, infos = vector.step(action[None])
        assert reward == rewards[0]
        assert info["success"] == infos["success"][0]
        assert "final_obs" not in info
        if terminated or truncated:
            np.testing.assert_array_equal(last, infos["final_obs"][0])
            break
    with pytest.raises(ValueError, match="call reset first"):
        single.step(action)
    single.close()
    vector.close()
