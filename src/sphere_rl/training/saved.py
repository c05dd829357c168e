"""The configuration of a run as its folder holds it, checked before anyone computes with it."""

from __future__ import annotations

from sphere_rl.config import TrainConfig, from_dict
from sphere_rl.errors import RunFolderError
from sphere_rl.runs import RunFolder

NAMING = ("suite", "tasks", "protocol", "actor", "method", "seed")
"""Fields that the configuration of every run has, whatever version wrote it."""


def config_of(folder: RunFolder) -> TrainConfig:
    """The configuration of a run, of this version or an earlier one.

    Raises:
        RunFolderError: config.json is not a run's, or has values that are not allowed here; one line with its name.
    """
    config = folder.config()
    if missing := [name for name in NAMING if name not in config]:
        raise RunFolderError(f"{folder.config_path}: its config has no {missing[0]}")
    try:
        made = from_dict(config)
        _ = made.task_sequence
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise RunFolderError(f"{folder.config_path}: {' '.join(str(error).split())}") from None
    return made
