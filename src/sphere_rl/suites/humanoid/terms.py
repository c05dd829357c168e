"""What a task sees of a step, and the scores in [0, 1] that its reward is built from.

The scores are HumanoidBench's (Sferrazza et al., 2024, arXiv 2403.10506), over dm_control's `tolerance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log

import numpy as np
from jaxtyping import Bool, Float

Scores = Float[np.ndarray, "B"]
Terms = dict[str, np.ndarray]

STAND_HEIGHT = 1.65


@dataclass(frozen=True)
class Readings:
    """One step of B robots. Sensors are those of the last substep's forward pass; `qpos` and `qvel` come after it."""

    qpos: Float[np.ndarray, "B Q"]
    qvel: Float[np.ndarray, "B V"]
    forces: Float[np.ndarray, "B J"]
    sensors: Mapping[str, Float[np.ndarray, "B _"]]
    memory: Float[np.ndarray, "B M"]
    """What a task itself remembers within an episode: a goal, a stage. M is 0 for most tasks."""

    def height(self, site: str) -> Scores:
        """Height of a site above the floor [m]."""
        return self.sensors[site][:, 2]

    @property
    def up(self) -> Scores:
        """Cosine of the angle between the torso's vertical axis and the world's."""
        return self.sensors["torso_axis"][:, 2]

    @property
    def velocity(self) -> Float[np.ndarray, "B 3"]:
        """Velocity of the whole robot's centre of mass [m/s]."""
        return self.sensors["velocity"]

    def contacts(self, name: str) -> Scores:
        """Number of contacts that a counter found."""
        return self.sensors[name][:, 0]

    def touched(self, name: str) -> Bool[np.ndarray, "B"]:
        """Whether a contact counter found anything."""
        return self.contacts(name) > 0


def tolerance(
    x: Float[np.ndarray, "..."],
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: float = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Float[np.ndarray, "..."]:
    """Score 1 inside `bounds`, falling to `value_at_margin` at distance `margin` outside; as in dm_control.

    With d = distance / margin and v = value_at_margin: gaussian exp(d² log v); linear max(0, 1 − (1 − v) d);
    quadratic max(0, 1 − (1 − v) d²). A margin of 0 scores 0 outside.
    """
    low, high = bounds
    distance = np.maximum(np.maximum(low - x, x - high), 0.0)
    if margin == 0:
        return (distance == 0).astype(np.float64)
    d = distance / margin
    if sigmoid == "gaussian":
        return np.exp(d**2 * log(value_at_margin))
    if sigmoid == "linear":
        return np.maximum(0.0, 1 - (1 - value_at_margin) * d)
    if sigmoid == "quadratic":
        return np.maximum(0.0, 1 - (1 - value_at_margin) * d**2)
    raise ValueError(f"sigmoid: {sigmoid!r} is not one of gaussian, linear, quadratic")


def posture(r: Readings, height: float = STAND_HEIGHT, upright: float = 0.9) -> Terms:
    """stand = standing · upright: the head at least at `height` [m], the torso's cosine at least `upright`."""
    standing = tolerance(r.height("head"), (height, inf), STAND_HEIGHT / 4)
    return joined_posture(standing, tolerance(r.up, (upright, inf), 1.9, "linear", 0.0))


def joined_posture(standing: Scores, upright: Scores) -> Terms:
    """stand = standing · upright, with its factors."""
    return {"standing": standing, "upright": upright, "stand": standing * upright}


def control(r: Readings) -> Scores:
    """Small actuator forces: (4 + mean over joints) / 5, between 0.8 and 1."""
    return (4 + tolerance(r.forces, margin=10.0, sigmoid="quadratic", value_at_margin=0.0).mean(axis=1)) / 5


def move(r: Readings, speed: float) -> Scores:
    """Forward velocity: from 1/6 at rest to 1 at `speed` [m/s]."""
    return (5 * tolerance(r.velocity[:, 0], (speed, inf), speed, "linear", 0.0) + 1) / 6


def still(r: Readings) -> Scores:
    """No horizontal velocity, mean of the two axes."""
    return tolerance(r.velocity[:, :2], margin=2.0).mean(axis=1)


def collision(r: Readings) -> Scores:
    """0.1 where the scene's obstacle is touched, else 1."""
    return np.where(r.touched("obstacle"), 0.1, 1.0)


def product(terms: Terms, *factors: str) -> Terms:
    """The terms and their reward: the product of those named."""
    return {"reward": np.prod([terms[name] for name in factors], axis=0), **terms}
