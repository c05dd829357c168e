"""The H1 tasks: start, reward, termination and success bar, as pure functions of a batch of readings.

All definitions are HumanoidBench's (Sferrazza et al., 2024, arXiv 2403.10506). The five of the benchmark sequence
come first; the others are the locomotion tasks whose scenes are made of primitives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, inf, sin

import numpy as np
from jaxtyping import Bool, Float

from sphere_rl.suites.humanoid.scenes import BALL_RADIUS, BOARD_HEIGHT, BOARD_TOP
from sphere_rl.suites.humanoid.terms import (
    Readings,
    Scores,
    Terms,
    collision,
    control,
    joined_posture,
    move,
    posture,
    product,
    still,
    tolerance,
)

EPISODE_STEPS = 1000
BASE_HEIGHT = 0.98
Flags = Bool[np.ndarray, "B"]
Memory = Float[np.ndarray, "B M"]
Draw = Callable[[np.random.Generator, Float[np.ndarray, "Q"]], Float[np.ndarray, "M"]]


def standing_pose() -> Float[np.ndarray, "26"]:
    """Base 0.98 m above the floor, hips and knees bent, arms down."""
    qpos = np.zeros(26)
    qpos[2:4] = BASE_HEIGHT, 1.0
    for leg in (7, 12):
        qpos[leg + 2 : leg + 5] = -0.4, 0.8, -0.4
    return qpos


def nothing_drawn(generator: np.random.Generator, qpos: Float[np.ndarray, "Q"]) -> Float[np.ndarray, "0"]:
    """Nothing beyond the reset noise."""
    return np.zeros(0)


@dataclass(frozen=True)
class Task:
    """What makes one H1 task."""

    scene: str
    reward: Callable[[Readings], Terms]
    """The reward under `reward`, and its terms."""
    terminated: Callable[[Readings], Flags]
    success_bar: float = 700.0
    """An episode succeeds when its return reaches this."""
    start: Callable[[], Float[np.ndarray, "Q"]] = standing_pose
    """The state that reset noise is added to; velocities are 0."""
    draw: Draw = nothing_drawn
    """Random parts of a start: changes qpos in place, returns the episode's first memory."""
    advance: Callable[[Readings], Memory] | None = None
    """The memory after a step, before its reward."""
    observe: Callable[[Readings], Float[np.ndarray, "B X"]] | None = None
    """Columns of the observation after qpos and qvel."""


def stand(r: Readings) -> Terms:
    """control · stand · still."""
    return product({**posture(r), "control": control(r), "still": still(r)}, "control", "stand", "still")


def locomotion(speed: float) -> Callable[[Readings], Terms]:
    """control · stand · move(speed)."""
    return lambda r: product({**posture(r), "control": control(r), "move": move(r, speed)}, "control", "stand", "move")


def pole(r: Readings) -> Terms:
    """(control · stand / 2 + move(0.5) / 2) · collision with a pole."""
    terms = {**posture(r), "control": control(r), "move": move(r, 0.5), "collision": collision(r)}
    reward = 0.5 * terms["control"] * terms["stand"] + 0.5 * terms["move"]
    return {"reward": reward * terms["collision"], **terms}


def climb(r: Readings) -> Terms:
    """control · stand · move(1), with the head's height measured from each foot."""
    standing = np.ones(len(r.qpos))
    for foot in ("left_foot", "right_foot"):
        standing = standing * tolerance(r.height("head") - r.height(foot), (1.2, inf), 0.45)
    upright = tolerance(r.up, (0.5, inf), 1.9, "linear", 0.0)
    terms = {**joined_posture(standing, upright), "control": control(r), "move": move(r, 1.0)}
    return product(terms, "control", "stand", "move")


def hurdle(r: Readings) -> Terms:
    """control · stand · move(5) · collision with a side wall."""
    terms = {**posture(r, upright=0.8), "control": control(r), "move": move(r, 5.0), "collision": collision(r)}
    return product(terms, "control", "stand", "move", "collision")


def crawl(r: Readings) -> Terms:
    """(control / 10 + low / 4 + 2 move(1) / 5 + prone / 4) · inside the tunnel's width."""
    low = np.minimum(*(tolerance(r.height(site), (0.6, 1.0), 1.0) for site in ("head", "imu")))
    turned = np.linalg.norm(r.sensors["pelvis_quat"] - np.array([0.75, 0.0, 0.65, 0.0]), axis=1)
    terms = {"control": control(r), "low": low, "move": move(r, 1.0), "prone": tolerance(turned, margin=1.0)}
    terms["inside"] = tolerance(r.sensors["imu"][:, 1], (-1.0, 1.0))
    reward = 0.1 * terms["control"] + 0.25 * low + 0.4 * terms["move"] + 0.25 * terms["prone"]
    return {"reward": reward * terms["inside"], **terms}


def sit(r: Readings) -> Terms:
    """control · (seat height / 2 + on the chair / 2) · upright · trunk · still."""
    offset = r.qpos[:, :2] - r.sensors["chair"][:, :2]
    upright = tolerance(r.up, (0.95, inf), 0.9, "linear", 0.0)
    seat = tolerance(r.qpos[:, 2], (0.68, 0.72), 0.2)
    on_chair = tolerance(offset[:, 0], (-0.19, 0.19), 0.2) * tolerance(offset[:, 1], margin=0.1)
    trunk = tolerance(r.height("head") - r.height("imu"), (0.35, 0.45), 0.3)
    terms = {"seat": seat, "on_chair": on_chair, "trunk": trunk, "upright": upright}
    terms |= {"sit": (0.5 * seat + 0.5 * on_chair) * upright * trunk, "control": control(r), "still": still(r)}
    return product(terms, "control", "sit", "still")


def balance(r: Readings) -> Terms:
    """control · stand · still, the head 0.37 m higher than on the floor."""
    terms = {**posture(r, height=1.65 + 0.37), "control": control(r), "still": still(r)}
    return product(terms, "control", "stand", "still")


def fallen_from_board(r: Readings) -> Flags:
    """The base low, the ball touched by the robot, or the floor touched by anything but the ball."""
    ball_by_robot = r.contacts("ball") > r.contacts("ball_board") + r.contacts("ball_floor")
    floor_by_others = r.contacts("floor") > r.contacts("ball_floor")
    return (r.qpos[:, 2] < 0.8) | ball_by_robot | floor_by_others


def reach(r: Readings) -> Terms:
    """5 · pelvis upright − 1e-4 ‖qvel‖² + 5 within 1 m of the goal + 10 within 5 cm."""
    distance = np.linalg.norm(r.sensors["left_hand"] - r.memory, axis=1)
    terms = {"distance": distance, "healthy": 5 * r.sensors["pelvis_axis"][:, 2], "motion": (r.qvel**2).sum(axis=1)}
    bonus = 5.0 * (distance < 1) + 10.0 * (distance < 0.05)
    return {"reward": terms["healthy"] - 1e-4 * terms["motion"] + bonus, **terms}


def draw_goal(generator: np.random.Generator, qpos: Float[np.ndarray, "Q"]) -> Float[np.ndarray, "3"]:
    """A point for the left hand."""
    return generator.uniform([-2.0, -2.0, 0.2], [2.0, 2.0, 2.0])


# The way through the maze; the last point repeats so that the last stage has one. Each stage's direction is the way on.
CHECKPOINTS = np.array([[0.0, 0.0], [3.0, 0.0], [3.0, 6.0], [6.0, 6.0], [6.0, 6.0]])
DIRECTIONS = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])


def advance_stage(r: Readings) -> Memory:
    """[stage, stage before this step]: one further when the pelvis is within 0.4 m of the stage's checkpoint."""
    stage = r.memory[:, 0].astype(int)
    near = np.linalg.norm(r.sensors["pelvis"][:, :2] - CHECKPOINTS[stage], axis=1) < 0.4
    return np.stack([np.minimum(stage + near, len(CHECKPOINTS) - 1), stage], axis=1).astype(np.float64)


def maze(r: Readings) -> Terms:
    """(control · stand / 5 + 2 move / 5 + 2 near / 5) · collision + 100 · stage where a stage begins."""
    stage = r.memory[:, 0].astype(int)
    wanted = 2.0 * DIRECTIONS[stage]
    along = tolerance(r.velocity[:, :2] - wanted, margin=1.0, sigmoid="linear", value_at_margin=0.0).prod(axis=1)
    along = np.where(stage == len(CHECKPOINTS) - 1, 1.0, along)
    near = tolerance(np.linalg.norm(CHECKPOINTS[stage] - r.sensors["imu"][:, :2], axis=1), margin=1.0)
    terms = {**posture(r), "control": control(r), "move": (5 * along + 1) / 6, "near": near, "collision": collision(r)}
    terms["stage"] = r.memory[:, 0]
    bonus = 100.0 * stage * (stage > r.memory[:, 1])
    reward = 0.2 * terms["stand"] * terms["control"] + 0.4 * terms["move"] + 0.4 * near
    return {"reward": reward * terms["collision"] + bonus, **terms}


def below(height: float) -> Callable[[Readings], Flags]:
    """Ends when the base is lower than `height` [m]."""
    return lambda r: r.qpos[:, 2] < height


def tilted(r: Readings) -> Flags:
    """Ends when the torso is nearly horizontal."""
    return r.up < 0.1


def never(r: Readings) -> Flags:
    """Only truncation ends an episode."""
    return np.zeros(len(r.qpos), dtype=bool)


def with_objects(base: tuple[float, float, float], *objects: tuple[float, float, float]) -> Callable[[], Scores]:
    """The standing pose at `base`, followed by the poses of free objects."""

    def start() -> Float[np.ndarray, "Q"]:
        robot = standing_pose()
        robot[:3] = base
        return np.concatenate([robot, *([*position, 1.0, 0.0, 0.0, 0.0] for position in objects)])

    return start


def draw_place(generator: np.random.Generator, qpos: Float[np.ndarray, "Q"]) -> Float[np.ndarray, "0"]:
    """The robot somewhere in front of the chair, facing anywhere within 1.8 rad."""
    qpos[:2] = generator.uniform([0.2, -0.15], [0.4, 0.15])
    yaw = generator.uniform(-1.8, 1.8)
    qpos[3:7] = cos(yaw / 2), 0.0, 0.0, sin(yaw / 2)
    return np.zeros(0)


SEQUENCE = ("stand", "walk", "pole", "slide", "run")
ON_BOARD, BOARD, BALL = (-0.1, 0.0, BOARD_TOP + BASE_HEIGHT), (0.0, 0.0, BOARD_HEIGHT), (0.0, 0.0, BALL_RADIUS)

TASKS: dict[str, Task] = {
    "stand": Task("flat", stand, below(0.2), success_bar=800.0),
    "walk": Task("flat", locomotion(1.0), below(0.2)),
    "pole": Task("poles", pole, below(0.5)),
    "slide": Task("ridges", climb, tilted),
    "run": Task("flat", locomotion(5.0), below(0.2)),
    "hurdle": Task("hurdles", hurdle, below(0.2)),
    "crawl": Task("tunnel", crawl, never),
    "stair": Task("stairs", climb, tilted),
    "sit_simple": Task("chair", sit, below(0.5), success_bar=750.0),
    "sit_hard": Task(
        "loose_chair", sit, below(0.5), 750.0, with_objects((0.0, 0.0, BASE_HEIGHT), (-0.25, 0.0, 0.0)), draw_place
    ),
    "balance_simple": Task("board", balance, fallen_from_board, 800.0, with_objects(ON_BOARD, BOARD)),
    "balance_hard": Task("loose_board", balance, fallen_from_board, 800.0, with_objects(ON_BOARD, BOARD, BALL)),
    "reach": Task(
        "flat",
        reach,
        never,
        success_bar=12000.0,
        draw=draw_goal,
        observe=lambda r: np.concatenate([r.sensors["left_hand"], r.memory], axis=1),
    ),
    "maze": Task(
        "maze", maze, below(0.2), success_bar=1200.0, draw=lambda generator, qpos: np.zeros(2), advance=advance_stage
    ),
}
