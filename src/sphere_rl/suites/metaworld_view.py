"""One MetaWorld environment with pictures, drawn by EnvPool."""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from sphere_rl.errors import MissingExtraError
from sphere_rl.suites.picture import Picture
from sphere_rl.suites.remade import make_pool

SCENES = Path("mujoco", "metaworld")
"""MetaWorld's scenes inside the folder of EnvPool's assets."""


class MetaWorldView(gymnasium.Env):
    """One environment, 12.5 ms a step, without autoreset; with ``anew`` it is made anew for each episode."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012

    def __init__(self, environment_id: str, seed: int, anew: bool) -> None:
        load_egl()
        self._id, self._seed, self._anew = environment_id, seed, anew
        self._scenes = TemporaryDirectory(prefix="sphere-")
        self._pool = self._make(Picture())
        self.observation_space, self.action_space = self._pool.observation_space, self._pool.action_space
        self.render_mode = "rgb_array"
        self.spec = EnvSpec(environment_id, max_episode_steps=self._pool.config["max_episode_steps"])

    def _make(self, picture: Picture) -> Any:
        options: dict[str, Any] = {"render_width": picture.width, "render_height": picture.height}
        if not picture.fine:
            import envpool

            assets = Path(envpool.make_spec(self._id).config.base_path)
            options["base_path"] = _plain_scenes(assets, Path(self._scenes.name))
        return make_pool(self._id, self._seed, self._anew, num_envs=1, render_mode="rgb_array", **options)

    def draw_as(self, picture: Picture) -> None:
        """Choose the frames; before the first reset, for the environment is made anew."""
        self._pool.close()
        self._pool = self._make(picture)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode. The seed is the constructor's: EnvPool cannot be reseeded."""
        if seed is not None:
            raise ValueError(f"seed: {seed!r} cannot be set at reset; EnvPool takes it when it is made")
        return self._pool.reset()[0][0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Step; after an episode's end, reset first."""
        batch = np.asarray(action, dtype=np.float32)[None]
        observation, reward, terminated, truncated, info = self._pool.step(batch)
        own = {"success": info["success"][0]}
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), own

    def render(self) -> Any:
        """The scene from MetaWorld's own camera, uint8 [height, width, 3]."""
        frames: Any = self._pool.render()
        return frames[0]

    def close(self) -> None:
        """Stop EnvPool's thread."""
        self._pool.close()
        self._scenes.cleanup()


def _plain_scenes(assets: Path, copy: Path) -> str:
    """Copy MetaWorld's scenes without shadows, reflections and multisampling, and return the copy's path.

    EnvPool draws as the scene's file says: without a graphics card nine tenths of the time go into a shadow map of
    4096² pixels and four samples a pixel. None of this enters the physics.
    """
    if not (copy / SCENES).exists():
        shutil.copytree(assets / SCENES, copy / SCENES)
        for path in (copy / SCENES).rglob("*.xml"):
            scene = path.read_text(encoding="utf-8")
            scene = re.sub(r"<quality\b[^>]*>", '<quality shadowsize="0" offsamples="0"/>', scene)
            path.write_text(re.sub(r'\breflectance\s*=\s*"[^"]*"', "", scene), encoding="utf-8")
    return str(copy)


def load_egl() -> None:
    """EnvPool's MuJoCo looks for OpenGL among the libraries that are loaded, and ends the process if there is none."""
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MissingExtraError(f"MetaWorld is drawn with EGL, which is not here: install libegl1 ({error})") from None
