"""What a page says of a replication: the paper's bars beside these, profiles, and what ranks foretell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr
from synthetic_runs import write_run

from sphere_rl.config import TrainConfig, overridden, to_dict
from sphere_rl.report import figures, panels
from sphere_rl.report.content import SuiteContent
from sphere_rl.report.drawings import drawings
from sphere_rl.report.foresight import Foresight, entries, foresight
from sphere_rl.report.paper import published
from sphere_rl.report.table_files import foresight_table
from sphere_rl.results import load_results
from sphere_rl.suites import make_suite

CW10 = list(make_suite("cw10").tasks)


@pytest.fixture
def suite(tmp_path: Path) -> SuiteContent:
    """CW10 whole, in sequence: plain PPO with two seeds, and both forms of SPHERE with one."""
    given: dict[str, Any] = {"suite": "cw10", "protocol": "crl", "actor": "topk_moe", "steps_per_task": 320}
    for seed in (0, 1):
        write_run(tmp_path / f"none-{seed}", CW10, **given, seed=seed)
    for scale in ("literal", "free"):
        config = to_dict(overridden(TrainConfig(), {"method": ["sphere"], "sphere": {"scale": scale}}))
        options = {name: config[name] for name in ("method", "sphere")} | {"label": f"sphere_{scale}"}
        write_run(tmp_path / scale, CW10, **given, seed=0, **options)
    return SuiteContent("cw10", load_results(tmp_path))


def test_the_papers_bars_stand_beside_runs_of_the_same_kind(suite: SuiteContent) -> None:
    found = {row["label"]: row["paper"] for row in suite.rows}
    assert found == {"none": (0.67, 0.21), "sphere_literal": (0.71, 0.49), "sphere_free": None}
    (success,) = [panel for panel in suite.panels if panel.figure == "success"]
    diamonds = [trace for trace in success.choices[""] if trace["type"] == "scatter"]
    at = {trace["offsetgroup"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in diamonds}
    assert at["rl"] == {"none": 0.67, "sphere_literal": 0.71, "sphere_free": None}
    assert at["crl"] == {"none": 0.21, "sphere_literal": 0.49, "sphere_free": None}
    assert "what the paper prints" in success.caption
    (axes,) = drawings(suite)["success"].axes
    drawn: Any = [line.get_xydata() for line in axes.lines if line.get_marker() == "D" and line.get_xydata().size]  # type: ignore[union-attr]
    assert suite.labels == ["none", "sphere_free", "sphere_literal"]  # at 0, 1 and 2, RL to the left of CRL
    np.testing.assert_allclose(drawn, [[[-0.2, 0.67], [0.2, 0.21]], [[1.8, 0.71], [2.2, 0.49]]])


def test_the_papers_bars_are_of_its_own_sequence() -> None:
    assert published("cw10", CW10, "topk_moe", ["layernorm"], {}) == (0.53, 0.38)
    assert published("cw10", CW10[:3], "topk_moe", ["none"], {}) is None
    assert published("cw10", CW10, "dense", ["layernorm"], {}) is None
    assert published("gym", ["Pendulum-v1"], "dense", ["none"], {}) is None


def test_profiles_are_of_seeds_and_tasks(suite: SuiteContent) -> None:
    """By the runs: success of seed s on task i is 1 where s + i is odd, 0 elsewhere."""
    curves = {curve.label: curve for curve in suite.profiles["crl"]}
    assert {label: curve.seeds for label, curve in curves.items()} == {"none": 2, "sphere_literal": 1, "sphere_free": 1}
    for curve in curves.values():
        assert curve.x == [i / 50 for i in range(50)]
        assert curve.mean == curve.low == curve.high == [0.5] * 50
    assert suite.profiles["rl"] == []
    (panel,) = [panel for panel in suite.panels if panel.figure == "profile"]
    assert list(panel.choices) == ["CRL"]


def table(rows: Sequence[tuple[str, int, float | None, float | None]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["run", "place", "r_e_K", "score"], orient="row")


def test_hard_tasks_say_nothing_within_tasks() -> None:
    """In every task the agent of lower rank does better, but ranks and scores both rise from task to task."""
    rows = [
        (f"run{run}", place, 10.0 * place - run, 0.2 * place + 0.05 * run) for run in range(3) for place in (1, 2, 3)
    ]
    found = foresight(table([*rows, ("other", 4, None, 0.5)]), "r_e_K")
    ranks, scores = np.array([row[2] for row in rows]), np.array([row[3] for row in rows])
    whole: Any = spearmanr(ranks, scores)
    assert found.spearman == pytest.approx(whole.statistic)
    assert whole.statistic > 0.7
    assert (found.entries, found.runs, found.within) == (9, 3, pytest.approx(-1.0))
    assert found.spearman_low is not None
    assert found.spearman_high is not None
    assert found.spearman_low <= found.spearman <= found.spearman_high  # type: ignore[operator]
    bounds = f"[{found.spearman_low:.2f}, {found.spearman_high:.2f}]"
    whole_text = f"Spearman {found.spearman:.2f} {bounds} over 9 entries of 3 runs"
    assert str(found) == f"{whole_text}; −1.00 [−1.00, −1.00] within tasks"
    alone = foresight(table(rows[:3]), "r_e_K")
    assert (alone.runs, alone.within) == (1, None)
    flat = table([("a", 1, 1.0, 0.1), ("b", 1, 1.0, 0.2), ("c", 1, 1.0, 0.3)])
    assert foresight(flat, "r_e_K") == Foresight(3, 3, None, None)


def test_a_metric_of_tiny_numbers_has_the_ranks_of_any_other() -> None:
    """As the gradients of an agent whose features vanish."""
    rng = np.random.default_rng(0)
    rows = [(f"run{run}", place, rank := rng.normal(), rank + rng.normal()) for run in range(4) for place in (1, 2, 3)]
    entered = table(rows)
    assert foresight(entered.with_columns(pl.col("r_e_K") * 1e-13), "r_e_K") == foresight(entered, "r_e_K")


def test_an_entry_is_what_the_task_before_has_left(suite: SuiteContent) -> None:
    found = entries(suite.evals, suite.spectra, suite.score)
    assert found.height == 4 * 9
    one = found.filter((pl.col("run") == "none-1") & (pl.col("place") == 1)).row(0, named=True)
    assert (one["task"], one["score"]) == (CW10[1], 0.0)  # 0.1 · 10 · ((1 + 1) % 2)
    assert one["r_e_K"] == pytest.approx(3.0 + 0.1 * 10 + 1)  # as last measured on the first task
    assert one["task_step"] == 320
    csv = foresight_table([suite])
    assert csv.filter(pl.col("metric") == "r_e_K").row(0)[2:4] == (36, 4)
    traces = panels.entries(found, "r_e_K", suite.order)
    assert sum(len(trace["x"]) for trace in traces) == 36
    figure = figures.entry_scatter(found, "caption")
    assert len(figure.axes) == 2
    assert figure.get_gid() != figures.MISSING
    assert figures.entry_scatter(found.head(2), "caption").get_gid() == figures.MISSING


def test_curves_of_rl_stand_at_every_place_of_their_task(tmp_path: Path) -> None:
    """A, B, A in CRL; RL trained A and B once each, which are the first and third task, and the second."""
    write_run(tmp_path / "crl", ["push-v3", "reach-v3", "push-v3"], protocol="crl")
    for task in ("push-v3", "reach-v3"):
        write_run(tmp_path / task, [task], protocol="rl")
    write_run(tmp_path / "twice", ["push-v3", "push-v3", "push-v3"], protocol="rl", seed=1)  # of no CRL sequence
    parts = load_results(tmp_path).by_sequence()
    assert [sorted(part.runs["run"]) for part in parts.values()] == [["crl", "push-v3", "reach-v3"], ["twice"]]
    suite = SuiteContent("gym", parts["gym"])
    assert suite.tasks == ("push-v3", "reach-v3", "push-v3")
    (curve,) = suite.curves(suite.learned("rl"), "success_final")
    assert [x for x in curve.x if x is not None] == [160, 320, 480, 640, 800, 960]
    (row,) = suite.rows
    assert row["rl"].seeds == 1
