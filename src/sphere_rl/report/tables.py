"""The page's tables beyond the headline: r_e(K) at the ends of the tasks, and every task by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from sphere_rl import statistics
from sphere_rl.statistics import Estimate

COLUMNS = {"success_final": "Success (final)", "mean_return": "Return", "r_e_K": "rₑ(K)"}
"""Numbers of the table by task."""


def rank_scores(evals: pl.DataFrame, spectra: pl.DataFrame, tasks: Sequence[str]) -> pl.DataFrame:
    """r_e(K) on the probe batch as last measured on each finished task: seed, place, task, score.

    ``evals``, ``spectra``: of one protocol and method.
    """
    finished = evals.filter(pl.col("phase") == "final")
    measured = spectra.filter((pl.col("batch") == "probe") & pl.col("r_e_K").is_not_null()).sort("task_step")
    last = measured.group_by("run", "task_index", maintain_order=True).agg(pl.col("r_e_K").last())
    return statistics.final_scores(finished.join(last, on=["run", "task_index"], how="left"), tasks, "r_e_K")


def final_rank(evals: pl.DataFrame, spectra: pl.DataFrame, tasks: Sequence[str]) -> Estimate | None:
    """Mean over tasks and seeds of `rank_scores` in CRL, with its interval; seeds that have all tasks count."""
    return statistics.estimate(statistics.matrix(_ranks(evals, spectra, tasks), range(len(tasks))), "crl")


def rank_gain(
    ours: tuple[pl.DataFrame, pl.DataFrame], theirs: tuple[pl.DataFrame, pl.DataFrame], tasks: Sequence[str]
) -> Estimate | None:
    """Difference of two methods' `final_rank`, paired by seed and task; each method: its evals and its spectra."""
    paired = statistics.paired_scores(*(_ranks(evals, spectra, tasks) for evals, spectra in (ours, theirs)))
    return statistics.estimate(statistics.matrix(paired, range(len(tasks))), "crl")


def _ranks(evals: pl.DataFrame, spectra: pl.DataFrame, tasks: Sequence[str]) -> pl.DataFrame:
    crl = pl.col("protocol") == "crl"
    return rank_scores(evals.filter(crl), spectra.filter(crl), tasks)


def by_task(
    rows: Sequence[Mapping[str, Any]], evals: pl.DataFrame, spectra: pl.DataFrame, tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Task by method and protocol: success and return of the final evaluation, and r_e(K), each an `Estimate` or None.

    ``rows``: the headline's, with their ``label``. ``seeds``: those that have finished the task. Rows without any
    finished run are left out.
    """
    scored = []
    for row in rows:
        names = {name: row[name] for name in ("label", "actor", "method")}
        for protocol in ("crl", "rl"):
            chosen = (pl.col("protocol") == protocol) & (pl.col("label") == row["label"])
            own = evals.filter(chosen)
            scores = {name: statistics.final_scores(own, tasks, name) for name in ("success_final", "mean_return")}
            scored.append((names, protocol, scores | {"r_e_K": rank_scores(own, spectra.filter(chosen), tasks)}))
    found = []
    for place, task in enumerate(tasks):
        for names, protocol, scores in scored:
            numbers = {
                name: statistics.estimate(statistics.matrix(table, [place]), protocol) for name, table in scores.items()
            }
            seeds = max((number.seeds for number in numbers.values() if number), default=0)
            if seeds:
                found.append({"place": place, "task": task, "protocol": protocol, "seeds": seeds} | names | numbers)
    return found
