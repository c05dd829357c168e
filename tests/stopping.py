"""Ends a run at a chosen line of its logs."""

from __future__ import annotations

from typing import Any


class Stopped(Exception):
    """Ends a run."""


class StopAfter:
    """A monitor that raises `Stopped` at so many rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def row(self, log: str, row: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise Stopped

    def close(self) -> None: ...
