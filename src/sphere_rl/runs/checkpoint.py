"""Checkpoints: atomic, checksummed, loaded without running code.

``step-<global step>.pt`` holds a whole run; the last two are kept. ``task-<index>-<name>.pt`` holds the policy at the
end of a task; all are kept. A file is a line with the SHA-256 of the rest, then a PyTorch archive.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from sphere_rl.errors import OutsideError, RunFolderError, described
from sphere_rl.runs import PACKAGE, RunFolder, versions, write_atomic, written
from sphere_rl.runs.records import content as read_content

KEPT = 2
CONTROL = re.compile(r"\x1b\[[\d;]*m|[\x00-\x1f\x7f-\x9f]")
"""What makes a terminal do anything but write; PyTorch's messages have some."""


PLAIN = (int, float, complex, str, bytes, bool, NoneType, torch.dtype, torch.device, torch.Size, Tensor, nn.Parameter)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that it is either whole or not there.

    Raises:
        OutsideError: the state holds what `load` could not read.
    """
    if found := unreadable(state):
        allowed = "tensors, numbers, strings, None, and dicts, lists, tuples and sets of them"
        raise OutsideError(f"{found}; allowed in a checkpoint: {allowed}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomic(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def unreadable(state: Any, where: str = "") -> str | None:
    """The first thing in a state that is of no kind that `load` reads, as "methods.mine.v is a numpy.float64".

    Kinds are compared for themselves: NumPy's float64 is a float of Python's, and is read by other means.
    """
    if type(state) in (dict, OrderedDict):
        parts = [(f"a key of {where or 'the state'}", key) for key in state]
        parts += [(f"{where}.{key}" if where else str(key), value) for key, value in state.items()]
    elif type(state) in (list, tuple, set):
        parts = [(f"{where}[{i}]", value) for i, value in enumerate(state)]
    elif type(state) in PLAIN:
        return None
    else:
        return f"{where or 'the state'} is a {type(state).__module__}.{type(state).__qualname__}"
    return next((found for name, value in parts if (found := unreadable(value, name))), None)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        RunFolderError: it is not there, or not what was written.
    """
    if not os.path.lexists(path):
        raise RunFolderError(f"{path}: no such checkpoint")
    digest, _, content = read_content(path).partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise RunFolderError(f"{path}: broken checkpoint (its checksum does not fit)")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception as error:  # whatever foreign bytes make the unpickler do
        reason = CONTROL.sub("", (str(error).strip() or type(error).__name__).splitlines()[0]).strip()
        raise RunFolderError(f"{path}: broken checkpoint ({reason})") from None
    if not isinstance(state, dict):
        raise RunFolderError(f"{path}: broken checkpoint (it holds a {type(state).__name__}, not a run's state)")
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Restore what `load` has read from ``path`` in here.

    Raises:
        RunFolderError: it is not the state of a run, or of one with another configuration.
    """
    try:
        yield
    except RunFolderError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason, origin = described(error, longest=200), _of_another_version(path)
        raise RunFolderError(f"{path}: does not fit the run's config.json ({reason}){origin}") from None


def _of_another_version(path: Path) -> str:
    """What to add of a run that another version of this package began, by its ``config.json``."""
    with suppress(RunFolderError):
        began = RunFolder(path.parents[1]).record()["versions"].get(PACKAGE)
        if began not in (None, versions().get(PACKAGE)):
            return f"; the run is of {PACKAGE} {began}"
    return ""


def save_run(folder: RunFolder, global_step: int, state: dict[str, Any]) -> None:
    """Write a run's checkpoint and remove all but the last two."""
    save(folder.checkpoints / f"step-{global_step:012d}.pt", state)
    for old in run_checkpoints(folder)[:-KEPT]:
        with written(old):
            old.unlink()


def run_checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints that a run can be resumed from, oldest first."""
    return sorted(folder.checkpoints.glob("step-*.pt"))


def newest_step(folder: RunFolder) -> int | None:
    """Environment steps at the newest checkpoint, by its name; ``None`` where none was written yet."""
    paths = run_checkpoints(folder)
    return int(paths[-1].stem.removeprefix("step-")) if paths else None


def newest(folder: RunFolder) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of the run and its state, or ``None`` where none was written yet.

    A broken one (a disk that lost data after the write) is passed over for the one before it.

    Raises:
        RunFolderError: there are checkpoints and every one is broken.
    """
    paths = run_checkpoints(folder)[::-1]
    for path in paths:
        try:
            found = path, load(path)
        except RunFolderError as error:
            broken = error
            continue
        if path != paths[0]:
            print(f"sphere: {broken}; the run goes on from {path.name}", file=sys.stderr)  # type: ignore[possibly-undefined]
        return found
    if paths:
        raise broken  # type: ignore[possibly-undefined]
    return None


def task_checkpoints(folder: RunFolder) -> list[Path]:
    """Policies at the ends of the tasks, in order."""
    found = {path: index for path in folder.checkpoints.glob("task-*.pt") if (index := task_index(path)) is not None}
    return sorted(found, key=lambda path: (found[path], path))


def task_index(path: Path) -> int | None:
    """The place in the sequence of the task whose end a checkpoint was written at; ``None`` for any other file."""
    found = re.match(r"task-(\d+)-", path.name)
    return int(found[1]) if found else None


def task_checkpoint(folder: RunFolder, index: int) -> Path | None:
    """The policy at the end of a task, or ``None`` where it is not over."""
    return next((path for path in task_checkpoints(folder) if task_index(path) == index), None)


def find(folder: RunFolder, name: str) -> Path:
    """A checkpoint by name: ``latest``, a file name with or without ``.pt``, or a path.

    Raises:
        RunFolderError: there is none.
    """
    if name == "latest":
        runs, tasks = run_checkpoints(folder), task_checkpoints(folder)
        if not runs and not tasks:
            raise RunFolderError(f"{folder.path}: no checkpoint yet")
        return runs[-1] if runs else tasks[-1]
    candidates = [folder.checkpoints / name, folder.checkpoints / f"{name}.pt", Path(name)]
    for path in candidates:
        if os.path.isfile(path):  # unlike Path's, False for a name that no file can have
            return path
    known = ", ".join(p.stem for p in task_checkpoints(folder) + run_checkpoints(folder))
    raise RunFolderError(f"checkpoint: {name!r} is not in {folder.path}; expected latest or one of {known or 'none'}")
