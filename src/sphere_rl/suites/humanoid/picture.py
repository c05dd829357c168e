"""Offscreen pictures of a model."""

# pyright: reportAttributeAccessIssue=false
# (MuJoCo's native members have no type stubs)

from __future__ import annotations

import os
from copy import copy
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float, UInt8

from sphere_rl.errors import ConfigError
from sphere_rl.suites.picture import Picture, is_headless

REMEDY = "a working OpenGL library: install libegl1 (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa)"


def _graphics(model: mujoco.MjModel, width: int, height: int) -> tuple[Any, Any]:
    """An OpenGL context and MuJoCo's resources in it.

    The context is MuJoCo's own choice, but EGL on a Linux machine without a display: MuJoCo would open a window there.
    """
    try:
        if is_headless():
            from mujoco.egl import GLContext
        else:
            from mujoco import GLContext
        context = GLContext(width, height)
        context.make_current()
        resources = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
    except Exception as error:  # each backend fails in its own way, some with a context that is none
        raise ConfigError("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""), f"{REMEDY} ({error})") from error
    return context, resources


def _as_drawn(model: mujoco.MjModel, picture: Picture) -> mujoco.MjModel:
    """A copy with room for the frame, and no shadow map and multisampling unless the frame is to be fine."""
    model = copy(model)
    model.vis.global_.offwidth, model.vis.global_.offheight = picture.width, picture.height
    if not picture.fine:
        model.vis.quality.shadowsize = model.vis.quality.offsamples = 0
    return model


class Camera:
    """The scene through the model's camera `follow`."""

    def __init__(self, model: mujoco.MjModel, picture: Picture) -> None:
        model = _as_drawn(model, picture)
        self._model, self._width, self._height = model, picture.width, picture.height
        self._context, self._resources = _graphics(model, self._width, self._height)
        self._data = mujoco.MjData(model)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + 100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._resources)
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view.fixedcamid = model.camera("follow").id

    def picture(self, qpos: Float[np.ndarray, "Q"]) -> UInt8[np.ndarray, "height width 3"]:
        """The model in a given position."""
        self._context.make_current()
        self._data.qpos[:] = qpos
        mujoco.mj_forward(self._model, self._data)
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        options = mujoco.MjvOption()
        mujoco.mjv_updateScene(self._model, self._data, options, None, self._view, everything, self._scene)
        frame = mujoco.MjrRect(0, 0, self._width, self._height)
        mujoco.mjr_render(frame, self._scene, self._resources)
        pixels = np.zeros((self._height, self._width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, frame, self._resources)
        return np.ascontiguousarray(pixels[::-1])

    def close(self) -> None:
        """Free the graphics memory."""
        self._resources.free()
        self._context.free()
