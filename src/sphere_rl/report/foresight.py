"""What an agent is as it enters a task, beside what it reaches there.

An entry is one agent on one task of a sequence, the first excepted: its metrics on the probe batch as last measured on
the task before, so that nothing of the new task is in them, and its score at the end of training on the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from sphere_rl.correlations import correlation_interval
from sphere_rl.numbers import with_interval


@dataclass(frozen=True)
class Foresight:
    """Spearman's rank correlation of a metric at entry with the score at the end, over ``entries`` of ``runs``.

    ``within``: the same after the mean of each task is taken from both, so that tasks which are hard for all agents say
    nothing; of tasks that two runs or more have entered. ``None`` where there are fewer than three or no differences.
    Each has a 95 % interval under resampling of runs, ``None`` with one run.
    """

    entries: int
    runs: int
    spearman: float | None
    within: float | None
    spearman_low: float | None = None
    spearman_high: float | None = None
    within_low: float | None = None
    within_high: float | None = None

    def __str__(self) -> str:
        whole = with_interval(self.spearman, self.spearman_low, self.spearman_high)
        within = with_interval(self.within, self.within_low, self.within_high)
        runs = f"{self.runs} run{'s' if self.runs != 1 else ''}"
        return f"Spearman {whole} over {self.entries} entries of {runs}; {within} within tasks"


def entries(evals: pl.DataFrame, spectra: pl.DataFrame, score: str) -> pl.DataFrame:
    """A row an entry: run, label, place, task, ``score``, and every metric at the end of the task before."""
    crl = pl.col("protocol") == "crl"
    final = evals.filter(crl & (pl.col("phase") == "final") & (pl.col("place") > 0) & pl.col(score).is_not_null())
    final = final.select("run", "label", "place", "task", score=score)
    before = spectra.filter(crl & (pl.col("batch") == "probe")).sort("task_step")
    before = before.group_by("run", "place", maintain_order=True).last().drop("label", "task")
    return final.join(before.with_columns(pl.col("place") + 1), on=["run", "place"]).sort("label", "run", "place")


def foresight(table: pl.DataFrame, metric: str) -> Foresight:
    """What one metric of `entries` foretells."""
    known = table.filter(pl.col(metric).is_not_null() & pl.col(metric).is_finite())
    peers = known.filter(pl.col("run").n_unique().over("place") > 1)
    left = peers.select("run", *(_left(name, known[name].abs().max() or 1.0) for name in (metric, "score")))
    (whole, *ends), (within, *within_ends) = _spearman(known, metric), _spearman(left, metric)
    return Foresight(known.height, known["run"].n_unique(), whole, within, *ends, *within_ends)


def _left(name: str, largest: Any) -> pl.Expr:
    """What is left of a column when the mean of each task is taken out, without the rounding, which has ranks, too."""
    return ((pl.col(name) - pl.col(name).mean()).over("place") / largest).round(12)


def _spearman(table: pl.DataFrame, metric: str) -> tuple[float | None, float | None, float | None]:
    """The correlation and its interval's ends."""
    from scipy.stats import spearmanr

    if table.height < 3 or min(table[name].n_unique() for name in (metric, "score")) < 2:
        return None, None, None
    x, y = (table[name].cast(pl.Float64).to_numpy() for name in (metric, "score"))
    found: Any = spearmanr(x, y)
    low, high = correlation_interval(x, y, table["run"].to_list(), ranks=True)
    return float(found.statistic), low, high
