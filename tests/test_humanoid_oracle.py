# pyright: reportAttributeAccessIssue=false
"""Every H1 task stepped beside plain MuJoCo: one robot by mj_step, its reward in scalars from MjData's own fields."""

from math import hypot, sqrt

import mujoco
import numpy as np
import pytest

from sphere_rl.suites.humanoid.env import HumanoidVectorEnv
from sphere_rl.suites.humanoid.tasks import TASKS

# Where the three robots of a task are put, so that what its reward or its end depends on happens within 60 steps.
PLACES = {
    "pole": ((5.5, 0.0), (6.5, 0.4), (1.9, -0.1)),  # the third one touches a pole
    "hurdle": ((0.0, 0.0), (6.8, 0.0), (3.0, 4.1)),  # the third one touches a wall
    "crawl": ((0.0, 0.0), (2.0, 0.9), (5.0, 1.6)),  # the third one leaves the tunnel's width
    "balance_simple": ((-0.1, 0.0, 1.38), (0.9, 0.0, 0.97), (0.25, 0.2, 1.12)),  # on the floor; on the ball
    "maze": ((0.0, 0.0), (2.8, 0.1), (1.0, -0.5)),  # the first one enters a stage, the third one touches a block
}
HAPPENS = {"pole": {"collision"}, "hurdle": {"collision"}, "crawl": {"inside"}, "maze": {"collision", "stage"}}


class PlainMujoco:
    """One robot, and what HumanoidBench's definitions give for it; names of bodies and geoms are the scenes'."""

    def __init__(self, env: HumanoidVectorEnv, qpos: np.ndarray, qvel: np.ndarray, goal: np.ndarray) -> None:
        self.model, self.data, self.goal, self.stage = env.model, mujoco.MjData(env.model), goal, 0
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel

    def step(self, action: np.ndarray) -> np.ndarray:
        low, high = self.model.actuator_ctrlrange.T
        self.data.ctrl[:] = low + (action + 1) * (high - low) / 2
        self.data.qacc_warmstart[:] = 0
        mujoco.mj_step(self.model, self.data, nstep=10)
        return np.concatenate([self.data.qpos, self.data.qvel])

    def score(self, task: str) -> tuple[float, bool]:
        """The reward and whether the episode ends."""
        if task in ("slide", "stair"):
            return self.climb()
        if task in ("sit_simple", "sit_hard"):
            return self.sit(), self.base[2] < 0.5
        if task in ("balance_simple", "balance_hard"):
            return self.control() * self.stand(2.02) * self.still(), self.fallen()
        if task == "pole":
            reward = (self.control() * self.stand() + self.gait(0.5)) / 2
            return reward * self.collision("poles"), self.base[2] < 0.5
        if task == "hurdle":
            reward = self.control() * self.stand(upright=0.8) * self.gait(5) * self.collision("walls")
            return reward, self.base[2] < 0.2
        if task in ("crawl", "reach"):
            return (self.crawl() if task == "crawl" else self.reach()), False
        if task == "maze":
            return self.maze(), self.base[2] < 0.2
        factor = self.still() if task == "stand" else self.gait({"walk": 1, "run": 5}[task])
        return self.control() * self.stand() * factor, self.base[2] < 0.2

    @property
    def base(self) -> list[float]:
        return self.data.qpos[:3].tolist()

    @property
    def up(self) -> float:
        return self.data.body("torso_link").xmat[8].item()

    def site(self, name: str) -> list[float]:
        return self.data.site(name).xpos.tolist()

    def control(self) -> float:
        return 0.8 + 0.2 * sum(max(0.0, 1 - (f / 10) ** 2) for f in self.data.actuator_force.tolist()) / 19

    def stand(self, height: float = 1.65, upright: float = 0.9) -> float:
        return fall(height - self.site("head")[2], 0.4125) * line(upright - self.up, 1.9)

    def still(self) -> float:
        vx, vy, _ = self.velocity()
        return (fall(abs(vx), 2) + fall(abs(vy), 2)) / 2

    def gait(self, wanted: float) -> float:
        return 1 / 6 + 5 / 6 * line(wanted - self.velocity()[0], wanted)

    def climb(self) -> tuple[float, bool]:
        reward = self.control() * self.gait(1) * line(0.5 - self.up, 1.9)
        for foot in ("left_foot", "right_foot"):
            reward *= fall(1.2 - (self.site("head")[2] - self.site(foot)[2]), 0.45)
        return reward, self.up < 0.1

    def crawl(self) -> float:
        (_, y, z), head = self.site("imu"), self.site("head")[2]
        low = min(fall(max(0.6 - height, height - 1.0), 1) for height in (z, head))
        w, i, j, k = self.data.body("pelvis").xquat.tolist()
        prone = fall(sqrt((w - 0.75) ** 2 + i**2 + (j - 0.65) ** 2 + k**2), 1)
        reward = 0.1 * self.control() + 0.25 * low + 0.4 * self.gait(1) + 0.25 * prone
        return reward if abs(y) <= 1 else 0.0

    def sit(self) -> float:
        (x, y, z), chair = self.base, self.data.body("chair").xpos.tolist()
        seat = fall(max(0.68 - z, z - 0.72), 0.2)
        on_chair = fall(abs(x - chair[0]) - 0.19, 0.2) * fall(abs(y - chair[1]), 0.1)
        trunk = self.site("head")[2] - self.site("imu")[2]
        posture = line(0.95 - self.up, 0.9) * fall(max(0.35 - trunk, trunk - 0.45), 0.3)
        return self.control() * (seat + on_chair) / 2 * posture * self.still()

    def reach(self) -> float:
        distance = sqrt(sum((a - b) ** 2 for a, b in zip(self.site("left_hand"), self.goal.tolist(), strict=True)))
        upright = self.data.body("pelvis").xmat[8].item()
        return 5 * upright - 1e-4 * sum(v**2 for v in self.data.qvel.tolist()) + 5 * (distance < 1)

    def maze(self) -> float:
        """As far as the first stage, which begins at the start; the way on is +x before it and in it."""
        x, y, _ = self.data.body("pelvis").xpos.tolist()
        begins = self.stage == 0 and hypot(x, y) < 0.4
        self.stage += begins
        vx, vy, _ = self.velocity()
        move = 1 / 6 + 5 / 6 * line(abs(vx - 2), 1) * line(abs(vy), 1)
        x, y, _ = self.site("imu")
        near = fall(hypot(x - 3 * self.stage, y), 1)
        reward = 0.2 * self.stand() * self.control() + 0.4 * move + 0.4 * near
        return reward * self.collision("maze") + 100 * begins

    def collision(self, body: str) -> float:
        return 0.1 if any(body in bodies for bodies in self.touching()) else 1.0

    def fallen(self) -> bool:
        """Balance: low, or a contact that is neither the robot's with the board nor the ball's with board or floor."""
        allowed = {frozenset(pair) for pair in (("ball", "board"), ("ball", "world"))}
        wrong = (pair not in allowed and pair & {"ball", "world"} for pair in self.touching())
        return self.base[2] < 0.8 or any(wrong)

    def touching(self) -> list[frozenset[str]]:
        """The two bodies of every contact of the last forward pass."""
        bodies = self.model.geom_bodyid
        return [frozenset(self.model.body(bodies[g]).name for g in c.geom) for c in self.data.contact]

    def velocity(self) -> list[float]:
        """Momentum over mass of the last forward pass: link velocities at their centres of mass, by hand."""
        momentum = np.zeros(3)
        robot = np.flatnonzero(self.model.body_rootid == self.model.body("pelvis").id)
        for body in robot:
            # cvel: angular and linear velocity at the tree's centre of mass, in world axes
            angular, linear = self.data.cvel[body, :3], self.data.cvel[body, 3:]
            arm = self.data.xipos[body] - self.data.subtree_com[robot[0]]
            momentum += self.model.body_mass[body] * (linear + np.cross(angular, arm))
        return (momentum / self.model.body_mass[robot].sum()).tolist()


def fall(short: float, margin: float) -> float:
    return 1.0 if short <= 0 else float(np.exp(-0.5 * (short / margin * np.sqrt(2 * np.log(10))) ** 2))


def line(short: float, margin: float) -> float:
    return min(1.0, max(0.0, 1 - short / margin))


@pytest.mark.parametrize("task", TASKS)
def test_steps_like_plain_mujoco(task: str) -> None:
    """Bitwise equal states from equal states and actions; rewards and terminations of the last forward pass."""
    env = HumanoidVectorEnv(task, num_envs=3, seed=5, num_threads=2)
    nq, nv = env.model.nq, env.model.nv
    generator = np.random.default_rng(1)
    observation, _ = env.reset()
    qpos, qvel = observation[:, :nq].copy(), observation[:, nq : nq + nv]
    if task in PLACES:
        places = np.array(PLACES[task])
        qpos[:, : places.shape[1]] = places
    observation = env.place(qpos, qvel)
    oracles = [PlainMujoco(env, row[:nq], row[nq : nq + nv], row[nq + nv :][3:]) for row in observation]
    ended, seen = np.zeros(3, dtype=bool), set()
    for _ in range(60):
        actions = generator.uniform(-1, 1, (3, 19))
        observation, reward, terminated, _, info = env.step(actions)
        last = np.where(terminated[:, None], info.get("final_obs", observation), observation)
        for i in np.flatnonzero(~ended):
            np.testing.assert_array_equal(oracles[i].step(actions[i]), last[i, : nq + nv])
            expected, over = oracles[i].score(task)
            assert reward[i] == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert terminated[i] == over
        plain = {"collision": 1.0, "inside": 1.0, "stage": 0.0}
        seen |= {name for name, value in plain.items() if name in info and (info[name] != value).any()}
        ended |= terminated
        if ended.all():
            break
    assert ended.any() or task in ("stand", "walk", "run", "hurdle", "crawl", "reach", "maze")
    assert seen == HAPPENS.get(task, set())
    env.close()
