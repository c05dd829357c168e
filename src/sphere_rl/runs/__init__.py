"""The run folder: what a run writes, and how others read it.

``config.json`` frozen configuration and versions · ``status.json`` where the run stands · ``train.jsonl``,
``eval.jsonl``, ``spectrum.jsonl`` one object a line · ``checkpoints/`` · ``tb/``.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from sphere_rl.errors import RunFolderError, StorageError
from sphere_rl.runs.records import MAYBE_TEXT, OBJECT, ORIGINS, STATUS, TEXTS, content, read_object, read_row

LOGS = ("train", "eval", "spectrum")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a crash at any byte leaves the old or the new content, never a mixture.

    Raises:
        StorageError: it cannot be written; the old one is as it was, and what was begun takes no room.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with written(path):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Write ``path`` in here; what the operating system refuses is a `StorageError` that names it."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.of(path, error) from error


def make_folder(path: Path) -> None:
    """Make a folder and those that it lies in, where there is none.

    Raises:
        StorageError: it cannot be made.
    """
    with written(path):
        path.mkdir(parents=True, exist_ok=True)


def file_name(text: str) -> str:
    """A name of a task or run as one of a file: every character that means something in paths becomes ``_``."""
    return re.sub(r"[^\w.,=+-]", "_", text)


def lock_of(path: Path, patience: float) -> FileLock:
    """The lock of a folder: the kernel's or none, not the mark in a file that filelock 4 takes where there are none."""
    kernels: dict[str, Any] = (
        {"fallback_to_soft": False} if "fallback_to_soft" in inspect.signature(FileLock).parameters else {}
    )
    return FileLock(path / ".lock", timeout=patience, **kernels)


PATIENCE = 1.0
"""Seconds to wait for a lock: whoever asks `RunFolder.in_use` holds it for a moment."""


class RunFolder:
    """One run's folder, locked for writing while used as a context manager, which waits for so many seconds."""

    def __init__(self, path: Path | str, patience: float = PATIENCE) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock = lock_of(self.path, patience)

    @classmethod
    def existing(cls, path: Path | str) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            RunFolderError: there is no run.
        """
        folder = cls(path)
        try:
            there = folder.config_path.exists()
        except OSError as error:
            raise RunFolderError(f"{path}: cannot be read ({error.strerror})") from None
        if not there:
            raise RunFolderError(f"{path}: not a run folder; expected one with a config.json")
        return folder

    @property
    def config_path(self) -> Path:
        """``config.json``."""
        return self.path / "config.json"

    def create(self, config: Mapping[str, Any], origin: Mapping[str, Any] | None = None) -> None:
        """Write ``config.json``; the folder must not hold anything yet. ``origin``: other versions and commit.

        Raises:
            RunFolderError: as `check_vacant`.
        """
        self.check_vacant()
        origin = origin or {"versions": versions(), "commit": commit()}
        with written(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)
        write_atomic(self.config_path, _json({"config": config, **origin}))

    def check_vacant(self) -> None:
        """Raise `RunFolderError` where the folder cannot be read, or has a run or other files in it."""
        try:
            self._check_vacant()
        except FileNotFoundError:
            return
        except RunFolderError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise RunFolderError(f"{self.path}: cannot be written ({getattr(error, 'strerror', error)})") from None

    def _check_vacant(self) -> None:
        if self.config_path.exists():
            raise RunFolderError(f"{self.path}: holds a run already; continue it with: sphere resume {self.path}")
        others = {item.name for item in self.path.iterdir()} - {".lock", ".config.json.tmp"}
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):  # ended before it had a configuration
            others.discard(self.checkpoints.name)
        if others:
            raise RunFolderError(f"{self.path}: not empty (holds {sorted(others)[0]}); expected a new or empty folder")

    def __enter__(self) -> RunFolder:
        """Lock the folder, making it if there is none.

        Raises:
            RunFolderError: another process writes to it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise RunFolderError(f"{self.path}: another process is using this run folder") from None
        except (NotImplementedError, OSError) as error:
            reason = f"cannot be written ({getattr(error, 'strerror', None) or error})"
            if isinstance(error, NotImplementedError) or error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                reason = "cannot be locked (its file system has no locks)"
            raise RunFolderError(f"{self.path}: {reason}") from None
        return self

    @property
    def in_use(self) -> bool:
        """Whether another process holds the lock: it trains the run now. One that has died holds none."""
        if not (self.path / ".lock").is_file():
            return False
        try:
            with lock_of(self.path, 0.0):
                return False
        except Timeout:
            return True
        except (OSError, NotImplementedError):  # it cannot be written or locked: nobody holds it
            return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def record(self) -> dict[str, Any]:
        """``config.json``: the configuration as plain data, versions and commit.

        Raises:
            RunFolderError: as all readers here, in one line with the file's name, where it is not what a run writes.
        """
        return {"versions": {}, "commit": None} | self._record()

    def config(self) -> dict[str, Any]:
        """The run's configuration as plain data."""
        return self.record()["config"]

    def status(self) -> dict[str, Any]:
        """State (running, finished, failed, interrupted), global_step, task and error; empty before the first.

        ``rollbacks`` is there where there were some: what the run went back to a checkpoint for, each time.
        """
        path = self.path / "status.json"
        return read_object(path, STATUS, ("state",)) if os.path.lexists(path) else {}

    def set_status(
        self, state: str, global_step: int, task: str, error: str | None = None, rollbacks: Sequence[str] = ()
    ) -> None:
        """Replace ``status.json``."""
        data: dict[str, Any] = {"state": state, "global_step": global_step, "task": task, "error": error}
        if rollbacks:
            data["rollbacks"] = list(rollbacks)
        write_atomic(self.path / "status.json", _json(data))

    def interrupt(self) -> None:
        """Say of a run whose status is that it is running that it is not, where it was interrupted elsewhere."""
        status = self.status()
        if status.get("state") == "running":
            write_atomic(self.path / "status.json", _json(status | {"state": "interrupted"}))

    def tell_changes(self) -> None:
        """Say on standard error which versions and commit are others than when the run began, or last went on.

        ``config.json`` keeps it, in the list ``continued``, which only such runs have.
        """
        record = self.record()
        before = {"commit": None} | [record, *record.get("continued", ())][-1]
        now: dict[str, Any] = {"versions": versions(), "commit": commit()}
        names = dict.fromkeys([*before["versions"], *now["versions"]]) if before["versions"] else {}
        pairs: dict[str, tuple[Any, Any]] = {
            name: (before["versions"].get(name), now["versions"].get(name)) for name in names
        }
        if before["commit"]:
            pairs["commit"] = before["commit"], now.get("commit")
        changed = [
            f"{name} {new or 'unknown'} (was {old or 'unknown'})" for name, (old, new) in pairs.items() if old != new
        ]
        if changed:
            write_atomic(self.config_path, _json(record | {"continued": [*record.get("continued", ()), now]}))
            print(f"sphere: {self.path} goes on with {', '.join(changed)}", file=sys.stderr)

    def read(self, log: str, needed: Iterable[str] = (), length: int | None = None) -> list[dict[str, Any]]:
        """All whole lines of a log; a last line that is still being written is left out.

        Args:
            log: one of `LOGS`.
            needed: columns that every line must have.
            length: bytes to read; all of them by default.

        Raises:
            RunFolderError: a line is not a JSON object, or has a column of another kind than a run writes.
        """
        path, needed = self._log_path(log), tuple(needed)
        lines = self._log_content(log)[:length].split(b"\n")[:-1] if os.path.lexists(path) else []
        return [read_row(f"{path}, line {i}", line, log, needed) for i, line in enumerate(lines, 1)]

    def check_log(self, log: str, length: int) -> None:
        """Raise `RunFolderError` unless the first ``length`` bytes of a log are whole lines as a run writes them."""
        path = self._log_path(log)
        data = content(path)[:length] if os.path.lexists(path) else b""
        if len(data) < length or (data and not data.endswith(b"\n")):
            raise RunFolderError(f"{path}: has lost lines that it had when the newest checkpoint was written")
        self.read(log, length=length)

    def _record(self) -> dict[str, Any]:
        return read_object(
            self.config_path,
            {"config": OBJECT, "versions": OBJECT, "commit": MAYBE_TEXT, "continued": ORIGINS},
            ("config",),
        )

    def _log_path(self, log: str) -> Path:
        return self.path / f"{log}.jsonl"

    def _log_content(self, log: str) -> bytes:
        return content(self._log_path(log))


def read_sweep(root: Path) -> dict[str, Any]:
    """``sweep.json`` of a folder of runs: its commands and the names of the runs that were planned.

    Raises:
        RunFolderError: it is there, and not what a sweep writes.
    """
    path, names = root / "sweep.json", ("commands", "runs")
    return read_object(path, dict.fromkeys(names, TEXTS), names) if os.path.lexists(path) else {}


class Logs:
    """The append-only logs of a running run, with their lengths as part of its checkpoints."""

    def __init__(self, folder: RunFolder, lengths: Mapping[str, int]) -> None:
        """Open the logs, cut to the lengths of a checkpoint: lines after it will be written again.

        Raises:
            RunFolderError: a log has lost, or never had, what it held when the checkpoint was written.
        """
        for log in LOGS:  # before any of them is touched
            folder.check_log(log, lengths.get(log, 0))
        self._files: dict[str, BufferedWriter] = {}
        for log in LOGS:
            path = folder.path / f"{log}.jsonl"
            with written(path):
                file = self._files[log] = path.open("ab")
                file.truncate(lengths.get(log, 0))

    def append(self, log: str, row: Mapping[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        file, line = self._files[log], json.dumps(row, allow_nan=False).encode() + b"\n"
        with written(Path(file.name)):
            file.write(line)
            file.flush()

    def lengths(self) -> dict[str, int]:
        """Bytes of each log, all of them on disk."""
        for file in self._files.values():
            with written(Path(file.name)):
                os.fsync(file.fileno())
        return {log: os.fstat(file.fileno()).st_size for log, file in self._files.items()}

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            with written(Path(file.name)):
                file.close()


PACKAGE = "sphere-rl"
"""This one's name where versions are kept."""


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on."""
    found = {}
    for name in (PACKAGE, "torch", "numpy", "gymnasium", "envpool", "mujoco"):
        with suppress(PackageNotFoundError):  # of a suite that is not in use
            found[name] = version(name)
    return found


def commit() -> str | None:
    """The source commit, where this file is one of a git checkout's own and not merely installed inside one."""
    here = Path(__file__)
    known = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    return _git(here.parent, "rev-parse", "HEAD") if known else None


def _git(place: Path, *words: str) -> str | None:
    """What git says there; nothing where it fails or there is no git."""
    try:
        said = subprocess.run(["git", "-C", place, *words], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()
