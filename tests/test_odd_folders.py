"""Folders that are legal and not usual: what is compared with what, what has which name, and what is not there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import write_run

from sphere_rl.report import figures, page, panels, table_files
from sphere_rl.report.content import SuiteContent
from sphere_rl.report.curves import Curve, curves
from sphere_rl.report.geometry import Snapshot
from sphere_rl.results import load_results

TASK = ["Pendulum-v1"]


def rewrite(run: Path, log: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Every line of a log as ``change`` makes it."""
    path = run / f"{log}.jsonl"
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ends_at(run: Path, score: float | None) -> None:
    """Give a run this success in every evaluation."""
    rewrite(run, "eval", lambda line: line | {"success_final": score, "success_once": score})


def suite(root: Path) -> SuiteContent:
    return SuiteContent("gym", load_results(root))


def test_a_run_that_was_told_no_success_had_none(tmp_path: Path) -> None:
    """Some environments tell success only when it is there: seeds at 1, 1 and nothing have a mean of 2/3."""
    for seed, score in enumerate((1.0, 1.0, None)):
        write_run(tmp_path / str(seed), TASK, protocol="crl", seed=seed)
        ends_at(tmp_path / str(seed), score)
    (row,) = suite(tmp_path).rows
    assert (row["crl"].value, row["crl"].seeds) == (pytest.approx(2 / 3), 3)


def test_of_a_task_without_success_nothing_is_made_up(tmp_path: Path) -> None:
    write_run(tmp_path / "a", TASK)
    ends_at(tmp_path / "a", None)
    assert load_results(tmp_path).evals["success_final"].is_null().all()
    assert suite(tmp_path).score == "mean_return"


def test_plain_ppo_of_other_settings_is_no_reference(tmp_path: Path) -> None:
    """0.4 beside 0.5 at the same learning rate is −0.1; an arm of plain PPO at another one is not asked."""
    arms: dict[str, dict[str, Any]] = {
        "none": {}, "big_lr": {"label": "big_lr", "learning_rate": 0.1},
        "free": {"label": "free", "method": ["sphere"]},
        "fast": {"label": "fast", "method": ["layernorm"], "learning_rate": 1.0},
    }  # fmt: skip
    for (name, changes), score in zip(arms.items(), (0.5, 0.0, 0.4, 0.9), strict=True):
        write_run(tmp_path / name, TASK, protocol="crl", **changes)
        ends_at(tmp_path / name, score)
    found = suite(tmp_path)
    (row,) = found.differences  # nothing is like fast but for its method
    assert (row["label"], row["reference"], row["crl"].value) == ("free", "none", pytest.approx(-0.1))
    assert [one and one["label"] for one in found.pair] == ["none", "free"]
    assert found.labels[0] == "none"


def test_cards_name_what_is_subtracted(tmp_path: Path) -> None:
    """A dense actor comes first, and has no SPHERE: the pair is that of the actor that has both."""
    made = {"d": ("dense", "none", 0.9), "n": ("topk_moe", "none", 0.2), "s": ("topk_moe", "sphere", 0.6)}
    for name, (actor, method, score) in made.items():
        write_run(tmp_path / "r" / name, TASK, protocol="crl", actor=actor, method=[method])
        ends_at(tmp_path / "r" / name, score)
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    cards = re.findall(r'<p class="number">([^<]*)</p><p class="who"><span>([^<]*)</span>', html)
    assert cards[:3] == [
        ("0.20", "topk_moe none"),
        ("0.60", "topk_moe sphere"),
        ("+0.40", "topk_moe sphere − topk_moe none"),
    ]


def test_different_lengths_are_said(tmp_path: Path) -> None:
    write_run(tmp_path / "n", TASK, protocol="crl")
    write_run(tmp_path / "s", TASK, protocol="crl", method=["sphere"], steps_per_task=3200)
    found = suite(tmp_path)
    assert "1 task × 320 to 3,200 steps" in found.facts()
    assert not found.differences


def test_settings_of_two_methods_with_one_name_are_told_apart(tmp_path: Path) -> None:
    for name, threshold, gamma in (("a", 0.01, 0.9), ("b", 0.025, 0.9), ("c", 0.1, 0.5)):
        options: dict[str, Any] = {method: {"threshold": threshold} for method in ("redo", "regrama")}
        write_run(tmp_path / name, TASK, protocol="crl", method=[*options], gamma=gamma, **options)
    found = suite(tmp_path)
    assert len({*found.labels}) == 3
    assert all("redo.threshold=" in row["method"] and "regrama.threshold=" in row["method"] for row in found.rows)


def test_settings_that_look_alike_are_written_out(tmp_path: Path) -> None:
    for name, gamma in (("a", 0.12345671), ("b", 0.12345672)):
        write_run(tmp_path / name, TASK, gamma=gamma)
    assert suite(tmp_path).labels == ["none gamma=0.12345671", "none gamma=0.12345672"]


def test_a_part_has_no_other_suites_name(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ["A", "B"], protocol="crl")
    write_run(tmp_path / "b", ["C"], protocol="crl", seed=1)
    write_run(tmp_path / "c", ["D"], protocol="crl", suite="gym-2")
    parts = load_results(tmp_path).by_sequence()
    assert {name: part.runs["run"].to_list() for name, part in parts.items()} == {
        "gym": ["a"], "gym-3": ["b"], "gym-2": ["c"],
    }  # fmt: skip


def test_a_run_can_be_read_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "mine", TASK)
    monkeypatch.chdir(tmp_path / "mine")
    results = load_results(Path("."))
    assert results.runs["run"].to_list() == ["mine"]
    assert results.folder("mine").config()["suite"] == "gym"
    assert load_results(tmp_path / "mine").runs["run"].to_list() == ["mine"]


def test_columns_of_several_kinds_and_lists_stop_no_table(tmp_path: Path) -> None:
    for name, load in (("a", 0.5), ("b", [0.5, 0.25])):
        write_run(tmp_path / "r" / name, TASK, seed=len(name) + (name == "b"))
        rewrite(tmp_path / "r" / name, "spectrum", lambda line, load=load: line | {"odd": load})
        rewrite(tmp_path / "r" / name, "eval", lambda line: line | {"returns": [1.0, 2.0]})
    results = load_results(tmp_path / "r")
    assert sorted(map(tuple, results.spectra["odd"].unique().to_list())) == [(0.5,), (0.5, 0.25)]
    table_files.write_tables(page.content_of(results), results, tmp_path / "t")
    assert "returns" not in (tmp_path / "t" / "evaluations.csv").read_text()


@pytest.mark.parametrize(("name", "value"), [("r_e_K", [1.0]), ("expert_load", 1.0), ("feature_rank", 1e308)])
def test_a_measurement_of_another_kind_costs_its_run_alone(tmp_path: Path, name: str, value: Any) -> None:
    for seed in (0, 1):
        write_run(tmp_path / str(seed), TASK, seed=seed)
    rewrite(tmp_path / "1", "spectrum", lambda line: line | {name: value})
    assert load_results(tmp_path).broken["run"].to_list() == ["1"]


def test_a_batch_that_two_runs_share_counts_once(tmp_path: Path) -> None:
    """A sweep makes the RL run of the first task from the CRL run, lines and all."""
    for protocol in ("rl", "crl"):
        write_run(tmp_path / protocol, TASK, protocol=protocol)
    found = suite(tmp_path)
    assert found.spectra.height == 20
    assert (found.measured.height, found.measured["run"].unique().to_list()) == (10, ["crl"])


def test_no_suite_takes_an_id_of_the_page(tmp_path: Path) -> None:
    for name in ("data", "runs", "main", "live"):
        write_run(tmp_path / "r" / name, TASK, suite=name)
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    ids = re.findall(r'\bid="([^"]*)"', html[: html.index('id="data">') + 20])
    assert len(ids) == len({*ids})


def test_a_point_tells_the_seeds_behind_it(tmp_path: Path) -> None:
    """Three seeds, two of which stop at step 96: from there on the mean is that of one."""
    for seed in range(3):
        write_run(tmp_path / str(seed), TASK, protocol="crl", seed=seed)
        if seed:
            path = tmp_path / str(seed) / "spectrum.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    (curve,) = curves(load_results(tmp_path).spectra, "task_step", "r_e_K", ["method"])
    assert [*curve.seeds_at] == [3] * 3 + [1] * 7
    (line,) = [trace for trace in panels.lines([curve], []) if "band" not in trace]
    assert line["customdata"] == [3] * 3 + [1] * 7


def test_points_without_neighbours_are_drawn() -> None:
    x = [value for i in range(25) for value in (float(i), None)][:-1]
    curve = Curve("none", x, x, x, x, 1)
    assert curve.alone == [*range(0, 49, 2)]
    (line,) = [trace for trace in panels.lines([curve], []) if "band" not in trace]
    assert line["mode"] == "lines+markers"
    (drawn,) = figures.line_plot([curve], {}, "", "Success").axes[0].lines
    assert drawn.get_markevery() == curve.alone


def test_labels_that_begin_with_an_underscore_are_in_the_legend() -> None:
    curve = Curve("_hidden", [1, 2], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], 1)
    legend = figures.line_plot([curve], {}, "", "Success").axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden (1)"]


def test_a_policy_that_is_missing_keeps_its_place() -> None:
    """Of two tasks the first one's checkpoint is gone: the second is drawn as the second."""
    one = Snapshot(1, "B", np.array([3.0, 2.0, 1.0]), np.ones(3), np.ones((4, 3)))
    assert len(figures.geometry({"none": [one]}, "").axes) == 1
    assert figures.spectrum_decay({"none": [one]}, "").axes[0].lines[0].get_alpha() == 1
    assert [*panels.spectra({"none": [one]}, [])] == ["2. B"]


def test_each_cell_of_a_task_has_its_own_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / "r" / str(seed), TASK, protocol="crl", seed=seed)
    (tmp_path / "r" / "2" / "spectrum.jsonl").write_text("")
    results = load_results(tmp_path / "r")
    (row,) = table_files.task_table(page.content_of(results)).to_dicts()
    assert (row["seeds"], row["success_final_seeds"], row["r_e_K_seeds"]) == (3, 3, 2)
    html = page.make_page(results, tmp_path / "p").path.read_text()
    cell = re.search(r'data-column="r_e_K".*?</td>', html)
    assert cell is not None
    assert "n = 2" in cell[0]
