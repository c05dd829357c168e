"""Those who watch a run get the numbers of its logs, and leave no trace in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sphere_rl import cli
from sphere_rl.runs import RunFolder
from sphere_rl.training import monitors

WORDS = (
    "train --suite gym --tasks Pendulum-v1 Pendulum-v1 --num-envs 2 --num-steps 64 --minibatch-size 32 --num-epochs 1 "
    "--width 16 --depth 1 --num-experts 3 --steps-per-task 256 --eval-every 128 --eval-episodes 1 "
    "--final-eval-episodes 1 --quiet"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert cli.main([*WORDS, "--out", str(out)]) == 0
    return RunFolder(out)


def test_tensorboard_has_every_number_of_the_logs(run: RunFolder) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run.path / "tb"))
    events.Reload()
    told = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    names = {"train": "train/", "eval": "eval_{phase}/", "spectrum": "spectrum_{batch}/"}
    expected = {
        (names[log].format(**row) + name, row["global_step"]): value
        for log in names
        for row in run.read(log)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in monitors.SKIPPED and row.get("phase") != "retention"
    }
    kept = [row for row in run.read("eval") if row["phase"] == "retention"]
    assert len(kept) == 2
    for row in kept:
        place = f"eval_retention/{row['task_index']:02d}_Pendulum-v1/mean_return"
        expected[place, row["global_step"]] = row["mean_return"]
    assert len(expected) > 80
    for place, value in expected.items():
        assert told[place] == pytest.approx(value, rel=1e-6), place


def test_missing_wandb_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = {"sphere_rl.training.monitors.find_spec": lambda name: None if name == "wandb" else find_spec(name)}
    monkeypatch.setattr(*present.popitem())
    line = "sphere: log: wandb is not installed; pip install 'sphere-rl[wandb]'\n"
    for words in (WORDS, ["sweep", *WORDS[1:-1]]):
        assert cli.main([*words, "--log", "wandb", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == line
    assert not (tmp_path / "out").exists()
    assert cli.main([*WORDS, "--log", "paper", "--out", str(tmp_path / "out")]) == 2
    assert "paper" in capsys.readouterr().err


def test_wandb_offline_has_the_numbers_and_changes_nothing(run: RunFolder, tmp_path: Path) -> None:
    """In a process of its own, as W&B starts a service; without a network."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = "import sys; from sphere_rl.cli import main; sys.exit(main())"
    out = tmp_path / "told"
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    words = [sys.executable, "-c", code, *WORDS, "--log", "wandb", "--out", str(out)]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert (out / "eval.jsonl").read_bytes() == (run.path / "eval.jsonl").read_bytes()
    (written,) = out.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    for row in RunFolder(out).read("eval"):
        assert json.dumps(row["mean_return"]).encode() in content
    assert b"spectrum_probe/r_e_K" in content
    assert json.dumps(RunFolder(out).read("spectrum")[-1]["r_e_K"]).encode() in content
