# pyright: reportAttributeAccessIssue=false
"""Rewards and terminations of the H1 tasks, against hand arithmetic; step by step: test_humanoid_oracle."""

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere_rl.suites.humanoid.env import HumanoidVectorEnv
from sphere_rl.suites.humanoid.tasks import CHECKPOINTS, TASKS, standing_pose
from sphere_rl.suites.humanoid.terms import Readings, tolerance


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((1.0, (0.5, inf), 2.0, "linear", 0.0), 1.0),
        ((-0.5, (0.5, inf), 2.0, "linear", 0.0), 0.5),
        ((-1.5, (0.5, inf), 2.0, "linear", 0.0), 0.0),
        ((-9.0, (0.5, inf), 2.0, "linear", 0.0), 0.0),
        ((1.5, (0.5, inf), 2.0, "linear", 0.2), 1.0),
        ((-1.5, (0.5, inf), 2.0, "linear", 0.2), 0.2),
        ((5.0, (0.0, 0.0), 10.0, "quadratic", 0.0), 0.75),
        ((-20.0, (0.0, 0.0), 10.0, "quadratic", 0.0), 0.0),
        ((2.0, (0.0, 0.0), 2.0), 0.1),
        ((1.0, (0.0, 0.0), 2.0), 0.1**0.25),
        ((-4.0, (0.0, 0.0), 2.0), 0.1**4),
        ((0.4, (0.35, 0.45), 0.0), 1.0),
        ((0.5, (0.35, 0.45), 0.0), 0.0),
    ],
)
def test_tolerance(arguments: tuple, expected: float) -> None:
    assert tolerance(np.array(arguments[:1]), *arguments[1:]) == pytest.approx(expected, abs=1e-15)


@given(
    x=st.floats(-50, 50),
    sigmoid=st.sampled_from(["gaussian", "linear", "quadratic"]),
    value=st.floats(0.01, 0.99),
    margin=st.floats(0.1, 10),
)
def test_tolerance_is_what_its_parameters_say(x: float, sigmoid: str, value: float, margin: float) -> None:
    def score(at: float) -> float:
        return tolerance(np.array([at]), (-1.0, 2.0), margin, sigmoid, value).item()

    assert score(2 + margin) == pytest.approx(value)
    assert score(-1 - margin) == pytest.approx(value)
    if -1 <= x <= 2:
        assert score(x) == 1
    assert score(2 + abs(x)) >= score(2 + 1.1 * abs(x))


def test_unknown_sigmoid() -> None:
    with pytest.raises(ValueError, match="sigmoid: 'tanh' is not one of gaussian, linear, quadratic"):
        tolerance(np.zeros(1), margin=1.0, sigmoid="tanh")


SENSORS = {
    "torso_axis": (0.0, 0.0, 1.0),
    "pelvis": (0.0, 0.0, 1.0),
    "pelvis_axis": (0.0, 0.0, 1.0),
    "pelvis_quat": (1.0, 0.0, 0.0, 0.0),
    "velocity": (0.0, 0.0, 0.0),
    "head": (0.0, 0.0, 1.7),
    "imu": (0.0, 0.0, 1.3),
    "left_foot": (0.0, 0.1, 0.05),
    "right_foot": (0.0, -0.1, 0.05),
    "left_hand": (0.0, 0.0, 0.0),
    "chair": (-0.25, 0.0, 0.0),
    **dict.fromkeys(("obstacle", "ball", "ball_board", "ball_floor", "floor"), (0.0,)),
}


def readings(
    base: tuple[float, float, float] = (0.0, 0.0, 0.98),
    force: float = 0.0,
    speed: float = 0.0,
    memory: tuple[float, ...] = (),
    **sensors: tuple[float, ...],
) -> Readings:
    """One robot standing still and straight, but for what is given."""
    qpos = standing_pose()
    qpos[:3] = base
    values = {name: np.array([value]) for name, value in (SENSORS | sensors).items()}
    return Readings(qpos[None], np.full((1, 25), speed), np.full((1, 19), force), values, np.array([memory]))


# Head: half the margin of 0.4125 below 1.65 scores 0.1^(1/4). Cosine: a quarter of 1.9 below 0.9 scores 0.75.
LOW, LEAN, PUSH = (0.0, 0.0, 1.65 - 0.20625), (0.0, 0.0, 0.425), 5.0
STANDING, UPRIGHT, CONTROL = 0.1**0.25, 0.75, (4 + 0.75) / 5


REWARDS = [
    ("stand", readings(), 1.0),
    ("stand", readings(head=LOW), STANDING),
    ("stand", readings(torso_axis=LEAN), UPRIGHT),
    ("stand", readings(force=PUSH), CONTROL),
    ("stand", readings(force=-30.0), 0.8),
    ("stand", readings(velocity=(2.0, 1.0, 9.0)), (0.1 + 0.1**0.25) / 2),
    ("stand", readings(head=LOW, torso_axis=LEAN, force=PUSH), STANDING * UPRIGHT * CONTROL),
    ("walk", readings(), 1 / 6),
    ("walk", readings(velocity=(0.5, 3.0, 0.0)), 3.5 / 6),
    ("walk", readings(velocity=(-2.0, 0.0, 0.0), force=PUSH), CONTROL / 6),
    ("walk", readings(velocity=(1.0, 0.0, 0.0), head=LOW), STANDING),
    ("run", readings(velocity=(1.0, 0.0, 0.0)), 2 / 6),
    ("run", readings(velocity=(6.0, 0.0, 0.0), torso_axis=LEAN), UPRIGHT),
    ("pole", readings(velocity=(0.25, 0.0, 0.0)), 0.5 + 0.5 * 3.5 / 6),
    ("pole", readings(velocity=(0.5, 0.0, 0.0), head=LOW, force=PUSH), 0.5 * STANDING * CONTROL + 0.5),
    ("pole", readings(velocity=(0.5, 0.0, 0.0), obstacle=(2.0,)), 0.1),
    ("slide", readings(velocity=(0.5, 0.0, 0.0)), 3.5 / 6),
    # Head 1.7 over a foot at 0.725: 0.225 below 1.2, half the margin of 0.45. Cosine 0.025: a quarter below 0.5.
    ("slide", readings(velocity=(1.0, 0.0, 0.0), left_foot=(0.0, 0.0, 0.725)), 0.1**0.25),
    ("slide", readings(left_foot=(0.0, 0.0, 0.725), right_foot=(0.0, 0.0, 0.95)), 0.1**0.25 * 0.1 / 6),
    ("slide", readings(velocity=(1.0, 0.0, 0.0), torso_axis=(0.0, 0.0, 0.025), force=PUSH), 0.75 * CONTROL),
    ("stair", readings(velocity=(0.2, 0.0, 0.0), torso_axis=(0.0, 0.0, 0.025)), 0.75 * 2 / 6),
    ("hurdle", readings(velocity=(5.0, 0.0, 0.0), torso_axis=(0.0, 0.0, 0.325)), 0.75),
    ("hurdle", readings(velocity=(1.0, 0.0, 0.0), obstacle=(1.0,)), 0.1 * 2 / 6),
    # Prone: the quaternion is the wanted one. Head 0.5 m too high: 0.1^(1/4), worse than the trunk.
    (
        "crawl",
        readings(
            head=(0.0, 0.0, 1.5), imu=(0.0, 0.9, 1.0), pelvis_quat=(0.75, 0.0, 0.65, 0.0), velocity=(1.0, 0.0, 0.0)
        ),
        0.1 + 0.25 * 0.1**0.25 + 0.4 + 0.25,
    ),
    ("crawl", readings(imu=(0.0, 1.1, 1.0)), 0.0),
    (
        "crawl",
        readings(head=(0.0, 0.0, 0.8), imu=(0.0, 0.0, 2.0), pelvis_quat=(-0.25, 0.0, 0.65, 0.0), force=20.0),
        0.1 * 0.8 + 0.25 * 0.1 + 0.4 / 6 + 0.25 * 0.1,
    ),
    ("sit_simple", readings(base=(-0.25, 0.0, 0.7), head=(0.0, 0.0, 1.7)), 1.0),
    # 0.1 m too high, half the margin: 0.1^(1/4); 0.05 m beside the chair's middle, half the margin.
    (
        "sit_simple",
        readings(base=(-0.25, 0.05, 0.82), velocity=(2.0, 2.0, 0.0)),
        (0.5 * 0.1**0.25 + 0.5 * 0.1**0.25) * 0.1,
    ),
    ("sit_hard", readings(base=(0.74, 0.0, 0.7), chair=(0.5, 0.0, 0.0)), 0.5 + 0.5 * 0.1 ** (0.05**2 / 0.2**2)),
    ("sit_simple", readings(base=(-0.25, 0.0, 0.7), imu=(0.0, 0.0, 1.1)), 0.1**0.25),
    ("sit_simple", readings(base=(-0.25, 0.0, 0.7), torso_axis=(0.0, 0.0, 0.5)), 0.5),
    ("balance_simple", readings(head=(0.0, 0.0, 2.02 - 0.20625)), 0.1**0.25),
    ("balance_hard", readings(head=(0.0, 0.0, 2.1), force=PUSH), CONTROL),
    ("reach", readings(memory=(3.0, 4.0, 0.0), speed=2.0), 5 - 1e-4 * 25 * 4),
    ("reach", readings(memory=(0.6, 0.0, 0.0), pelvis_axis=(0.0, 0.0, 0.5)), 2.5 + 5),
    ("reach", readings(memory=(0.0, 0.03, 0.0)), 5 + 5 + 10),
    # Maze: at the start of stage 1 the pay is 100 and the way on is +x; 1.5 m/s of 2 scores 0.5.
    (
        "maze",
        readings(memory=(1.0, 0.0), velocity=(1.5, 0.0, 0.0), imu=(2.0, 0.0, 1.3)),
        100 + 0.2 + 0.4 * 3.5 / 6 + 0.04,
    ),
    (
        "maze",
        readings(memory=(2.0, 2.0), velocity=(0.0, 2.0, 0.0), imu=(3.0, 5.5, 1.3), obstacle=(1.0,)),
        0.1 * (0.2 + 0.4 + 0.4 * 0.1**0.25),
    ),
    ("maze", readings(memory=(4.0, 3.0), imu=(6.0, 6.0, 1.3), head=LOW), 400 + 0.2 * STANDING + 0.8),
]


@pytest.mark.parametrize(("task", "given_readings", "expected"), REWARDS)
def test_reward_by_hand(task: str, given_readings: Readings, expected: float) -> None:
    terms = TASKS[task].reward(given_readings)
    assert terms["reward"].shape == (1,)
    assert terms["reward"][0] == pytest.approx(expected, rel=1e-12)


LOWEST = {"stand": 0.2, "walk": 0.2, "run": 0.2, "hurdle": 0.2, "maze": 0.2, "pole": 0.5}
LOWEST |= {"sit_simple": 0.5, "sit_hard": 0.5, "balance_simple": 0.8, "balance_hard": 0.8}
ENDS = [(task, readings(base=(0.0, 0.0, z + d)), d < 0) for task, z in LOWEST.items() for d in (-1e-9, 0.0)]
for name in ("slide", "stair"):
    ENDS += [(name, readings(torso_axis=(0.0, 0.0, 0.1 + d)), d < 0) for d in (-1e-9, 0.0)]
ENDS += [(task, readings(base=(0.0, 0.0, 0.01)), False) for task in ("slide", "stair", "crawl", "reach")]
ENDS += [(task, readings(torso_axis=(0.0, 0.0, -1.0)), False) for task in ("walk", "pole", "crawl", "reach")]
for name in ("balance_simple", "balance_hard"):  # the ball may touch board and floor; nothing else may touch either
    ENDS += [
        (name, readings(ball=(2.0,), ball_board=(1.0,), ball_floor=(1.0,), floor=(1.0,)), False),
        (name, readings(ball=(3.0,), ball_board=(1.0,), ball_floor=(1.0,), floor=(1.0,)), True),
        (name, readings(ball=(2.0,), ball_board=(1.0,), ball_floor=(1.0,), floor=(2.0,)), True),
    ]


@pytest.mark.parametrize(("task", "given_readings", "expected"), ENDS)
def test_termination_by_hand(task: str, given_readings: Readings, expected: bool) -> None:
    assert TASKS[task].terminated(given_readings).tolist() == [expected]


def test_every_task_has_hand_computed_cases() -> None:
    assert {task for task, *_ in REWARDS} == {task for task, *_ in ENDS} == set(TASKS)


def test_success_bars() -> None:
    bars = {"stand": 800, "sit_simple": 750, "sit_hard": 750, "reach": 12000, "maze": 1200}
    bars |= {"balance_simple": 800, "balance_hard": 800}
    assert {name: task.success_bar for name, task in TASKS.items()} == {name: bars.get(name, 700) for name in TASKS}


def test_maze_stages() -> None:
    """A stage further at each checkpoint in order, the last one kept; [now, before]."""
    advance = TASKS["maze"].advance
    assert advance is not None
    for stage, checkpoint in enumerate(CHECKPOINTS):
        near = readings(memory=(stage, 0.0), pelvis=(checkpoint[0] + 0.39, checkpoint[1], 0.9))
        far = readings(memory=(stage, 0.0), pelvis=(checkpoint[0] + 0.41, checkpoint[1], 0.9))
        assert advance(near).tolist() == [[min(stage + 1, 4), stage]]
        assert advance(far).tolist() == [[stage, stage]]


def test_a_touched_pole_costs_nine_tenths() -> None:
    """Two robots alike, but that one stands in a pole."""
    env = HumanoidVectorEnv("pole", num_envs=2)
    qpos = np.tile(standing_pose(), (2, 1))
    qpos[:, 0] = 2.5, 2.0  # a pole stands at (2, 0)
    env.place(qpos, np.zeros((2, 25)))
    _, reward, _, _, info = env.step(np.zeros((2, 19)))
    assert info["collision"].tolist() == [1.0, 0.1]
    assert reward[1] < 0.15 < 0.5 < reward[0]
    env.close()


def test_a_robot_on_its_side_ends_slide_but_not_walk() -> None:
    for task, ends in (("slide", True), ("walk", False)):
        env = HumanoidVectorEnv(task, num_envs=1)
        qpos = standing_pose()
        qpos[2:7] = 1.5, np.cos(0.75), np.sin(0.75), 0.0, 0.0  # tilted by 1.5 rad about x: cosine 0.07
        env.place(qpos[None], np.zeros((1, 25)))
        assert env.step(np.zeros((1, 19)))[2].tolist() == [ends]
        env.close()
