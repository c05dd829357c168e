"""Two processes on one run folder, two sweeps on one folder, and owners that have died."""

from __future__ import annotations

import errno
import multiprocessing
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from comparing import run_difference
from toy_runs import WORDS, config, train

from sphere_rl.cli import main
from sphere_rl.errors import RunFolderError
from sphere_rl.runs import RunFolder, read_sweep

SPAWN = multiprocessing.get_context("spawn")


def hold(path: Path, held: Event, release: Event) -> None:
    with RunFolder(path):
        held.set()
        release.wait(120)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = train(config("Drawing"), tmp_path / "run")
    folder.set_status("interrupted", 64, "toy_envs:Drawing-v0")
    return folder.path


def test_a_second_writer_is_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, release = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(run, held, release))
    process.start()
    try:
        assert held.wait(120)
        assert RunFolder(run).in_use
        assert main(["resume", str(run), "--quiet"]) == 2
        assert capsys.readouterr().err == f"sphere: {run}: another process is using this run folder\n"
        assert main(["evaluate", str(run), "--episodes", "1"]) == 0  # readers are welcome
    finally:
        release.set()
        process.join(120)
    assert not RunFolder(run).in_use


def test_the_lock_of_an_owner_that_died_is_taken_over(run: Path) -> None:
    held, release = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(run, held, release))
    process.start()
    assert held.wait(120)
    process.kill()
    process.join(120)
    assert (run / ".lock").exists()
    assert not RunFolder(run).in_use
    assert main(["resume", str(run), "--quiet"]) == 0


def test_a_file_system_without_locks_is_said_as_that(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(RunFolderError, match=r"cannot be locked \(its file system has no locks\)"), RunFolder(run):
        pass
    assert not RunFolder(run).in_use


def sweep(out: Path, *seeds: str) -> list[str]:
    words = ["--suite", "gym", "--tasks", "toy_envs:Drawing-v0", "--methods", "none", "--seeds", *seeds, *WORDS[2:]]
    return [sys.executable, "-m", "sphere_rl.cli", "sweep", *words, "--jobs", "1", "--out", str(out)]


def runs_of(out: Path) -> list[RunFolder]:
    return [RunFolder(path.parent) for path in sorted(out.glob("*/config.json"))]


def test_two_sweeps_share_the_work_and_nothing_is_done_twice(tmp_path: Path) -> None:
    out, place = tmp_path / "sweep", Path(__file__).parent
    both = [
        subprocess.Popen(sweep(out, *order), cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for order in (("0", "1", "2"), ("0", "2", "1"))  # both want the first at the same moment
    ]
    printed = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    found = runs_of(out)
    assert len(found) == 3
    for folder in found:
        assert folder.status()["state"] == "finished"
        assert len(list((folder.path / "tb").iterdir())) == 1  # a file for each process that has trained it
        alone = train(config("Drawing", seed=folder.config()["seed"]), tmp_path / folder.path.name)
        assert run_difference(alone, folder) is None
    assert len(read_sweep(out)["commands"]) == 2
    assert sum(text.count("FAILED") for text in printed) == 0


def test_a_sweep_takes_over_what_another_one_left(tmp_path: Path) -> None:
    out, place = tmp_path / "sweep", Path(__file__).parent
    first = subprocess.Popen(sweep(out, "0"), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(out.glob("*/config.json")) and time.monotonic() < end:
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = subprocess.run(sweep(out, "0"), cwd=place, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = runs_of(out)
    assert run_difference(train(config("Drawing"), tmp_path / "alone"), folder) is None
