from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from sphere_rl.errors import ConfigError
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.suites import check_task, make_suite, suites
from sphere_rl.suites.metaworld import ALL_TASKS, CW10, GOALS_WANDER, SUITES, environment_id
from sphere_rl.suites.remade import RemadePool


def trajectory(envs: VectorEnv, steps: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    observation, _ = envs.reset()
    rows = [observation]
    for _ in range(steps):
        rows.append(envs.step(rng.uniform(-1, 1, (envs.num_envs, 4)).astype(np.float32))[0])
    envs.close()
    return np.stack(rows)


def test_metaworld_names_every_task_of_envpool() -> None:
    import envpool

    assert sorted(map(environment_id, ALL_TASKS)) == sorted(e for e in envpool.list_all_envs() if "MetaWorld" in e)
    assert set(CW10) < set(ALL_TASKS)
    assert len(CW10) == 10


def test_metaworld_is_seeded_and_does_not_depend_on_threads() -> None:
    suite = make_suite("cw10")
    one, two = (trajectory(suite.make("hammer", 3, 5, threads), 20) for threads in (1, 2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, trajectory(suite.make("hammer", 3, 6, 1), 20))


def test_metaworld_spaces_and_goal() -> None:
    envs = make_suite("cw10").make("push", 2, 0, 1)
    observation, _ = envs.reset()
    assert (envs.single_observation_space.shape, envs.single_action_space.shape) == ((39,), (4,))
    assert observation[:, 36:].any()  # the goal is observable
    envs.close()


def test_a_closed_metaworld_holds_no_simulations() -> None:
    envs = make_suite("cw10").make("push", 2, 0, 1)
    assert "EnvPool" in repr(vars(envs))
    envs.close()
    assert "EnvPool" not in repr(vars(envs))


def test_metaworld_resets_in_the_step_that_ends_an_episode() -> None:
    envs = make_suite("cw10").make("reach", 2, 0, 1)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    first, _ = envs.reset()
    observation = first
    for _ in range(499):
        observation, *_ = envs.step(np.ones((2, 4), np.float32))
    last, _, _, truncated, info = envs.step(np.ones((2, 4), np.float32))
    assert truncated.all()
    np.testing.assert_allclose(info["final_obs"][:, :3], observation[:, :3], atol=0.01)  # where the hand had gone
    np.testing.assert_allclose(last[:, :3], first[:, :3], atol=0.01)  # where it starts
    assert info["final_info"]["elapsed_step"].tolist() == [500, 500]
    assert envs.step(np.ones((2, 4), np.float32))[4]["elapsed_step"].tolist() == [1, 1]
    envs.close()


@pytest.mark.parametrize("task", ALL_TASKS)
def test_a_metaworld_goal_stays_where_the_task_has_it(task: str) -> None:
    """EnvPool's own resets carry hammer's and shelf-place's 0.85 m further each time."""
    envs = make_suite("metaworld").make(task, 4, 0, 1)
    goals = np.stack([envs.reset()[0][:, 36:39] for _ in range(4)])
    envs.close()
    assert np.ptp(goals, axis=(0, 1)).max() < 0.31, "0.3 is the widest of the places that a goal is drawn from"


def test_nor_does_that_of_one_which_is_drawn_move() -> None:
    env = SUITES[0].render_env("shelf-place", 0)
    assert np.ptp([env.reset()[0][36:39] for _ in range(3)], axis=0).max() < 0.31
    env.close()


@pytest.mark.parametrize("task", GOALS_WANDER)
def test_what_is_made_anew_is_seeded_and_its_episodes_differ(task: str) -> None:
    one, same = (trajectory(make_suite("cw10").make(task, 2, 5, 1), 1005) for _ in range(2))
    np.testing.assert_array_equal(one, same)
    starts = one[[0, 500, 1000]]
    assert len({tuple(row) for row in starts[:, :, 4:6].reshape(6, 2)}) == 6
    np.testing.assert_allclose(starts[:, :, :3], np.broadcast_to(starts[0, 0, :3], (3, 2, 3)), atol=1e-3)


def test_some_of_an_environment_that_is_made_anew_cannot_be_reset() -> None:
    import envpool

    pool = RemadePool(partial(envpool.make_gymnasium, environment_id("hammer"), num_envs=2), 0)
    pool.reset()
    with pytest.raises(ValueError, match=r"env_ids: \[1\] are not all 2"):
        pool.reset(np.array([1], np.int32))


def test_gymnasium_environments_are_seeded_one_by_one() -> None:
    suite = make_suite("gym")
    one, same, other = (suite.make("Pendulum-v1", 3, seed, 1).reset()[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len({tuple(row) for row in one}) == 3


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Nope-v0", "a registered Gymnasium id"),
        ("pendulum", "a registered Gymnasium id"),
    ],
)
def test_gymnasium_refuses_what_it_cannot_train(task: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_suite("gym").make(task, 1, 0, 1)
    assert str(error.value).startswith(f"tasks: '{task}' is not allowed")


def test_suites_are_discovered_and_unknown_names_refused() -> None:
    assert {"cw10", "metaworld", "gym", "h1"} <= set(suites())
    with pytest.raises(ConfigError, match="suite: 'cw11' is not allowed; expected one of cw10, gym, h1, metaworld"):
        make_suite("cw11")
    with pytest.raises(ConfigError, match="tasks: 'fly' is not allowed; expected tasks of cw10: "):
        check_task(make_suite("cw10"), "fly")


def test_suites_that_promise_equal_spaces_have_them() -> None:
    for suite in suites().values():
        if suite.same_spaces:
            environments = [suite.make(task, 1, 0, 1) for task in suite.all_tasks]
            assert len({Spaces.of(envs) for envs in environments}) == 1, suite.name
            for envs in environments:
                envs.close()


def test_a_pool_that_cannot_be_made_anew_closes_without_a_second_error() -> None:
    class Pool:
        config: dict[str, int] = {"num_envs": 1}  # noqa: RUF012

        def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
            return np.zeros((1, 2)), {}

        def close(self) -> None:
            closed.append(self)

    def make(seed: int) -> Pool:
        if closed:
            raise OSError("no room")
        return Pool()

    closed: list[Pool] = []
    pool = RemadePool(make, 0)
    pool.reset()
    with pytest.raises(OSError, match="no room"):
        pool.reset()
    pool.close()
    assert len(closed) == 1
