"""Results as data: every log as a table, tables as files, and two folders of runs compared by task and seed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import sphere_rl as sp
from sphere_rl.cli import main
from sphere_rl.config import TrainConfig, overridden, to_dict
from sphere_rl.numbers import number
from sphere_rl.report.table_files import escaped
from sphere_rl.runs import Logs, RunFolder

TASKS = ("Pendulum-v1", "MountainCarContinuous-v0")
SCORES = dict.fromkeys(("success_final", "success_once", "std_return", "mean_length"))


def write_run(path: Path, returns: list[float], tasks: Sequence[str] = TASKS, **changes: Any) -> RunFolder:
    """A run's folder as training writes it, with these returns at the ends of its tasks."""
    settings = {"suite": "gym", "tasks": list(tasks), "method": ["none"], **changes}
    with RunFolder(path) as folder:
        folder.create(to_dict(overridden(TrainConfig(), settings)))
        logs = Logs(folder, {})
        for index, value in enumerate(returns):
            place = {"global_step": 256 * (index + 1), "task_index": index, "task": tasks[index], "task_step": 256}
            logs.append("train", place | {"iteration": 1, "steps_per_second": 100.0, "policy_loss": value / 2})
            logs.append("eval", place | {"phase": "final", "episodes": 5, "mean_return": value} | SCORES)
            logs.append("spectrum", place | {"batch": "probe", "r_e_K": value / 10, "expert_load": [0.5, 1.5]})
        logs.close()
        folder.set_status("finished", 512, TASKS[-1])
    return RunFolder(path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """SPHERE with seeds 0 to 2, plain PPO with seeds 0 and 1, the latter's second task unfinished in seed 2."""
    for seed, returns in enumerate([[10.0, 20.0], [14.0, 28.0], [90.0, 90.0]]):
        write_run(tmp_path / "ours" / str(seed), returns, method=["sphere"], seed=seed)
    for seed, returns in enumerate([[8.0, 10.0], [10.0, 30.0], [50.0]]):
        write_run(tmp_path / "theirs" / str(seed), returns, seed=seed)
    return tmp_path / "ours", tmp_path / "theirs"


def rows_of(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], dict[str, Any]]:
    rows = map(json.loads, capsys.readouterr().out.splitlines())
    return {(row["score"], row["task"]): row for row in rows}


def test_differences_are_paired_by_task_and_seed(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *map(str, folders), "--json"]) == 0
    rows = rows_of(capsys)
    assert {score for score, _ in rows} == {"mean_return", "r_e_K"}  # no task of gym knows success
    first, second, both = (rows["mean_return", task] for task in (*TASKS, "all tasks"))
    assert (first["mean_A"], first["mean_B"], first["difference"]) == pytest.approx((38, 68 / 3, 46 / 3))  # 2, 4, 40
    assert (second["mean_A"], second["mean_B"], second["difference"]) == (24, 20, 4)  # 10, -2
    assert (first["seeds"], second["seeds"], both["seeds"]) == (3, 2, 2)
    assert (second["low"], second["high"]) == (-2, 10)
    assert (both["difference"], both["low"], both["high"]) == (3.5, 1, 6)  # whole seeds: (2 + 10)/2 and (4 - 2)/2
    assert (both["mean_A"], both["mean_B"]) == (18, 14.5)
    assert rows["r_e_K", "all tasks"]["difference"] == pytest.approx(0.35)
    assert (both["A"], both["B"], both["protocol"]) == ("topk_moe sphere", "topk_moe none", "crl")


def test_a_task_that_comes_twice_is_compared_at_each_of_its_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = (*TASKS, TASKS[0])
    ours = write_run(tmp_path / "ours", [0.9, 0.5, 0.1], tasks)
    theirs = write_run(tmp_path / "theirs", [0.1, 0.5, 0.9], tasks)
    assert main(["compare", str(ours.path), str(theirs.path), "--json"]) == 0
    rows = [row for row in map(json.loads, capsys.readouterr().out.splitlines()) if row["score"] == "mean_return"]
    assert [(row["task"], row["place"]) for row in rows] == [*zip(tasks, range(3), strict=True), ("all tasks", None)]
    assert [row["difference"] for row in rows] == pytest.approx([0.8, 0, -0.8, 0])


def test_a_run_of_rl_that_stands_at_two_places_is_drawn_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for side, last in (("ours", 3.0), ("theirs", 0.0)):
        write_run(tmp_path / side / "crl", [0.0, 0.0, 0.0], (*TASKS, TASKS[0]))
        for seed, value in enumerate([0.0, 0.0, last]):
            for task, end in zip(TASKS, (value, 0.0), strict=True):
                write_run(tmp_path / side / f"{task}-{seed}", [end], [task], protocol="rl", seed=seed)
    assert main(["compare", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (row,) = (r for r in rows if (r["protocol"], r["score"], r["task"]) == ("rl", "mean_return", "all tasks"))
    assert (row["difference"], row["seeds"]) == (pytest.approx(2 / 3), 3)
    assert (row["low"], row["high"]) == (0, 2)  # one draw of 27 is the last seed thrice; of 729 where it is drawn twice


def test_a_run_that_is_there_twice_counts_once_and_is_named(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = folders
    assert main(["compare", str(ours), str(theirs), "--json"]) == 0
    expected = rows_of(capsys)
    write_run(ours / "again", [0.0, 0.0], method=["sphere"], seed=1, eval_every=7)
    for name, returns in {"0-broken-off": [0.0, 0.0], "0-begun": [0.0]}.items():  # first by name
        with write_run(ours / name, returns, method=["sphere"], seed=1) as folder:
            folder.set_status("interrupted", 512, TASKS[0])
    for name, tasks in {"r0": TASKS[:1], "r1": TASKS[1:], "r2": TASKS}.items():
        write_run(ours / name, [1.0] * len(tasks), tasks, protocol="rl", method=["sphere"], seed=1)
    assert main(["compare", str(ours), str(theirs), "--json"]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    like = "with seed 1 on tasks of"
    assert [line.partition(", too;")[0] for line in lines] == [
        f"sphere: left out: {ours / 'again'}: is gym crl topk_moe sphere {like} {ours / '1'}",
        f"sphere: left out: {ours / 'r0'}: is gym rl topk_moe sphere {like} {ours / 'r2'}",  # r2 has come further
        f"sphere: left out: {ours / 'r1'}: is gym rl topk_moe sphere {like} {ours / 'r2'}",
        f"sphere: left out: {ours / '0-broken-off'}: is gym crl topk_moe sphere {like} {ours / '1'}",
        f"sphere: left out: {ours / '0-begun'}: is gym crl topk_moe sphere {like} {ours / '1'}",
    ]
    rows = {(row["score"], row["task"]): row for row in map(json.loads, printed.out.splitlines())}
    assert rows == expected


def test_agents_of_two_sequences_are_not_paired(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = folders
    write_run(ours / "short", [1.0], TASKS[:1], method=["sphere"], seed=1)
    assert main(["compare", str(ours), str(theirs)]) == 2
    said = (
        f"sphere: compare: {ours / '1'} and {ours / 'short'} differ in their tasks; give folders of one sequence each"
    )
    assert capsys.readouterr().err.strip() == said


def test_single_runs_have_no_interval_and_methods_of_one_name_are_paired(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = folders
    assert main(["compare", str(ours / "0"), str(theirs / "0"), "--json"]) == 0
    row = rows_of(capsys)["mean_return", "all tasks"]
    assert (row["difference"], row["low"], row["high"], row["seeds"]) == (6, None, None, 1)
    for name, value in (("new", 5.0), ("old", 2.0)):
        write_run(tmp_path / name / "a", [value], tasks=[TASKS[0]], method=["redo"])
        write_run(tmp_path / name / "b", [2 * value], tasks=[TASKS[0]])
    assert main(["compare", str(tmp_path / "new"), str(tmp_path / "old")]) == 0
    text = capsys.readouterr().out
    assert [line.split()[2:4] for line in text.splitlines() if "return" in line] == [
        ["topk_moe", "redo"],
        ["topk_moe", "none"],
    ]
    assert main(["compare", str(tmp_path / "new"), str(ours)]) == 2
    message = "sphere: compare: no method in common (redo, none and sphere); give folders of one method each\n"
    assert capsys.readouterr().err == message
    write_run(tmp_path / "later", [1.0], seed=9)
    assert main(["compare", str(tmp_path / "later"), str(theirs)]) == 2
    assert "have no seed that finished the same task" in capsys.readouterr().err


def test_results_hold_every_line_of_every_log(folders: tuple[Path, Path]) -> None:
    results = sp.load_results(folders[0])
    assert results.train.select("run", "method", "seed", "task", "policy_loss").rows()[:3] == [
        ("0", "sphere", 0, TASKS[0], 5.0), ("0", "sphere", 0, TASKS[1], 10.0), ("1", "sphere", 1, TASKS[0], 7.0)
    ]  # fmt: skip
    assert [table.height for table in (results.runs, results.train, results.evals, results.spectra)] == [3, 6, 6, 6]
    (part,) = results.by_sequence().values()
    assert part.train.equals(results.train)
    part = results.by_sequence()["gym"]
    one = part.runs.filter(pl.col("seed") == 1)
    assert one["run"].to_list() == ["1"]


def test_pandas_frames_need_no_pyarrow(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    results = sp.load_results(folders[0])
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "pandas", None)
        with pytest.raises(
            ImportError, match=r"^to_pandas: pandas is not installed; pip install 'sphere-rl\[pandas\]'$"
        ):
            results.to_pandas()
    pytest.importorskip("pandas", reason="pandas is not installed")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    frames = results.to_pandas()
    assert list(frames) == ["runs", "train", "evals", "spectra", "broken"]
    assert frames["evals"]["mean_return"].tolist() == [10, 20, 14, 28, 90, 90]
    assert frames["spectra"]["expert_load"][0] == [0.5, 1.5]


def test_tables_are_csv_files_whose_lists_are_text(folders: tuple[Path, Path], tmp_path: Path) -> None:
    results = sp.load_results(folders[0])
    written = {path.stem: pl.read_csv(path) for path in results.write_csv(tmp_path / "new" / "tables")}
    assert {name: table.height for name, table in written.items()} == {
        "runs": 3, "train": 6, "evals": 6, "spectra": 6, "broken": 0
    }  # fmt: skip
    assert written["runs"]["tasks"][0] == "; ".join(TASKS)
    assert written["spectra"]["expert_load"][0] == "0.5; 1.5"
    assert written["evals"]["mean_return"].to_list() == [10, 20, 14, 28, 90, 90]


def test_a_label_is_text_in_latex() -> None:
    """Every one of its ten signs, and what our tables have."""
    expected = r"\# \$ \% \& \_ \{ \} \textasciitilde{} \textasciicircum{} \textbackslash{} $\rho$ $r_e(K)$ $-$1"
    assert escaped(r"# $ % & _ { } ~ ^ \ ρ rₑ(K) −1") == expected


def test_report_writes_tables_alone(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page"), "--tables", "csv", "latex"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page' / 'tables'}\n"
    out = tmp_path / "page" / "tables"
    assert sorted(path.name for path in out.iterdir()) == [
        "differences.csv", "differences.tex", "evaluations.csv", "foresight.csv", "headline.csv", "headline.tex",
        "spectrum.csv", "tasks.csv", "tasks.tex",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == ["tables"]
    headline = (out / "headline.tex").read_text()
    assert headline.splitlines()[:3] == [
        r"\begin{tabular}{lllrrr}", r"\toprule", r"Tasks & Actor & Method & CRL & CRL, IQM & $r_e(K)$ \\"
    ]  # fmt: skip
    assert r"gym & topk\_moe & none & 14.50 [9.00, 20.00] &" in headline  # the seeds that finished both tasks
    tasks = (out / "tasks.tex").read_text()
    assert rf"{TASKS[1]} & topk\_moe & sphere & crl & 3 & 46.00" in tasks
    assert tasks.endswith("\\bottomrule\n\\end{tabular}\n")
    assert main(["report", str(tmp_path), "--tables", "html"]) == 2
    assert "invalid choice: 'html'" in capsys.readouterr().err
    assert number(-0.5) == "−0.5"
