from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict, deque
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import difference
from toy_runs import store

import sphere_rl
from sphere_rl.errors import RunFolderError, TrainingError
from sphere_rl.runs import Logs, RunFolder, checkpoint, write_atomic


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    with folder:
        folder.create({"seed": 1})
    return folder


def test_create_writes_config_versions_and_commit(folder: RunFolder) -> None:
    data = json.loads(folder.config_path.read_text())
    assert data["config"] == {"seed": 1} == folder.config()
    torch_version, _, _ = torch.__version__.partition("+")  # the package's own may not say +cu130
    assert data["versions"]["torch"].partition("+")[0] == torch_version
    assert set(data) == {"config", "versions", "commit"}


def test_the_commit_is_that_of_the_source_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a project in whose folder the package is installed, and nothing where there is no git."""
    ask = "from sphere_rl.runs import commit; print(commit())"

    def told(source: Path, **changes: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(source)} | changes
        command = [sys.executable, "-c", ask]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def git(*words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "own.txt").write_text("a project")
    git("init")
    git("add", "own.txt")
    git("commit", "-m", "first")
    installed = tmp_path / ".venv" / "site-packages"
    shutil.copytree(Path(sphere_rl.__file__).parent, installed / "sphere_rl")
    assert told(installed) == "None"
    git("add", "--force", ".venv/site-packages/sphere_rl/runs/__init__.py")
    assert told(installed) == git("rev-parse", "HEAD")
    assert told(installed, PATH="") == "None"


def test_a_folder_is_never_written_over(folder: RunFolder, tmp_path: Path) -> None:
    with folder, pytest.raises(RunFolderError, match="holds a run already; continue it with: sphere resume"):
        folder.create({})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with RunFolder(tmp_path / "other") as other, pytest.raises(RunFolderError, match=r"not empty \(holds thesis.tex\)"):
        other.create({})
    with pytest.raises(RunFolderError, match="not a run folder"):
        RunFolder.existing(tmp_path / "other")


def hold(path: Path, held: Event, release: Event) -> None:
    with RunFolder(path):
        held.set()
        release.wait(60)


def test_a_second_process_is_refused(folder: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder.path, held, release))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(RunFolderError, match="another process is using this run folder"), folder:
            pass
    finally:
        release.set()
        process.join(60)
    with folder:
        pass


def test_atomic_write_keeps_the_old_file_when_it_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"


def test_logs_are_cut_to_the_lengths_of_the_checkpoint(folder: RunFolder) -> None:
    logs = Logs(folder, {})
    logs.append("train", {"global_step": 1})
    lengths = logs.lengths()
    logs.append("train", {"global_step": 2})
    logs.append("eval", {"global_step": 2})
    logs.close()
    with (folder.path / "train.jsonl").open("a") as file:
        file.write('{"global_st')  # killed in the middle of a line
    assert folder.read("train") == [{"global_step": 1}, {"global_step": 2}]
    logs = Logs(folder, lengths)
    logs.append("train", {"global_step": 3})
    logs.close()
    assert folder.read("train") == [{"global_step": 1}, {"global_step": 3}]
    assert folder.read("eval") == [] == folder.read("spectrum")


def test_logs_hold_valid_json_only(folder: RunFolder) -> None:
    logs = Logs(folder, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        logs.append("train", {"loss": float("nan")})
    logs.close()


def test_status(folder: RunFolder) -> None:
    assert folder.status() == {}
    folder.set_status("failed", 5, "push", "TrainingError: nan")
    assert folder.status() == {"state": "failed", "global_step": 5, "task": "push", "error": "TrainingError: nan"}


def test_the_last_two_checkpoints_are_kept(folder: RunFolder) -> None:
    for step in (1, 20, 300):
        checkpoint.save_run(folder, step, {"step": step})
    assert [path.stem for path in checkpoint.run_checkpoints(folder)] == ["step-000000000020", "step-000000000300"]
    found = checkpoint.newest(folder)
    assert found is not None
    assert found[1] == {"step": 300}


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_broken_checkpoint_is_passed_over(folder: RunFolder, damage: str) -> None:
    for step in (1, 2):
        checkpoint.save_run(folder, step, {"step": step, "weight": torch.ones(100)})
    newest = checkpoint.run_checkpoints(folder)[-1]
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    newest.write_bytes(content[: {"cut": len(content) - 7, "flip": len(content), "empty": 0}[damage]])
    found = checkpoint.newest(folder)
    assert found is not None
    assert found[1]["step"] == 1
    with pytest.raises(RunFolderError, match="broken checkpoint"):
        checkpoint.load(newest)
    checkpoint.run_checkpoints(folder)[0].write_bytes(b"")
    with pytest.raises(RunFolderError, match="broken checkpoint"):
        checkpoint.newest(folder)


def test_checkpoints_are_found_by_name(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        checkpoint.find(folder, "latest")
    checkpoint.save_run(folder, 7, {})
    checkpoint.save(folder.checkpoints / "task-00-push.pt", {})
    assert checkpoint.find(folder, "latest").stem == "step-000000000007"
    assert checkpoint.find(folder, "task-00-push") == checkpoint.find(folder, "task-00-push.pt")
    with pytest.raises(RunFolderError, match="expected latest or one of task-00-push, step-000000000007"):
        checkpoint.find(folder, "task-01-pull")


def test_checkpoints_cannot_carry_code(folder: RunFolder) -> None:
    path = folder.checkpoints / "evil.pt"
    store(path, {"call": print})
    with pytest.raises(RunFolderError, match="Weights only load failed") as error:
        checkpoint.load(path)
    assert str(error.value).isprintable()


@dataclass
class Counted:
    """What a method may hold, and a checkpoint may not."""

    count: int = 1


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (deque([1]), "collections.deque"),
        (Counted(), f"{__name__}.Counted"),
        (defaultdict(int), "collections.defaultdict"),
        (Path("x"), f"{type(Path()).__module__}.{type(Path()).__qualname__}"),
        (print, "builtins.builtin_function_or_method"),
    ],
)
def test_what_no_checkpoint_can_be_read_with_is_named_before_it_is_written(
    value: object, kind: str, folder: RunFolder
) -> None:
    path = folder.checkpoints / "mine.pt"
    for state, place in [
        ({"methods": {"mine": {"state": [1, {"v": value}]}}}, "methods.mine.state[1].v"),
        ({"method": ({3: value},)}, "method[0].3"),
    ]:
        with pytest.raises(TrainingError, match=rf"^{re.escape(place)} is a {kind}; allowed in a checkpoint: tensors"):
            checkpoint.save(path, state)
    with pytest.raises(TrainingError, match=r"^a key of mine is a numpy.int64; allowed"):
        checkpoint.save(path, {"mine": {np.int64(1): 2}})
    assert not path.exists()


def test_all_that_a_state_may_hold_is_read_back(folder: RunFolder) -> None:
    state = {
        "numbers": [1, 2.5, True, None, 1j], "words": ("a", b"b"), "set": {1, "a"}, 3: {(1, "a"): 2},
        "layers": torch.nn.Linear(2, 3).state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)),
        "kinds": [torch.float64, torch.device("cpu"), torch.zeros(2, 3).shape],
    }  # fmt: skip
    checkpoint.save(folder.checkpoints / "all.pt", state)
    found = checkpoint.load(folder.checkpoints / "all.pt")
    assert difference(found.pop("layers"), state.pop("layers")) is None
    assert torch.equal(found.pop("parameter"), state.pop("parameter"))
    assert found == state
