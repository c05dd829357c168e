"""Disks that are full, read-only or gone: one line with path and reason, and nothing that was there is lost.

A small tmpfs is mounted where this process may do so; elsewhere ``/dev/full``, which has no room ever, stands for it. A
quota is that of a Btrfs in a file, where there are its tools.
"""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import run_difference
from killing import SERVER, resume_alone
from rich.console import Console
from toy_runs import WORDS, config, train

from sphere_rl import protocol
from sphere_rl.cli import main
from sphere_rl.config import to_dict
from sphere_rl.errors import StorageError
from sphere_rl.runs import LOGS, RunFolder, checkpoint, write_atomic
from sphere_rl.training.display import Bars

TASK = ("--tasks", "toy_envs:Drawing-v0")


def mount(*words: str) -> None:
    if subprocess.run(["mount", *words], capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path))
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False)


@pytest.fixture
def quota(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk with room, of which 4 MB may be used."""
    if not shutil.which("mkfs.btrfs"):
        pytest.skip("there is no mkfs.btrfs")
    image, path = tmp_path / "image", tmp_path / "quota"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(128 * 2**20)
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], check=True, stdout=subprocess.DEVNULL)
    mount("-o", "loop", str(image), str(path))
    try:
        btrfs("quota", "enable", path)
        btrfs("qgroup", "limit", "4M", path)
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=False)


def btrfs(*words: str | Path) -> None:
    subprocess.run(["btrfs", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


class Do:
    """Calls ``action`` after a row."""

    def __init__(self, row: int, action: Callable[[], object]) -> None:
        self.left, self.action = row, action

    def row(self, log: str, row: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            self.action()

    def close(self) -> None: ...


def started(path: Path, **changes: Any) -> RunFolder:
    folder = RunFolder(path)
    with folder:
        folder.create(to_dict(config("Drawing", steps_per_task=256, **changes)))
    return folder


def resume_and(folder: RunFolder, row: int, action: Callable[[], object]) -> None:
    with folder:
        protocol.resume(folder, lambda step: [Do(row, action)])


def fill(disk: Path, leave: int = 0) -> None:
    with (disk / "filler").open("wb") as file:
        free = os.statvfs(disk)
        file.write(b"x" * (free.f_bavail * free.f_frsize - leave))


# Full


def test_a_full_disk_stops_the_run_in_one_line_and_room_lets_it_go_on(disk: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with RunFolder(whole) as run:
        run.create(to_dict(config("Drawing", steps_per_task=256)))
        protocol.resume(run, lambda step: [])
    folder = started(disk / "run")
    with pytest.raises(StorageError) as raised:
        resume_and(folder, 5, lambda: fill(disk))
    assert str(raised.value).startswith(f"{disk}/run/")
    assert str(raised.value).endswith(": cannot be written (No space left on device)")
    assert "\n" not in str(raised.value)
    kept = checkpoint.run_checkpoints(folder)
    assert [path.stem for path in kept] == ["step-000000000096", "step-000000000128"]
    assert all(checkpoint.load(path) for path in kept)
    assert not list(folder.path.rglob(".*.tmp"))  # what was begun takes no room
    for log in LOGS:
        folder.read(log)
    (disk / "filler").unlink()
    resume_and(folder, 10**6, lambda: None)
    assert run_difference(RunFolder(whole), folder) is None


def test_a_quota_that_is_used_up_stops_the_run_in_one_line_and_room_lets_it_go_on(quota: Path, tmp_path: Path) -> None:
    def use_up() -> None:
        with (quota / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(os.urandom(4096))

    folder = started(quota / "run")
    with pytest.raises(StorageError, match=rf"^{quota}/run/\S+: cannot be written \(Disk quota exceeded\)$"):
        resume_and(folder, 5, use_up)
    assert checkpoint.newest(folder) is not None
    (quota / "filler").unlink()
    btrfs("filesystem", "sync", quota)
    resume_and(folder, 10**6, lambda: None)
    whole = started(tmp_path / "whole")
    resume_and(whole, 10**6, lambda: None)
    assert run_difference(whole, folder) is None


def test_a_limit_of_a_file_is_said_as_that(tmp_path: Path) -> None:
    """As `ulimit -f` sets it: no file may have more than 64 kB, which logs do not and checkpoints do."""
    folder = started(tmp_path / "run", network={"width": 96, "depth": 2, "num_experts": 3})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match=r"step-0*64.pt: cannot be written \(File too large\)"):
            resume_and(folder, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.status()["state"] == "failed"
    assert [path.stem for path in checkpoint.run_checkpoints(folder)] == ["step-000000000032"]
    resume_and(folder, 10**6, lambda: None)
    assert folder.status()["state"] == "finished"


def test_the_status_says_so_where_it_can_be_written(disk: Path) -> None:
    """A checkpoint finds no room that a status would have."""
    folder = started(disk / "run", network={"width": 96, "depth": 2, "num_experts": 3})
    with pytest.raises(StorageError, match=r"checkpoints/step-0*32.pt: cannot be written \(No space left on device\)"):
        resume_and(folder, 1, lambda: fill(disk, leave=64 * 1024))
    status = folder.status()
    assert (status["state"], status["global_step"]) == ("failed", 32)
    assert status["error"].startswith("StorageError: ")
    assert status["error"].endswith("step-000000000032.pt: cannot be written (No space left on device)")


@pytest.mark.parametrize("name", ["status.json", "checkpoints/step-000000000032.pt", "config.json"])
def test_every_file_of_a_run_is_named_when_it_finds_no_room(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original = RunFolder.create

    def create(folder: RunFolder, *args: Any, **kwargs: Any) -> None:
        if name == "config.json":
            (run / ".config.json.tmp").symlink_to("/dev/full")
        original(folder, *args, **kwargs)
        path = run / name
        if name != "config.json":
            path.with_name(f".{path.name}.tmp").symlink_to("/dev/full")

    monkeypatch.setattr(RunFolder, "create", create)
    assert main(["train", *WORDS, *TASK, "--out", str(run), "--quiet"]) == 3
    assert capsys.readouterr().err == f"sphere: {run / name}: cannot be written (No space left on device)\n"
    monkeypatch.undo()
    again = ["resume", str(run)] if (run / "config.json").exists() else ["train", *WORDS, *TASK, "--out", str(run)]
    assert main([*again, "--quiet"]) == 0
    assert run_difference(train(config("Drawing"), tmp_path / "whole"), RunFolder(run)) is None


def test_tensorboard_without_room_is_named(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = disk / "run"
    started(run)
    (run / "tb").mkdir()
    fill(disk)
    assert main(["resume", str(run), "--quiet"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sphere: {run}/")
    assert line.endswith("(No space left on device)")


def test_a_report_without_room_is_one_line(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config("Drawing"), tmp_path / "runs" / "run")
    fill(disk)
    capsys.readouterr()
    assert main(["report", str(tmp_path / "runs"), "--out", str(disk / "page")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sphere: {disk}/page/")
    assert "No space left on device" in line


# Read-only


def test_a_checkpoint_folder_on_a_disk_that_is_read_only_stops_the_run(disk: Path, tmp_path: Path) -> None:
    """A file system with open files cannot be made read-only: that of the checkpoints has none between two of them."""
    folder = started(tmp_path / "run")
    folder.checkpoints.rmdir()
    folder.checkpoints.symlink_to(disk)
    message = r"step-0*64.pt: cannot be written \(Read-only file system\)"
    with pytest.raises(StorageError, match=message):
        resume_and(folder, 2, lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True))
    assert folder.status()["state"] == "failed"
    assert [path.stem for path in checkpoint.run_checkpoints(folder)] == ["step-000000000032"]
    subprocess.run(["mount", "-o", "remount,rw,size=2m", str(disk)], check=True)
    resume_and(folder, 10**6, lambda: None)
    assert folder.status()["state"] == "finished"


@pytest.mark.parametrize("command", ["train", "resume"])
def test_a_read_only_disk_is_refused_before_anything(
    command: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = disk / "run"
    started(run)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    out = run if command == "resume" else disk / "new"
    words = ["resume", str(out)] if command == "resume" else ["train", *WORDS, *TASK, "--out", str(out)]
    assert main([*words, "--quiet"]) == 2
    assert capsys.readouterr().err == f"sphere: {out}: cannot be written (Read-only file system)\n"


# Slow


def test_a_slow_disk_holds_up_the_run_and_not_its_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, drawn, sync = io.StringIO(), list[bool](), os.fsync

    def slow(file: int) -> None:
        if len(drawn) < 4:
            before = len(screen.getvalue())
            time.sleep(0.5)
            drawn.append(len(screen.getvalue()) > before)
        sync(file)

    settings, folder = config("Drawing", steps_per_task=256), started(tmp_path / "run")
    monkeypatch.setattr(os, "fsync", slow)
    with folder:
        protocol.resume(folder, lambda step: [Bars(settings, Console(file=screen, force_terminal=True), "run", step)])
    monkeypatch.undo()
    assert drawn == [True] * 4
    assert run_difference(train(settings, tmp_path / "whole"), folder) is None


def resume_slowly(path: Path, after: int, waiting: Event) -> None:
    """What a process does: resume a run whose disk needs a minute for what it is given after so many times."""
    sync, left = os.fsync, iter(range(after))

    def slow(file: int) -> None:
        if next(left, None) is None:
            waiting.set()
            time.sleep(60)
        sync(file)

    os.fsync = slow
    resume_alone(path)


def test_a_run_that_is_killed_while_the_disk_takes_its_time_is_resumed_bitwise(tmp_path: Path) -> None:
    """At the status, the logs, a checkpoint and its folder's entry."""
    folder = started(tmp_path / "run")
    for after in (0, 5, 7, 8):
        waiting = SERVER.Event()
        process = SERVER.Process(target=resume_slowly, args=(folder.path, after, waiting))
        process.start()
        assert waiting.wait(120)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    resume_and(folder, 10**6, lambda: None)
    whole = started(tmp_path / "whole")
    resume_and(whole, 10**6, lambda: None)
    assert run_difference(whole, folder) is None


# Gone


def test_a_folder_that_is_gone_stops_the_run_in_one_line(tmp_path: Path) -> None:
    folder = started(tmp_path / "run")
    with pytest.raises(StorageError, match=rf"^{tmp_path}/run/\S+: cannot be written \(No such file or directory\)$"):
        resume_and(folder, 3, lambda: shutil.rmtree(folder.path))
    assert not folder.path.exists()


def test_a_disk_that_is_gone_and_comes_back_loses_nothing(disk: Path, tmp_path: Path) -> None:
    folder, away = started(disk / "run"), tmp_path / "away"
    with pytest.raises(StorageError, match=r"cannot be written \(No such file or directory\)$"):
        resume_and(folder, 3, lambda: folder.path.rename(disk / "away"))
    (disk / "away").rename(folder.path)
    resume_and(folder, 10**6, lambda: None)
    whole = started(away)
    resume_and(whole, 10**6, lambda: None)
    assert run_difference(whole, folder) is None


# The mechanism


def test_a_file_is_as_it_was_when_its_successor_finds_no_room(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, b"old")
    (tmp_path / ".status.json.tmp").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=rf"^{path}: cannot be written \(No space left on device\)$"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_with_room_for_two_keeps_the_last_good_one(disk: Path) -> None:
    """The new one is written before the oldest is removed: where there is room for two only, both are kept."""
    folder, state = started(disk / "run"), {"weight": torch.zeros(150_000)}
    for step in (1, 2):
        checkpoint.save_run(folder, step, state)
    with pytest.raises(StorageError):
        checkpoint.save_run(folder, 3, {"weight": torch.zeros(400_000)})
    assert [path.stem[-1] for path in checkpoint.run_checkpoints(folder)] == ["1", "2"]
    found = checkpoint.newest(folder)
    assert found is not None
    assert found[0].stem.endswith("2")
