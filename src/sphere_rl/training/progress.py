"""Where a run stands, as its checkpoints hold it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run stands; ``iteration`` and ``segment`` count within the task."""

    task_index: int = 0
    iteration: int = 0
    segment: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class Due:
    """An evaluation to be made: its phase, and where on which task."""

    phase: str
    task_index: int
    task_step: int
