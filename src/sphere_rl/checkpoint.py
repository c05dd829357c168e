"""Checkpoints: atomic, checksummed, loaded without running code.

``step-<global step>.pt`` holds a whole run; the last two are kept. ``task-<index>-<name>.pt`` holds the policy at the
end of a task; all are kept. A file is a line with the SHA-256 of the rest, then a PyTorch archive.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from sphere_rl.errors import RunFolderError
from sphere_rl.runs import RunFolder, write_atomic

KEPT = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that it is either whole or not there."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomic(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        RunFolderError: it is not there, or not what was written.
    """
    if not path.is_file():
        raise RunFolderError(f"{path}: no such checkpoint")
    digest, _, content = path.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise RunFolderError(f"{path}: broken checkpoint (its checksum does not fit)")
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


def save_run(folder: RunFolder, global_step: int, state: dict[str, Any]) -> None:
    """Write a run's checkpoint and remove all but the last two."""
    save(folder.checkpoints / f"step-{global_step:012d}.pt", state)
    for old in run_checkpoints(folder)[:-KEPT]:
        old.unlink()


def run_checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints that a run can be resumed from, oldest first."""
    return sorted(folder.checkpoints.glob("step-*.pt"))


def latest_run(folder: RunFolder) -> dict[str, Any] | None:
    """The newest whole checkpoint, or ``None`` where none was written yet.

    A broken one (a disk that lost data after the write) is passed over for the one before it.

    Raises:
        RunFolderError: there are checkpoints and every one is broken.
    """
    paths = run_checkpoints(folder)[::-1]
    for path in paths:
        try:
            return load(path)
        except RunFolderError as error:
            broken = error
    if paths:
        raise broken  # type: ignore[possibly-undefined]
    return None


def task_checkpoints(folder: RunFolder) -> list[Path]:
    """Policies at the ends of the tasks, in order."""
    return sorted(folder.checkpoints.glob("task-*.pt"))


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
        if path.is_file():
            return path
    known = ", ".join(p.stem for p in task_checkpoints(folder) + run_checkpoints(folder))
    raise RunFolderError(f"checkpoint: {name!r} is not in {folder.path}; expected latest or one of {known or 'none'}")
