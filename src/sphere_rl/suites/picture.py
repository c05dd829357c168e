"""How an environment is drawn: the size of its frames, and what they may cost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sphere_rl.errors import ConfigError

MAX_SIDE = 4096


@dataclass(frozen=True)
class Picture:
    """Size and quality of frames."""

    width: int = 480
    height: int = 360
    fine: bool = False
    """Shadows, reflections and smooth edges: about ten times the work where the processor draws."""

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            if not 16 <= side <= MAX_SIDE:
                raise ConfigError("size", f"{self.width}x{self.height}", f"16 to {MAX_SIDE} pixels a side")


def is_headless() -> bool:
    """Whether MuJoCo, left alone, would open a window though there is no display."""
    return sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("MUJOCO_GL")


@contextmanager
def offscreen() -> Iterator[None]:
    """In here MuJoCo environments of others draw with EGL where there is no display and nothing else is said."""
    if not is_headless():
        yield
        return
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "egl"  # not for longer: MuJoCo reads it when it is imported, too, and then insists on EGL
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]
        if before is not None:
            os.environ["MUJOCO_GL"] = before


@runtime_checkable
class Drawable(Protocol):
    """An environment whose frames can be chosen; the suites' own are, Gymnasium's have a fixed size."""

    def draw_as(self, picture: Picture) -> None:
        """Choose the frames; before the first reset."""
        ...
