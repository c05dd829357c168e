# pyright: reportAttributeAccessIssue=false
"""A foot of the user's own: the same hull from a file is the same robot, another one is another."""

import re
import struct
from itertools import product
from pathlib import Path

import mujoco
import numpy as np
import pytest

from sphere_rl.errors import ConfigError
from sphere_rl.suites.humanoid import Humanoid
from sphere_rl.suites.humanoid.env import HumanoidEnv, HumanoidVectorEnv
from sphere_rl.suites.humanoid.foot import read_foot_mesh
from sphere_rl.suites.humanoid.model import compile_model, foot_vertices
from sphere_rl.suites.humanoid.tasks import standing_pose

HULL = np.array(foot_vertices()).reshape(20, 3)
# A block whose sole is at -0.09, 2 cm lower than the built-in one's, and which is 6 cm wide instead of 3.
BLOCK = np.array(list(product((-0.1, 0.2), (-0.03, 0.03), (-0.09, 0.01))))
SIX_FACES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
TRIANGLES = [triangle for a, b, c, d in SIX_FACES for triangle in ((a, b, c), (a, c, d))]


def obj(path: Path, corners: np.ndarray, triangles: list[tuple[int, ...]] | None = None) -> Path:
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in corners.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in triangles or []]
    path.write_text("\n".join(lines) + "\n")
    return path


def stl(path: Path, corners: np.ndarray, triangles: np.ndarray) -> Path:
    """Binary: a header of 80 bytes, the count, and for each triangle its normal, its corners and two bytes."""
    facets = [struct.pack("<12fH", 0, 0, 0, *corners[triangle].flatten(), 0) for triangle in triangles]
    path.write_bytes(bytes(80) + struct.pack("<I", len(facets)) + b"".join(facets))
    return path


def foot_corners(model: mujoco.MjModel, side: str) -> np.ndarray:
    """The corners of a foot's collision mesh, in the ankle's frame."""
    geom = model.geom(f"{side}_ankle_link_hull")
    mesh, rotation = geom.dataid.item(), np.zeros(9)
    start, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    mujoco.mju_quat2Mat(rotation, geom.quat)
    return model.mesh_vert[start : start + count] @ rotation.reshape(3, 3).T + geom.pos


def states(env: HumanoidVectorEnv, steps: int = 15) -> np.ndarray:
    """Observations of random steps from the start; closes the env."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, 3, 19))[:, : env.num_envs]
    rows = [env.reset(seed=0)[0], *(env.step(action)[0] for action in actions)]
    env.close()
    return np.stack(rows)


@pytest.mark.parametrize("task", ["walk", "slide", "balance_simple"])
def test_the_built_in_hull_from_a_file_is_the_same_robot(task: str, tmp_path: Path) -> None:
    """Bitwise from an OBJ with its corners in order; an STL orders them anew, its hull is the same to float32."""
    expected = states(HumanoidVectorEnv(task, 3))
    same = states(HumanoidVectorEnv(task, 3, foot_mesh=obj(tmp_path / "foot.obj", HULL)))
    np.testing.assert_array_equal(same, expected)
    model = compile_model("flat")
    mesh = model.mesh("foot").id
    first = model.mesh_faceadr[mesh]
    faces = model.mesh_face[first : first + model.mesh_facenum[mesh]]
    env = HumanoidVectorEnv(task, 3, foot_mesh=stl(tmp_path / "foot.STL", HULL, faces))
    found = foot_corners(env.model, "left")
    assert {tuple(corner) for corner in found.round(6)} == {tuple(corner) for corner in HULL.round(6)}
    np.testing.assert_allclose(states(env, steps=1), expected[:2], atol=1e-6)


def test_another_foot_is_another_robot_by_its_feet_alone(tmp_path: Path) -> None:
    """Block feet: their corners in the ankle's frame, the rest of the model, soles where arithmetic puts them."""
    path = obj(tmp_path / "block.obj", BLOCK, TRIANGLES)
    own, block = HumanoidVectorEnv("stand", 2), HumanoidVectorEnv("stand", 2, foot_mesh=str(path))
    for side in ("left", "right"):
        corners = sorted(map(tuple, foot_corners(block.model, side).round(6).tolist()))
        assert corners == sorted(map(tuple, BLOCK.tolist()))
    for name in ("body_mass", "body_inertia", "body_ipos", "actuator_gainprm", "geom_type", "geom_contype"):
        np.testing.assert_array_equal(getattr(own.model, name), getattr(block.model, name))
    elsewhere = [g for g in range(own.model.ngeom) if "ankle_link_hull" not in own.model.geom(g).name]
    np.testing.assert_array_equal(own.model.geom_pos[elsewhere], block.model.geom_pos[elsewhere])
    np.testing.assert_array_equal(own.model.geom_rbound[elsewhere], block.model.geom_rbound[elsewhere])
    ankle = 0.98 - 0.1742 - 2 * 0.4 * np.cos(0.4)  # the base's height, down to the hip, thigh and shin
    for env, sole in ((own, 0.07), (block, 0.09)):
        data = mujoco.MjData(env.model)
        data.qpos[:] = standing_pose()
        mujoco.mj_forward(env.model, data)
        assert data.contact.dist.min() == pytest.approx(ankle - sole, abs=1e-6)
        env.close()


def test_every_env_of_a_batch_has_it_and_state_goes_on(tmp_path: Path) -> None:
    path = obj(tmp_path / "block.obj", BLOCK, TRIANGLES)
    batch = states(HumanoidVectorEnv("walk", 3, num_threads=2, foot_mesh=path))
    np.testing.assert_array_equal(states(HumanoidVectorEnv("walk", 1, foot_mesh=path)), batch[:, :1])
    one, other = (HumanoidVectorEnv("walk", 2, seed, foot_mesh=path) for seed in (0, 1))
    action = np.full((2, 19), 0.2)
    one.step(action)
    other.set_state(one.get_state())
    for _ in range(5):
        np.testing.assert_array_equal(one.step(action)[0], other.step(action)[0])
    one.close()
    other.close()


def test_the_suite_takes_it_for_training_and_for_pictures(tmp_path: Path) -> None:
    suite, path = Humanoid(), str(obj(tmp_path / "block.obj", BLOCK, TRIANGLES))
    env = suite.make("stand", 1, 0, 1, foot_mesh=path)
    single = suite.render_env("stand", 0, foot_mesh=path)
    plain = suite.make("stand", 1, 0, 1)
    assert isinstance(single, HumanoidEnv)
    observations = [env.reset(seed=0)[0][0], single.reset(seed=0)[0], plain.reset(seed=0)[0][0]]
    np.testing.assert_array_equal(observations[0], observations[1])
    last, in_picture, without = (
        env.step(np.zeros((1, 19)))[0][0],
        single.step(np.zeros(19))[0],
        plain.step(np.zeros((1, 19)))[0][0],
    )
    np.testing.assert_array_equal(last, in_picture)
    assert (last != without).any()
    for each in (env, single, plain):
        each.close()


def test_a_file_that_changes_makes_another_model(tmp_path: Path) -> None:
    """Models are shared by what the file held, not by its name."""
    path = obj(tmp_path / "foot.obj", BLOCK, TRIANGLES)
    first = HumanoidVectorEnv("stand", 1, foot_mesh=path)
    second = HumanoidVectorEnv("walk", 1, foot_mesh=path)
    obj(path, BLOCK - [0, 0, 0.01], TRIANGLES)
    third = HumanoidVectorEnv("stand", 1, foot_mesh=path)
    assert first.model is second.model
    assert foot_corners(third.model, "left")[:, 2].min() == pytest.approx(-0.1)
    for env in (first, second, third):
        env.close()


ASCII = b"""solid foot
facet normal 0 0 1
outer loop
vertex 0 0 0
vertex 0.1 0 0
vertex 0 0.1 0
endloop
endfacet
endsolid foot
"""
FLAT = b"v 0 0 0\nv 0.1 0 0\nv 0 0.1 0\nv 0.1 0.1 0\nf 1 2 3\nf 2 4 3\n"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.stl", None, "no such file"),
        ("empty.stl", b"", ".*empty.*"),
        ("text.stl", b"no mesh\n", ".*"),
        ("ascii.stl", ASCII, ".*ASCII.*"),
        ("text.obj", b"no mesh\n", ".*vertices required.*"),
        ("flat.obj", FLAT, ".*"),
        ("nan.obj", FLAT.replace(b"0.1 0.1 0\n", b"nan 0 1\n"), ".*not finite.*"),
        ("foot.png", b"\x89PNG", ".*no decoder.*"),
        ("foot", b"\x89PNG", ".*no decoder.*"),
    ],
)
def test_what_is_no_mesh_is_refused_in_one_line(name: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=pattern(path, reason)):
        Humanoid().make("stand", 1, 0, 1, foot_mesh=str(path))


def test_what_is_no_file_or_no_foot_is_refused(tmp_path: Path) -> None:
    millimetres = obj(tmp_path / "mm.obj", 1000 * BLOCK, TRIANGLES)
    far = 1000 * (0.2**2 + 0.03**2 + 0.09**2) ** 0.5
    with pytest.raises(ConfigError, match=pattern(millimetres, re.escape(f"a corner is {far:.3g} m away"))):
        HumanoidVectorEnv("stand", 1, foot_mesh=millimetres)
    with pytest.raises(ConfigError, match=pattern(tmp_path, "no such file")):
        HumanoidEnv("stand", foot_mesh=tmp_path)
    with pytest.raises(ConfigError, match=r"\Afoot_mesh: 3 is not allowed; expected a mesh file of the foot"):
        read_foot_mesh(3)


def pattern(path: Path, reason: str) -> str:
    allowed = "a mesh file of the foot, binary STL or OBJ, in metres, within 0.5 m of the ankle"
    return rf"\A{re.escape(f'foot_mesh: {str(path)!r} is not allowed; expected {allowed}')} \({reason}\)\Z"
