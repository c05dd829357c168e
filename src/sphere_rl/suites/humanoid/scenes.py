"""The places a robot is put in, built from primitives: HumanoidBench's (Sferrazza et al., 2024), in metres."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's native members have no type stubs)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mujoco

GREY, WOOD, RED = (0.55, 0.58, 0.62, 1.0), (0.75, 0.6, 0.4, 1.0), (0.8, 0.35, 0.3, 1.0)
GLASS, HIDDEN = (0.6, 0.7, 0.8, 0.25), (0.0, 0.0, 0.0, 0.0)

BALL_RADIUS = 0.17
BOARD_HALF_SIZE = (0.15, 0.55, 0.03)
BOARD_HEIGHT = 2 * BALL_RADIUS + BOARD_HALF_SIZE[2]  # of its middle, where it rests on the ball
BOARD_TOP = BOARD_HEIGHT + BOARD_HALF_SIZE[2]


def add_visuals(spec: mujoco.MjSpec) -> None:
    """Sky, light, floor texture and a camera that follows the robot. None of it enters the physics."""
    import mujoco

    texture, builtin = mujoco.mjtTexture, mujoco.mjtBuiltin
    spec.add_texture(
        name="sky",
        type=texture.mjTEXTURE_SKYBOX,
        builtin=builtin.mjBUILTIN_GRADIENT,
        rgb1=[0.6, 0.75, 0.9],
        rgb2=[0.95, 0.97, 1.0],
        width=128,
        height=128,
    )
    spec.add_texture(
        name="checker",
        type=texture.mjTEXTURE_2D,
        builtin=builtin.mjBUILTIN_CHECKER,
        rgb1=[0.82, 0.84, 0.86],
        rgb2=[0.72, 0.75, 0.78],
        width=256,
        height=256,
    )
    material = spec.add_material(name="floor", texrepeat=[1.0, 1.0], texuniform=True)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "checker"
    # Menagerie's own light follows the robot and throws the shadow; this one fills the scene.
    directional = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    spec.worldbody.add_light(pos=[0.0, 0.0, 10.0], dir=[0.0, 0.0, -1.0], type=directional, castshadow=False)
    spec.visual.quality.shadowsize = 2048
    camera = spec.body("pelvis").add_camera(
        name="follow", pos=[2.0, 3.0, 0.8], mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACKCOM
    )
    camera.alt.type = mujoco.mjtOrientation.mjORIENTATION_XYAXES
    camera.alt.xyaxes = [-1.0, 0.6, 0.0, -0.1, -0.2, 1.0]
    spec.visual.global_.offwidth, spec.visual.global_.offheight = 1280, 960
    spec.worldbody.add_geom(name="floor", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[20.0, 20.0, 1.0], material="floor")


def flat(spec: mujoco.MjSpec) -> None:
    """Nothing but the floor, which every scene has."""


def poles(spec: mujoco.MjSpec) -> None:
    """41 rows of thin poles between walls. Reading `obstacle`: contacts of the poles."""
    import mujoco

    forest = spec.worldbody.add_body(name="poles")
    for row in range(1, 42):
        for y in (2.25, 0.75, -0.75, -2.25) if row % 2 else (1.5, 0.0, -1.5):
            cylinder = mujoco.mjtGeom.mjGEOM_CYLINDER
            forest.add_geom(type=cylinder, size=[0.05, 1.0, 0.0], pos=[row, y, 1.0], rgba=RED)
    for y in (3.15, -3.15):
        _box(spec.worldbody, (20.0, y, 1.0), (20.75, 0.15, 1.0), GLASS)
    _box(spec.worldbody, (-0.6, 0.0, 1.0), (0.15, 3.0, 1.0), GLASS)
    _count_contacts(spec, "obstacle", body="poles")


def ridges(spec: mujoco.MjSpec) -> None:
    """Nine slopes up and down, 1.75 m high and 10 m long, between walls.

    They are a body of their own, after the robot's: which of two meshes comes first decides their contact points.
    """
    import mujoco

    profile = ((0.3, 0.0), (5.3, 1.75), (10.3, 0.0))
    spec.add_mesh(name="ridge", uservert=[c for x, z in profile for y in (5.0, -5.0) for c in (x, y, z)])
    slopes = spec.worldbody.add_body(name="ridges")
    for shift in range(0, 90, 10):
        mesh = mujoco.mjtGeom.mjGEOM_MESH
        slopes.add_geom(type=mesh, meshname="ridge", pos=[shift, 0.0, 0.0], rgba=WOOD)
    for y in (5.15, -5.15):
        _box(spec.worldbody, (48.85, y, 4.0), (53.0, 0.15, 4.0), GLASS)
    _box(spec.worldbody, (-4.0, 0.0, 4.0), (0.15, 5.15, 4.0), GLASS)


def hurdles(spec: mujoco.MjSpec) -> None:
    """Ten hurdles, 0.375 m high and 7 m apart, between walls. Reading `obstacle`: contacts of the walls."""
    walls = spec.worldbody.add_body(name="walls")
    for y in (4.725, -4.725):
        _box(walls, (35.0, y, 1.0), (35.5, 0.275, 1.0), GLASS)
    _box(walls, (-0.525, 0.0, 1.0), (0.05, 5.0, 1.0), GLASS)
    for row in range(1, 11):
        _box(spec.worldbody, (7.0 * row, 0.0, 0.1875), (0.03, 5.0, 0.1875), RED)
    _count_contacts(spec, "obstacle", body="walls")


def tunnel(spec: mujoco.MjSpec) -> None:
    """A tunnel 16 m long, 2.3 m wide and 1.15 m high, from x = 2.2 on."""
    for y in (1.35, -1.35):
        _box(spec.worldbody, (10.2, y, 0.775), (8.0, 0.2, 0.775), GLASS)
    _box(spec.worldbody, (10.2, 0.0, 1.35), (8.0, 1.15, 0.2), GLASS)


def stairs(spec: mujoco.MjSpec) -> None:
    """Four flights of five steps up and down, 0.18 m high and 0.6 m deep, between walls."""
    for center in (3.2, 9.2, 15.2, 21.2):
        for step in range(5):
            _box(spec.worldbody, (center, 0.0, 0.09 + 0.18 * step), (2.7 - 0.6 * step, 5.0, 0.09), GREY)
    for y in (5.05, -5.05):
        _box(spec.worldbody, (13.5, y, 2.0), (15.5, 0.1, 2.0), GLASS)
    _box(spec.worldbody, (-2.1, 0.0, 2.0), (0.1, 7.25, 2.0), GLASS)


def chair(spec: mujoco.MjSpec) -> None:
    """A chair that stands fast. Reading `chair`: its position."""
    _add_chair(spec)


def loose_chair(spec: mujoco.MjSpec) -> None:
    """The same chair, free to move."""
    _add_chair(spec).add_freejoint()


def board(spec: mujoco.MjSpec) -> None:
    """A board on a fixed ball. Readings: contacts of `ball` and `floor`, of `ball_board` and of `ball_floor`."""
    _add_board(spec)


def loose_board(spec: mujoco.MjSpec) -> None:
    """The same board on a ball that rolls."""
    _add_board(spec).add_freejoint()


MAZE = """
#######
#.....#
###.#.#
#.....#
#.#.###
#.....#
#######
""".split()


def maze(spec: mujoco.MjSpec) -> None:
    """Blocks of 1.5 m, 1.2 m high; the robot starts at the lower left. Reading `obstacle`: contacts of the blocks."""
    blocks = spec.worldbody.add_body(name="maze", pos=[-1.5, -1.5, 0.6])
    for row, line in enumerate(reversed(MAZE)):
        for column, cell in enumerate(line):
            if cell == "#":
                _box(blocks, (1.5 * column, 1.5 * row, 0.0), (0.75, 0.75, 0.6), GLASS)
    _count_contacts(spec, "obstacle", body="maze")


def _add_chair(spec: mujoco.MjSpec) -> mujoco.MjsBody:
    import mujoco

    seat = spec.worldbody.add_body(name="chair", pos=[-0.25, 0.0, 0.0])
    _box(seat, (-0.23, 0.0, 0.65), (0.02, 0.21, 0.2), HIDDEN, density=0.0)
    _box(seat, (0.0, 0.0, 0.2375), (0.21, 0.21, 0.2375), HIDDEN, density=0.0)
    looks = [((x, y, 0.225), (0.02, 0.02, 0.225)) for x in (0.19, -0.19) for y in (0.19, -0.19)]
    looks += [((-0.23, y, 0.6375), (0.02, 0.02, 0.2125)) for y in (0.19, -0.19)]
    looks += [((0.0, 0.0, 0.45), (0.21, 0.21, 0.025)), ((-0.23, 0.0, 0.77), (0.02, 0.21, 0.08))]
    for position, half_size in looks:  # their wood is the chair's mass; what they collide as is the two boxes above
        _box(seat, position, half_size, WOOD, contype=0, conaffinity=0)
    frame = mujoco.mjtSensor.mjSENS_FRAMEPOS
    spec.add_sensor(name="chair", type=frame, objtype=mujoco.mjtObj.mjOBJ_XBODY, objname="chair")
    return seat


def _add_board(spec: mujoco.MjSpec) -> mujoco.MjsBody:
    """Returns the ball."""
    import mujoco

    plank = spec.worldbody.add_body(name="board", pos=[0.0, 0.0, BOARD_HEIGHT])
    plank.add_freejoint()
    _box(plank, (0.0, 0.0, 0.0), BOARD_HALF_SIZE, GREY, name="board")
    ball = spec.worldbody.add_body(name="ball", pos=[0.0, 0.0, BALL_RADIUS])
    ball.add_geom(name="ball", type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[BALL_RADIUS, 0.0, 0.0], rgba=RED)
    for name, geom, other in (
        ("ball", "ball", ""),
        ("floor", "floor", ""),
        ("ball_board", "ball", "board"),
        ("ball_floor", "ball", "floor"),
    ):
        _count_contacts(spec, name, geom=geom, other=other)
    return ball


def _box(
    body: mujoco.MjsBody, position: Sequence[float], half_size: Sequence[float], rgba: Sequence[float], **options: Any
) -> None:
    import mujoco

    body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=half_size, pos=position, rgba=rgba, **options)


def _count_contacts(spec: mujoco.MjSpec, name: str, *, body: str = "", geom: str = "", other: str = "") -> None:
    """A reading: how many contacts a body or a geom has, with anything or with one `other` geom."""
    import mujoco

    kind = mujoco.mjtObj
    spec.add_sensor(
        name=name,
        type=mujoco.mjtSensor.mjSENS_CONTACT,
        objtype=kind.mjOBJ_BODY if body else kind.mjOBJ_GEOM,
        objname=body or geom,
        reftype=kind.mjOBJ_GEOM if other else kind.mjOBJ_UNKNOWN,
        refname=other,
        intprm=[1 << mujoco.mjtConDataField.mjCONDATA_FOUND.value, 0, 1],
    )


SCENES: dict[str, Callable[[mujoco.MjSpec], None]] = {
    scene.__name__: scene
    for scene in (flat, poles, ridges, hurdles, tunnel, stairs, chair, loose_chair, board, loose_board, maze)
}
