"""Ends a run at a chosen line of its logs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sphere_rl import protocol
from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.runs import RunFolder


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


def train_in_pieces(settings: TrainConfig, path: Path) -> tuple[RunFolder, int]:
    """A run that is stopped at its first row, then at the second after that, and so on, to its end; how often begun."""
    begun = 0
    with RunFolder(path) as folder:
        folder.create(to_dict(settings))
        while folder.status().get("state") != "finished":
            begun += 1
            with contextlib.suppress(Stopped):
                protocol.resume(folder, lambda step, rows=begun: [StopAfter(rows)])
    return folder, begun
