"""Scores from tables of evaluations: one number a seed and place in the sequence of tasks, joined and as a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Float
from numpy import ndarray

GROUP = ("suite", "actor", "method")
SCORES = pl.Schema({"seed": pl.Int64, "place": pl.Int64, "task": pl.String, "score": pl.Float64})


def placed(lines: pl.DataFrame, tasks: Sequence[str]) -> pl.DataFrame:
    """Lines of logs with their ``place`` in the sequence ``tasks``: the k-th time of a task in a run is its k-th there.

    So a run that trained a task apart from the others has it at the task's place. What ``tasks`` does not have so often
    has no place.
    """
    order = {"task": pl.Series(tasks, dtype=pl.String), "place": pl.Series(range(len(tasks)), dtype=pl.Int64)}
    places = pl.DataFrame(order).with_columns(time=pl.int_range(pl.len()).over("task"))
    times = (pl.col("task_index").rank("dense").over("run", "task") - 1).cast(pl.Int64)
    known = lines.drop("place", strict=False).with_columns(time=times).with_row_index("line")
    return known.join(places, on=["task", "time"], how="left").sort("line").drop("line", "time")


def everywhere(lines: pl.DataFrame, tasks: Sequence[str]) -> pl.DataFrame:
    """The lines of `placed`, those of protocol rl at every place of their task: a fresh agent is as good at each.

    A place that the runs of a seed have trained keeps their own lines; the others have those of the task's first.
    """
    first = {"task": pl.String, "place": pl.Int64, "later": pl.Int64}
    again = [(task, tasks.index(task), place) for place, task in enumerate(tasks) if task in tasks[:place]]
    alone = lines.filter(pl.col("protocol") == "rl")
    copies = alone.join(pl.DataFrame(again, schema=first, orient="row"), on=["task", "place"])
    copies = copies.with_columns(place=pl.col("later")).join(alone, on=[*GROUP, "seed", "place"], how="anti")
    return pl.concat([lines, copies.select(lines.columns)])


def final_scores(evals: pl.DataFrame, tasks: Sequence[str], column: str = "success_final") -> pl.DataFrame:
    """Score at the end of training on each task: evals of one experiment (phase final) → seed, place, task, score.

    ``place`` is that of `placed` in the sequence ``tasks``; scores of protocol rl stand at every place of their task.
    """
    return _scores(evals, tasks, column, "final")


def retention_scores(evals: pl.DataFrame, tasks: Sequence[str], column: str = "success_final") -> pl.DataFrame:
    """Score on each task after the last one: seed, place, task, score."""
    return _scores(evals, tasks, column, "retention")


def _scores(evals: pl.DataFrame, tasks: Sequence[str], column: str, phase: str) -> pl.DataFrame:
    return _known(placed(evals, tasks).filter(pl.col("phase") == phase), tasks, column)


def _known(lines: pl.DataFrame, tasks: Sequence[str], column: str) -> pl.DataFrame:
    """The score of every line of `placed` that has a place and a score, at every place of its task."""
    known = everywhere(lines, tasks).filter(pl.col("place").is_not_null() & pl.col(column).is_not_null())
    return known.select("seed", "place", "task", score=column).cast(SCORES)


def area_scores(evals: pl.DataFrame, tasks: Sequence[str], steps: int, column: str = "success_final") -> pl.DataFrame:
    """`area_under_curve` of every finished task, as scores: evals of one protocol → seed, place, task, score."""
    curves = placed(evals.filter(pl.col("phase").is_in(["train", "final"])), tasks)
    finished = curves.filter(pl.col("phase") == "final").select("run", "task_index")
    curves = curves.join(finished, on=["run", "task_index"], how="semi").filter(pl.col(column).is_not_null())
    each = curves.group_by("protocol", *GROUP, "run", "seed", "place", "task", maintain_order=True)
    areas = each.agg("task_step", column).with_columns(
        pl.struct("task_step", column).map_elements(
            lambda curve: area_under_curve(curve["task_step"], curve[column], steps), return_dtype=pl.Float64
        ).alias(column)
    )  # fmt: skip
    return _known(areas, tasks, column)


def area_under_curve(task_steps: Sequence[int], scores: Sequence[float], steps: int) -> float:
    """Mean score over training on a task, in the score's unit: trapezoids through the evaluations, divided by steps.

    Before the first evaluation the score counts as the first one's, after the last as the last one's.
    """
    order = np.argsort(task_steps)
    x = np.clip(np.asarray(task_steps, float)[order], 0, steps)
    y = np.asarray(scores, float)[order]
    x, y = np.r_[0.0, x, steps], np.r_[y[0], y, y[-1]]
    return float(np.trapezoid(y, x) / steps)


def forgetting_scores(final: pl.DataFrame, retention: pl.DataFrame) -> pl.DataFrame:
    """Score at the end of task i − retention of task i; positive: forgotten. The last task counts, with about 0.

    Raises:
        ValueError: one of them has two scores of a seed at a place, of two runs.
    """
    both = _joined(final, retention, "_later")
    return both.select("seed", "place", "task", score=pl.col("score") - pl.col("score_later"))


def paired_scores(ours: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Return ours − theirs for every (seed, task) that both have: columns seed, place, score.

    Raises:
        ValueError: one of them has two scores of a seed at a place, of two runs.
    """
    both = _joined(ours, theirs, "_theirs")
    return both.select("seed", "place", score=pl.col("score") - pl.col("score_theirs"))


def _joined(scores: pl.DataFrame, others: pl.DataFrame, suffix: str) -> pl.DataFrame:
    """Rows for every (seed, place) that both have; columns of the others with the suffix."""
    for table in (scores, others):
        check_one_run(table)
    return scores.join(others, on=["seed", "place"], suffix=suffix, validate="1:1")


def check_one_run(scores: pl.DataFrame) -> None:
    """Raise ValueError where a seed has two scores at a place, of two runs."""
    if scores.select("seed", "place").is_duplicated().any():
        raise ValueError("two runs of one seed on one task; expected evaluations of one run of each")


def matrix(scores: pl.DataFrame, places: Sequence[int] | None = None) -> Float[ndarray, "S T"]:
    """Scores [S, T] of a table with columns seed, place and score, NaN where there is none.

    Raises:
        ValueError: a seed has two scores at a place, of two runs.
    """
    check_one_run(scores)
    places = list(places) if places is not None else sorted(scores["place"].unique())
    seeds = sorted(scores["seed"].unique())
    filled = np.full((len(seeds), len(places)), np.nan)
    for seed, place, score in scores.select("seed", "place", "score").iter_rows():
        if place in places and score is not None:
            filled[seeds.index(seed), places.index(place)] = score
    return filled
