"""A foot of the user's own: a mesh file in place of the built-in hull."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's native members have no type stubs)

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sphere_rl.errors import ConfigError

if TYPE_CHECKING:
    import mujoco

FARTHEST = 0.5
ALLOWED = f"a mesh file of the foot, binary STL or OBJ, in metres, within {FARTHEST} m of the ankle"


@dataclass(frozen=True)
class FootMesh:
    """What was read from a mesh file. Equal bytes make equal models, whatever becomes of the file."""

    file_name: str
    content: bytes

    def add_to(self, spec: mujoco.MjSpec) -> mujoco.MjsMesh:
        """The mesh as an asset of a model."""
        spec.assets = {**spec.assets, self.file_name: self.content}
        return spec.add_mesh(name="foot", file=self.file_name)


def read_foot_mesh(path: object) -> FootMesh:
    """Read a mesh in the frame of the ankle link: x forward, z up, the ankle's joint at the origin.

    What collides is its convex hull, under both feet alike. `path` is whatever a command line or a run's settings gave.

    Raises:
        ConfigError: not the path of a file that can be read, not a mesh, or not of a foot's size.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError("foot_mesh", path, ALLOWED)
    file = Path(path).expanduser()
    try:
        if not file.is_file():  # a device would never end
            raise FileNotFoundError("no such file")
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("foot_mesh", str(path), f"{ALLOWED} ({reason})") from error
    foot = FootMesh(f"foot{file.suffix.lower()}", content)
    _check(foot, str(path))
    return foot


def _check(foot: FootMesh, path: str) -> None:
    """Compile the mesh alone, so that what MuJoCo complains of is the mesh."""
    import mujoco

    spec = mujoco.MjSpec()
    foot.add_to(spec)
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="foot")
    try:
        model = spec.compile()
    except ValueError as error:
        reason = str(error).splitlines()[0].removeprefix("Error: ")
        raise ConfigError("foot_mesh", path, f"{ALLOWED} ({reason})") from error
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    corners = data.geom_xpos[0] + model.mesh_vert @ data.geom_xmat[0].reshape(3, 3).T
    farthest = (corners**2).sum(axis=1).max() ** 0.5
    if farthest > FARTHEST:
        raise ConfigError("foot_mesh", path, f"{ALLOWED} (a corner is {farthest:.3g} m away)")
