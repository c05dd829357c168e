"""The rule by which the pilot chooses a default, on numbers made up for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import claim
import polars as pl
import pytest
import silent
from pilot import Arm, arms, qualified

from sphere_rl.results import load_results
from sphere_rl.suites.metaworld import CW10

RESULTS = Path(__file__).parents[1] / "docs" / "results"
WANDERING = RESULTS / "wandering"


def held(page: str, rows: Iterable[Sequence[str]]) -> None:
    """These rows of a table are in a page."""
    text = (RESULTS / page).read_text()
    assert [row for row in rows if "| " + " | ".join(row) + " |" not in text] == []


def section(page: str, title: str) -> str:
    """What stands in a page below a title."""
    return (RESULTS / page).read_text().partition(f"{title}\n")[2].partition("\n## ")[0]


def test_dead_features_and_lost_returns_disqualify() -> None:
    none = Arm("none", 20, [100.0, 80.0], [9.0, 9.0], [1.0, 1.0])
    dead = Arm("literal_grad_01", 0, [200.0, 200.0], [50.0, 50.0], [1.0, 1.0])
    lost = Arm("free_grad_03", 10, [90.0, 60.0], [60.0, 60.0], [1.0, 1.0])
    good = Arm("free_grad_01", 10, [90.0, 70.0], [20.0, 22.0], [1.0, 1.0])
    other = Arm("layernorm", 10, [90.0, 90.0], [99.0, 99.0], [1.0, 1.0])
    assert qualified([none, dead, lost, good, other]) == [good]
    assert good.mean_rank == 21.0


def test_the_page_has_the_numbers_of_the_published_runs() -> None:
    page = (RESULTS / "index.md").read_text()
    section = page.partition("## The pilot")[2].partition("| arm |")[2].partition("\n\n")[0]
    rows = [[re.sub(r"[*`]", "", cell).strip() for cell in line.split("|")[1:-1]] for line in section.splitlines()
            if line.startswith(("| `", "| **`"))]  # fmt: skip
    found = arms(load_results(RESULTS / "pilot"))
    assert [[row[0], *row[2:]] for row in sorted(rows)] == [
        [a.name, str(a.lowest_rank), several(a.returns, 0), several(a.ranks, 1), several(a.success, 2)]
        for a in sorted(found, key=lambda arm: arm.name)
    ]
    best = max(qualified(found), key=lambda arm: arm.mean_rank)
    assert [row[0] for row in rows if "the rule's choice" in row[1]] == [best.name]


def test_so_have_hammer_then_push_wall() -> None:
    """By the rule the mean over the first three seeds counts, which every arm has."""
    rows = silent.rows(load_results(RESULTS / "silent"))
    held("index.md", rows)
    seeds = {"free_grad_003": 3, "free_grad_01": 3, "literal_loss_005": 4, "none": 4}
    assert [row[0] for row in rows] == [f"{arm}, {seed}" for arm, count in seeds.items() for seed in range(count)]
    ends = {arm: [float(row[-1]) for row in rows if row[0].startswith(f"{arm},")] for arm in seeds}
    means = {arm: round(sum(values[:3]) / 3) for arm, values in ends.items()}
    assert means["free_grad_01"] < means["none"] < means["free_grad_003"] < means["literal_loss_005"]
    assert all(f"{mean}" in section("index.md", "## Hammer, then push-wall") for mean in means.values())
    assert all(ours > plain for ours, plain in zip(ends["literal_loss_005"], ends["none"], strict=True))


def test_so_have_their_correlations() -> None:
    """Of returns at the end of push-wall with means over it: over 14 runs, on own and on fixed states."""
    results, found = load_results(RESULTS / "silent"), {}
    later = results.evals.filter(pl.col("phase") == "final", pl.col("task") == "push-wall")
    for name in ("r_e_K", "feature_norm", "output_size"):
        for batch in ("rollout", "probe"):
            within = results.spectra.filter(pl.col("task") == "push-wall", pl.col("batch") == batch)
            table = later.join(within.group_by("run").agg(pl.col(name).mean()), on="run")
            assert table.height == 14
            (found[name, batch],) = table.select(pl.corr("mean_return", name, method="spearman")).row(0)
    rank, fixed_rank, length, fixed_length, size, _ = claim.several(found.values()).split(", ")
    text = " ".join(section("index.md", "## Hammer, then push-wall").split())
    assert f"of {rank} on own states and {fixed_rank} on the fixed" in text
    assert f"with that return of {length} on own states and {fixed_length} on the fixed ones." in text
    assert f"the size of mean actions: {size} on own states." in text


def test_so_have_the_ten_tasks() -> None:
    results = load_results(RESULTS / "cw10")
    for head, rows in (claim.rows(results), claim.arms(results), claim.foretold(results), claim.proxy(results)):
        held("index.md", [head, *rows])


@pytest.mark.parametrize("task", ["push-wall", "push"])
def test_so_have_single_tasks(task: str) -> None:
    for folder in ("cw10", "inherited", "alone"):
        head, rows = claim.within(load_results(RESULTS / folder), task)
        held("index.md", [head, *rows])


def test_so_have_the_runs_with_goals_that_wandered() -> None:
    held("wandering.md", silent.rows(load_results(WANDERING / "silent")))
    results = load_results(WANDERING / "cw10")
    for head, rows in (claim.rows(results), claim.arms(results, claim.LEARNED[1:])):
        held("wandering.md", [head, *rows])


def test_the_arms_of_the_ten_tasks_by_hand() -> None:
    results = load_results(WANDERING / "cw10")
    ends = results.evals.filter(pl.col("phase") == "final", pl.col("seed") == 0)
    score = {(method, task): end for method, task, end in ends.select("method", "task", "success_final").rows()}
    _, rows = claim.arms(results)
    tasks = {"all ten": ends["task"].unique().to_list(), "learned alone": list(claim.LEARNED)}
    for (name, part, seeds, *_), method in zip(rows, ["none", "sphere_free", "sphere_literal"] * 2, strict=True):
        mean = sum(score[method, task] for task in tasks[part]) / len(tasks[part])
        assert (name, seeds.split(", ")[0]) == (claim.NAMES[method], f"{mean:.2f}")


def test_tasks_learned_alone() -> None:
    """Hammer is the first task of a sequence, which is the same run as the task alone."""
    runs = load_results(RESULTS / "alone").evals.filter(pl.col("run").str.contains("-raw-"))
    older = (pl.read_ndjson(path) for path in sorted((RESULTS / "topk").glob("*-eval.jsonl")))
    first = load_results(RESULTS / "cw10").evals.filter(pl.col("run") == "crl-none-seed0", pl.col("task_index") == 0)
    ends = pl.concat([runs, *older, first], how="diagonal_relaxed").filter(pl.col("phase") == "final")
    assert sorted(ends.filter(pl.col("success_final") >= 0.5)["task"]) == sorted(claim.LEARNED)
    assert sorted(ends["task"]) == sorted(CW10)
    page = (RESULTS / "alone.md").read_text()
    assert f"Over all ten that is {ends['success_final'].mean():.2f}" in page
    (hammer,) = ends.filter(pl.col("task") == "hammer").select("success_final", "success_once", "mean_return").rows()
    assert "| hammer | **{:.2f}** | {:.2f} | {:.0f} |".format(*hammer) in page


def test_so_have_tasks_that_begin_with_the_actor_of_another_run() -> None:
    results, page = load_results(WANDERING / "inherited"), (RESULTS / "wandering.md").read_text()
    for run, seed in results.runs.select("run", "seed").rows():
        ends = results.evals.filter(pl.col("run") == run, pl.col("task_step") >= 500_000).sort("task_step")
        returns = [f"{ends['mean_return'][place]:.0f}" for place in (0, -1)]
        spectra = results.spectra.filter(pl.col("run") == run).sort("global_step")
        own = spectra.filter(pl.col("batch") == "rollout")
        label = run.removeprefix("rl-").removesuffix(f"-seed{seed}")
        name = f"(`{label}`)" if seed == 0 else f"(`{label}`, seed {seed})"
        (row,) = [line for line in page.splitlines() if line.startswith("|") and name in line]
        cells = [cell.strip(" *") for cell in row.split("|")[3:-1]]
        rank, gate, size = (
            [f"{own[column][place]:.{digits}f}" for place in (0, -1)]
            for column, digits in (("r_e_K", 1), ("gate_entropy", 2), ("output_size", 1))
        )
        success = f"{ends['success_final'][-1]:.2f}"
        assert cells == [claim.ranks(spectra), *(", ".join(each) for each in (rank, gate, size, returns)), success]


def several(values: list[float], digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)
