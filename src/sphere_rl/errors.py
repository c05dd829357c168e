"""The ways a run can go wrong: what its user asked for, and its training."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches


def meant(word: str, known: Iterable[str]) -> str:
    """A guess at what was meant by a word that is none of the known ones, in brackets; nothing where none is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


class ConfigError(ValueError):
    """One line that names the field, its value and what is allowed; the command line exits with 2."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        bits = value.bit_length() if isinstance(value, int) else 0  # Python writes none of thousands of digits
        shown = f"a number of {bits} bits" if bits > 1000 else repr(value)
        super().__init__(f"{field}: {shown} is not allowed; expected {allowed}")


class CommandLineError(ValueError):
    """What a parser of arguments says, already one line; the command line exits with 2."""


class MissingExtraError(CommandLineError, ImportError):
    """An extra or a library of the system is not installed: one line that says which; the command line exits with 2."""


class RunFolderError(ValueError):
    """A run folder that cannot be used as asked (missing, occupied, broken); the command line exits with 2."""


class NotFiniteError(ValueError):
    """What is to be measured holds a nan or an infinity, as everything does in a policy that has diverged."""

    def __init__(self, name: str, got: str, allowed: str) -> None:
        super().__init__(f"{name}: got {got} that is not finite, allowed: {allowed}")


class TrainingError(RuntimeError):
    """Training cannot go on (a NaN, a dead environment); the command line exits with 3 and status.json says why."""


class OutsideError(TrainingError):
    """A failure that going back to a checkpoint would not mend: it lies outside of the numbers that are trained."""


class EnvironmentFault(OutsideError):
    """An environment raised, hung, or gave something else than its spaces promise."""


class StorageError(OutsideError, OSError):
    """A file cannot be written: no room, a read-only disk, a folder that is gone. One line with path and reason."""

    @classmethod
    def of(cls, path: object, error: OSError) -> StorageError:
        """What to say of an error of the operating system at ``path``."""
        made = cls(f"{path}: cannot be written ({error.strerror or error})")
        made.errno = error.errno
        return made

    @property
    def of_the_disk(self) -> bool:
        """Whether the disk failed or has no room; else nothing can ever be written at that place."""
        return self.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def described(error: BaseException, longest: int = 300) -> str:
    """Kind and words of an error, in one line of bearable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= longest else f"{text[:longest]}…"
