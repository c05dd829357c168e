"""The ways a run can go wrong: what its user asked for, and its training."""

from __future__ import annotations


class ConfigError(ValueError):
    """One line that names the field, its value and what is allowed; the command line exits with 2."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}: {value!r} is not allowed; expected {allowed}")


class CommandLineError(ValueError):
    """What a parser of arguments says, already one line; the command line exits with 2."""


class MissingExtraError(CommandLineError, ImportError):
    """One of the package's extras is not installed: one line that says which; the command line exits with 2."""


class RunFolderError(ValueError):
    """A run folder that cannot be used as asked (missing, occupied, broken); the command line exits with 2."""


class TrainingError(RuntimeError):
    """Training cannot go on (a NaN, a dead environment); the command line exits with 3 and status.json says why."""
