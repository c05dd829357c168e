"""Where a run stands, as its checkpoints hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sphere_rl.config import TrainConfig
from sphere_rl.learner.actor_critic import Spaces


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


Record = TypeVar("Record", Progress, Due, Spaces)


def record_of(kind: type[Record], saved: Any) -> Record:
    """A record of a checkpoint, with values of the kinds that it says.

    Raises:
        TypeError: another kind, or another set of fields.
    """
    made = kind(**saved)
    for name, hint in get_type_hints(kind).items():
        value = getattr(made, name)
        several = value if get_origin(hint) is tuple and isinstance(value, tuple) else (value,)
        if not all(type(item) is (get_args(hint) or (hint,))[0] for item in several):
            raise TypeError(f"{name} is {str(value)[:40]!r}, not of type {hint if get_args(hint) else hint.__name__}")
    return made


def progress_of(saved: Any, config: TrainConfig) -> Progress:
    """Where a checkpoint's run stands.

    Raises:
        TypeError: as `record_of`.
        ValueError: it is a place that a run of this configuration never comes to.
    """
    made, tasks = record_of(Progress, saved), len(config.task_sequence)
    longest = config.iterations_per_task if made.task_index < tasks else 1
    if not (
        0 <= made.task_index <= tasks and 0 <= made.iteration < longest and min(made.segment, made.global_step) >= 0
    ):
        raise ValueError(f"{made} is none of its places")
    return made
