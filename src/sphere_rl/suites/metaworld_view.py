"""One MetaWorld environment with pictures, drawn by EnvPool."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import gymnasium
import numpy as np

from sphere_rl.errors import ConfigError


class MetaWorldView(gymnasium.Env):
    """One environment, 12.5 ms a step, without autoreset."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012

    def __init__(self, environment_id: str, seed: int, width: int = 480, height: int = 360) -> None:
        _load_egl()
        import envpool

        size = {"render_width": width, "render_height": height}
        self._pool = envpool.make_gymnasium(
            environment_id, num_envs=1, seed=seed, partially_observable=False, render_mode="rgb_array", **size
        )
        self.observation_space, self.action_space = self._pool.observation_space, self._pool.action_space
        self.render_mode = "rgb_array"

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


def _load_egl() -> None:
    """EnvPool's MuJoCo looks for OpenGL among the libraries that are loaded, and ends the process if there is none."""
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ConfigError("out", "a video", f"a machine with EGL: install libegl1 ({error})") from None
