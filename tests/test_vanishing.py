"""Runs whose features vanish say so once: on the terminal, quiet or not, and on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sphere_rl import cli
from sphere_rl.config import from_dict
from sphere_rl.report.content import SuiteContent
from sphere_rl.report.page import render
from sphere_rl.results import load_results
from sphere_rl.runs import RunFolder
from sphere_rl.spectrum.vanishing import notices
from sphere_rl.training.monitors import make_monitors

STRONG = (
    "train --suite gym --tasks Pendulum-v1 --num-envs 2 --num-steps 64 --minibatch-size 8 --num-epochs 4 --width 16 "
    "--depth 2 --num-experts 3 --steps-per-task 512 --eval-every 10000 --final-eval-episodes 1 --spectrum-every 128 "
    "--method sphere --sphere.rho 100 --learning-rate 1e-2"
).split()
"""A penalty that is all of the step: the literal one shrinks every feature in the first iteration."""
SAID = "Pendulum-v1: features have vanished since step 128 (feature_rank 0)"
NEW = ("feature_norm", "participation_ratio", "output_size")


def line(step: int, rank: int | None, task_index: int = 0, batch: str = "rollout") -> dict[str, Any]:
    task = ("reach", "push")[task_index]
    return {"global_step": step, "task_index": task_index, "task": task, "batch": batch, "feature_rank": rank}


def test_what_is_said_is_said_once() -> None:
    alive, gone = [line(1000, 7), line(2000, 3)], [line(30_000, 0), line(40_000, 0, batch="probe"), line(40_000, 0)]
    vanished = "reach: features have vanished since step 30,000 (feature_rank 0)"
    assert notices(alive, fresh=False) == []
    assert notices([*alive, *gone], fresh=False) == [vanished]
    back = [line(45_000, 4, batch="probe"), line(50_000, 2, task_index=1)]
    assert notices([*alive, *gone, *back], False) == [
        vanished,
        "push: features are back since step 50,000 (feature_rank 2)",
    ]
    assert notices([*gone, *back], fresh=True) == [vanished], "another agent's features are not back"
    again = "push: features have vanished since step 50,000 (feature_rank 0)"
    assert notices([*gone, line(50_000, 0, task_index=1)], fresh=True) == [vanished, again]
    assert notices([line(1, None), {"batch": "rollout"}], fresh=False) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vanishing")


def train(runs: Path, scale: str, *words: str) -> list[dict[str, Any]]:
    assert cli.main([*STRONG, "--sphere.scale", scale, "--out", str(runs / scale), *words]) == 0
    return [row for row in RunFolder(runs / scale).read("spectrum") if row["batch"] == "rollout"]


def known(runs: Path, scale: str) -> RunFolder:
    """That run, trained here where no test before has done it."""
    if not (runs / scale).exists():
        train(runs, scale, "--quiet")
    return RunFolder(runs / scale)


def test_the_literal_penalty_can_shrink_features_to_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = train(runs, "literal", "--quiet")
    assert capsys.readouterr().err == f"{SAID}\n"
    assert [row["feature_rank"] for row in rows] == [0] * 4
    assert max(row["feature_norm"] for row in rows) < 0.02


def test_the_scale_free_one_leaves_their_size_alone(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = train(runs, "free")
    assert "features" not in capsys.readouterr().err
    assert all(row["feature_rank"] > 10 and 0.5 < row["feature_norm"] < 5 for row in rows)
    assert all(4 < row["participation_ratio"] <= row["r_e_A"] for row in rows)


def test_what_was_said_before_an_interruption_is_not_said_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = known(runs, "literal")
    capsys.readouterr()
    rows = folder.read("spectrum")
    monitors = make_monitors(from_dict(folder.config()), folder, 512, quiet=True)
    for row in (*rows, rows[-1] | {"global_step": 640, "feature_rank": 3}):
        for monitor in monitors:
            monitor.row("spectrum", row)
    for monitor in monitors:
        monitor.close()
    assert capsys.readouterr().err == "Pendulum-v1: features are back since step 640 (feature_rank 3)\n"


def test_the_page_warns_of_that_run_and_reads_logs_without_the_new_columns(runs: Path) -> None:
    old, _ = known(runs, "free"), known(runs, "literal")
    path = old.path / "spectrum.jsonl"
    rows = [{name: value for name, value in row.items() if name not in NEW} for row in old.read("spectrum")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = load_results(runs)
    assert results.spectra.drop_nulls(NEW)["run"].unique().to_list() == ["literal"]
    suite = SuiteContent("gym", results)
    page = render([suite], results, None, runs / "figures")
    assert f'<p class="warning"><b>literal</b>: {SAID}.</p>' in page
    assert page.count(SAID) == 2, "with its figures and in the table of runs"
    assert page.count("have vanished") == 2
    (rank,) = (panel for panel in suite.panels if panel.figure == "rank")
    assert {"participation_ratio", "feature_norm", "r_e_A"} <= set(rank.choices)
