"""What the files of a run folder must hold to be read: JSON objects with columns of known kinds.

Readers of run folders meet files that no run of this library wrote: damaged by a disk, edited, or of another program.
Every such file is refused here in one line that names it, so that nobody computes with what it seems to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, NoReturn

from sphere_rl.errors import RunFolderError

STATES = ("running", "finished", "failed", "interrupted")
WHOLE, NUMBER, MAYBE_WHOLE, MAYBE, TEXT, MAYBE_TEXT, STATE, TEXTS, OBJECT, ORIGINS, NUMBERS, ANY = (
    "a whole number", "a number", "a whole number or null", "a number or null", "text", "text or null",
    f"one of {', '.join(STATES)}", "a list of texts", "an object", "a list of objects with versions and commit",
    "a list of numbers or null", "a number, a list of numbers or null",
)  # fmt: skip
PLACE = {"global_step": WHOLE, "task_index": WHOLE, "task": TEXT, "task_step": WHOLE}
SCORES = dict.fromkeys(("success_final", "success_once", "mean_return", "std_return", "mean_length"), MAYBE)
STATUS = {
    "state": STATE, "global_step": WHOLE, "task": MAYBE_TEXT, "error": MAYBE_TEXT, "rollbacks": TEXTS,
}  # fmt: skip
"""What ``status.json`` holds, and its kinds."""
LOG_COLUMNS: dict[str, dict[str, str]] = {
    "train": PLACE | {"iteration": WHOLE, "steps_per_second": NUMBER},
    "eval": PLACE | {"phase": TEXT, "episodes": WHOLE} | SCORES,
    "spectrum": PLACE | {"batch": TEXT},
}
"""Columns that every line of a log has, and their kinds."""
SOME_COLUMNS: dict[str, dict[str, str]] = {
    "train": dict.fromkeys(("learning_rate", "policy_loss", "value_loss"), MAYBE)
    | {"episodes": MAYBE_WHOLE, "rollbacks": WHOLE}
    | SCORES,
    "eval": {},
    "spectrum": dict.fromkeys(("r_e_K", "r_e_A", "gate_entropy"), MAYBE)
    | {"feature_rank": MAYBE_WHOLE, "expert_load": NUMBERS},
}
"""Columns that some lines have, and their kinds, on which tables rely; all others are of the kind `ANY`."""


def content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        RunFolderError: it is not there, is no file, or must not be read.
    """
    try:
        if not path.is_dir() and not S_ISREG(path.stat().st_mode):  # a pipe or a device may have no end
            raise RunFolderError(f"{path}: is not a file")
        return path.read_bytes()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror})") from None


def read_object(path: Path, kinds: Mapping[str, str], needed: Iterable[str] = ()) -> dict[str, Any]:
    """A file that is one JSON object.

    Raises:
        RunFolderError: it cannot be read, is not a JSON object, lacks a ``needed`` key, or has one of another kind.
    """
    data = parse_object(str(path), content(path))
    check_kinds(str(path), data, kinds, needed)
    return data


def read_row(where: str, line: bytes, log: str, needed: Iterable[str]) -> dict[str, Any]:
    """A line of a log; ``where`` names file and line.

    Raises:
        RunFolderError: as `read_object`.
    """
    row = parse_object(where, line)
    check_kinds(where, row, dict.fromkeys(row, ANY) | SOME_COLUMNS[log] | LOG_COLUMNS[log], needed)
    return row


def parse_object(where: str, text: bytes) -> dict[str, Any]:
    """A JSON object; NaN and Infinity are not JSON.

    Raises:
        RunFolderError: it is something else.
    """
    try:
        data = json.loads(text.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise RunFolderError(f"{where}: is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{where}: is not JSON ({error})") from None
    if not isinstance(data, dict):
        raise RunFolderError(f"{where}: is not a JSON object but {_shown(data)}")
    return data


def check_kinds(where: str, data: Mapping[str, Any], kinds: Mapping[str, str], needed: Iterable[str]) -> None:
    """Raise `RunFolderError` where a needed key is missing, or one that is there is of another kind."""
    for name in needed:
        if name not in data:
            raise RunFolderError(f"{where}: has no {name}")
    for name, kind in kinds.items():
        if name in data and not CHECKS[kind](data[name]):
            raise RunFolderError(f"{where}: {name} is {_shown(data[name])}, not {kind}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_number, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _origin(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("versions"), dict) and CHECKS[MAYBE_TEXT](value.get("commit"))
    )


CHECKS: dict[str, Callable[[Any], bool]] = {
    WHOLE: _whole,
    NUMBER: _number,
    MAYBE_WHOLE: lambda value: value is None or _whole(value),
    MAYBE: lambda value: value is None or _number(value),
    TEXT: _text,
    MAYBE_TEXT: lambda value: value is None or _text(value),
    STATE: lambda value: _text(value) and value in STATES,
    TEXTS: lambda value: isinstance(value, list) and all(map(_text, value)),
    OBJECT: lambda value: isinstance(value, dict),
    ORIGINS: lambda value: isinstance(value, list) and all(map(_origin, value)),
    NUMBERS: lambda value: value is None or _numbers(value),
    ANY: lambda value: value is None or _number(value) or _numbers(value),
}
"""Whether a value is of a kind."""
