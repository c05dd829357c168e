"""How an environment is drawn: the size of its frames, and what they may cost."""

from __future__ import annotations

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


@runtime_checkable
class Drawable(Protocol):
    """An environment whose frames can be chosen; the suites' own are, Gymnasium's have a fixed size."""

    def draw_as(self, picture: Picture) -> None:
        """Choose the frames; before the first reset."""
        ...
