"""Statistics of runs: pure functions of tables, with bootstrap intervals from a seeded generator.

Scores are a matrix [S, T], seeds by tasks, of the success at the end of training on each task. What is resampled
follows the protocol: in ``rl`` every entry is a run of its own, so seeds are drawn anew within each task (the task is
the stratum, Agarwal et al. 2021); in ``crl`` a row is one agent, so whole rows are drawn. One seed has no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from numpy import ndarray

CONFIDENCE = 0.95
RESAMPLES = 2000
GROUP = ("suite", "actor", "method")
SHARES = ("success_final", "success_once")
"""Scores between 0 and 1; forward transfer has no meaning for others."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % percentile bootstrap interval, and the number of seeds behind it."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{bounds}"


Statistic = Callable[[Float[ndarray, "*b n"]], Float[ndarray, "*b"]]


def mean(values: Float[ndarray, "*b n"]) -> Float[ndarray, "*b"]:
    """Mean over the last axis: average final success, where the values are final successes."""
    return np.asarray(values.mean(-1))


def iqm(values: Float[ndarray, "*b n"]) -> Float[ndarray, "*b"]:
    """Interquartile mean: the mean without the lowest and the highest quarter (Agarwal et al. 2021)."""
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(values, 0.25, axis=-1))


def estimate(
    scores: Float[ndarray, "S T"], protocol: str, statistic: Statistic = mean, *, seed: int = 0
) -> Estimate | None:
    """Statistic of all entries with its interval; ``None`` without scores. Seeds that miss a task are left out."""
    scores = complete(scores)
    if not scores.size:
        return None
    draws = bootstrap(scores, protocol, statistic, seed=seed)
    low, high = interval(draws)
    return Estimate(float(statistic(scores.ravel())), low, high, len(scores))


def bootstrap(
    scores: Float[ndarray, "*k S T"], protocol: str, statistic: Statistic = mean, *, seed: int = 0
) -> Float[ndarray, "*k B"] | None:
    """Draws of the statistic under resampling of seeds; ``None`` for a single seed, whose spread is unknown.

    Leading axes are several matrices of the same runs, which share their draws.
    """
    from scipy.stats import bootstrap as resample

    if scores.shape[-2] < 2:
        return None

    def of_tasks(*tasks: Float[ndarray, "*b S"], axis: int = -1) -> Float[ndarray, "*b"]:
        return statistic(np.concatenate(tasks, axis))

    result = resample(
        tuple(np.moveaxis(scores, -1, 0)),
        of_tasks,
        paired=protocol == "crl",
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.bootstrap_distribution


def interval(draws: Float[ndarray, "B"] | None) -> tuple[float, float] | tuple[None, None]:
    """The central 95 % of bootstrap draws."""
    if draws is None:
        return None, None
    low, high = ends(draws)
    return float(low), float(high)


def ends(draws: Float[ndarray, "*k B"]) -> Float[ndarray, "2 *k"]:
    """Where the central 95 % of draws begin and end."""
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(draws, [tail, 1 - tail], axis=-1)


def paired_scores(ours: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Return ours − theirs for every (seed, task) that both have: columns seed, place, score.

    Raises:
        ValueError: one of them has two scores of a seed at a place, of two runs.
    """
    both = _joined(ours, theirs, "_theirs")
    return both.select("seed", "place", score=pl.col("score") - pl.col("score_theirs"))


def improvement(
    ours: Float[ndarray, "S T"], theirs: Float[ndarray, "R T"], protocol: str, *, seed: int = 0
) -> Estimate | None:
    """Probability of improvement: that a run of ours scores above one of theirs on a task drawn at random.

    Mean over tasks of P(X > Y) + P(X = Y)/2, the Mann-Whitney statistic over its largest value (Agarwal et al. 2021);
    the two sets of runs are resampled independently. Its interval needs two seeds of both; ``seeds`` is the smaller
    number.
    """
    from scipy.stats import bootstrap as resample

    ours, theirs = complete(ours), complete(theirs)
    if not ours.size or not theirs.size:
        return None
    above = np.heaviside(ours[:, None] - theirs[None], 0.5)  # [S, R, T]
    tasks = range(above.shape[-1])

    def won(*drawn: Int[ndarray, "..."], axis: int = -1) -> Float[ndarray, "..."]:  # rows of ours, of theirs, by task
        pairs = [(i[..., :, None], j[..., None, :]) for i, j in zip(drawn[::2], drawn[1::2], strict=True)]
        if protocol == "crl":
            return np.asarray(above[pairs[0]].mean((-3, -2, -1)))
        return np.mean([above[i, j, task].mean((-2, -1)) for (i, j), task in zip(pairs, tasks, strict=True)], axis=0)

    low = high = None
    if min(above.shape[:2]) > 1:
        rows = (np.arange(len(ours)), np.arange(len(theirs))) * (1 if protocol == "crl" else len(tasks))
        result = resample(rows, won, vectorized=True, n_resamples=RESAMPLES, method="percentile",
                          rng=np.random.default_rng(seed))  # fmt: skip
        low, high = interval(result.bootstrap_distribution)
    return Estimate(float(above.mean()), low, high, min(above.shape[:2]))


def profile(
    scores: Float[ndarray, "S T"], thresholds: Float[ndarray, "Q"], protocol: str
) -> Float[ndarray, "3 Q"] | None:
    """Performance profile: share of (seed, task) whose score is above each threshold, and its 95 % interval's ends.

    ``None`` without scores; with one seed the ends are the share itself. Source: Agarwal et al. 2021.
    """
    scores = complete(scores)
    if not scores.size:
        return None
    above = (scores > thresholds[:, None, None]).astype(float)
    share, draws = above.mean((1, 2)), bootstrap(above, protocol)
    return np.stack([share, *([share, share] if draws is None else ends(draws))])


def gap(rl: Float[ndarray, "S T"], crl: Float[ndarray, "R T"], *, seed: int = 0) -> Estimate | None:
    """Mean over RL runs − mean over CRL runs; the two are resampled independently. Positive: continual learning costs.

    ``seeds`` is the smaller of the two numbers of seeds.
    """
    rl, crl = complete(rl), complete(crl)
    if not rl.size or not crl.size:
        return None
    draws = bootstrap(rl, "rl", seed=seed), bootstrap(crl, "crl", seed=seed + 1)
    low, high = interval(None if draws[0] is None or draws[1] is None else draws[0] - draws[1])
    return Estimate(float(rl.mean() - crl.mean()), low, high, min(len(rl), len(crl)))


def complete(scores: Float[ndarray, "S T"]) -> Float[ndarray, "R T"]:
    """The seeds that have a score on every task."""
    return scores[~np.isnan(scores).any(axis=1)] if scores.size else scores


def check_one_run(scores: pl.DataFrame) -> None:
    """Raise ValueError where a seed has two scores at a place, of two runs."""
    if scores.select("seed", "place").is_duplicated().any():
        raise ValueError("two runs of one seed on one task; expected evaluations of one run of each")


def _joined(scores: pl.DataFrame, others: pl.DataFrame, suffix: str) -> pl.DataFrame:
    """Rows for every (seed, place) that both have; columns of the others with the suffix."""
    for table in (scores, others):
        check_one_run(table)
    return scores.join(others, on=["seed", "place"], suffix=suffix, validate="1:1")


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


def final_scores(evals: pl.DataFrame, tasks: Sequence[str], column: str = "success_final") -> pl.DataFrame:
    """Score at the end of training on each task: evals of one experiment (phase final) → seed, place, task, score.

    ``place`` is that of `placed` in the sequence ``tasks``; scores of protocol rl stand at every place of their task.
    """
    return _scores(evals.filter(pl.col("phase") == "final"), tasks, column)


def retention_scores(evals: pl.DataFrame, tasks: Sequence[str], column: str = "success_final") -> pl.DataFrame:
    """Score on each task after the last one: seed, place, task, score."""
    return _scores(evals.filter(pl.col("phase") == "retention"), tasks, column)


def forgetting_scores(final: pl.DataFrame, retention: pl.DataFrame) -> pl.DataFrame:
    """Score at the end of task i − retention of task i; positive: forgotten. The last task counts, with about 0.

    Raises:
        ValueError: one of them has two scores of a seed at a place, of two runs.
    """
    both = _joined(final, retention, "_later")
    return both.select("seed", "place", "task", score=pl.col("score") - pl.col("score_later"))


def area_under_curve(task_steps: Sequence[int], scores: Sequence[float], steps: int) -> float:
    """Mean score over training on a task, in the score's unit: trapezoids through the evaluations, divided by steps.

    Before the first evaluation the score counts as the first one's, after the last as the last one's.
    """
    order = np.argsort(task_steps)
    x = np.clip(np.asarray(task_steps, float)[order], 0, steps)
    y = np.asarray(scores, float)[order]
    x, y = np.r_[0.0, x, steps], np.r_[y[0], y, y[-1]]
    return float(np.trapezoid(y, x) / steps)


def forward_transfer(crl_area: float, rl_area: float) -> float | None:
    """(CRL area − RL area)/(1 − RL area); ``None`` where RL is at 1 throughout. Source: Wołczyk et al. 2021."""
    return None if rl_area >= 1 else (crl_area - rl_area) / (1 - rl_area)


def forward_transfer_scores(
    evals: pl.DataFrame, tasks: Sequence[str], steps: int, column: str = "success_final"
) -> pl.DataFrame:
    """Forward transfer of each CRL seed on each task against the mean area of the RL runs: seed, place, task, score.

    ``evals``: both protocols of one method.
    """
    curves = placed(evals.filter(pl.col("phase").is_in(["train", "final"]) & pl.col(column).is_not_null()), tasks)
    key = ("protocol", "run", "seed", "place", "task")
    areas: list[dict[str, Any]] = [
        dict(zip(key, names, strict=True))
        | {"area": area_under_curve(curve["task_step"].to_list(), curve[column].to_list(), steps)}
        for names, curve in curves.filter(pl.col("place").is_not_null()).group_by(key, maintain_order=True)
    ]
    alone: dict[str, list[float]] = {}
    for one in areas:
        if one["protocol"] == "rl":
            alone.setdefault(one["task"], []).append(one["area"])
    finished = {*final_scores(evals.filter(pl.col("protocol") == "crl"), tasks, column).select("seed", "place").rows()}
    rows = [
        {name: one[name] for name in ("seed", "place", "task")}
        | {"score": forward_transfer(one["area"], float(np.mean(alone[one["task"]])))}
        for one in areas
        if one["protocol"] == "crl" and one["task"] in alone and (one["seed"], one["place"]) in finished
    ]
    return pl.DataFrame(rows, schema=SCORES)


def headline(
    evals: pl.DataFrame, tasks: dict[str, tuple[str, ...]], column: str = "success_final"
) -> list[dict[str, Any]]:
    """One row a (suite, actor, method): each number an `Estimate`, or ``None`` where the runs do not give it yet.

    ``tasks``: each suite's sequence. A number counts only seeds that have all of it.
    """
    return [
        dict(zip(GROUP, key, strict=True)) | _summary(group, tasks[str(key[0])], column)
        for key, group in evals.group_by(GROUP, maintain_order=True)
    ]


def _summary(evals: pl.DataFrame, tasks: Sequence[str], column: str) -> dict[str, Estimate | None]:
    places = range(len(tasks))
    by_protocol = {name: evals.filter(pl.col("protocol") == name) for name in ("rl", "crl")}
    scores = {name: final_scores(part, tasks, column) for name, part in by_protocol.items()}
    rl, crl = (matrix(scores[name], places) for name in ("rl", "crl"))
    kept = retention_scores(by_protocol["crl"], tasks, column)
    lost = forgetting_scores(scores["crl"], kept)
    trained = evals.filter(pl.col("phase") == "final")["task_step"].to_list()
    steps = max(trained, default=1)
    transfer = forward_transfer_scores(evals if column in SHARES else evals.clear(), tasks, steps, column)
    return {
        "rl": estimate(rl, "rl"),
        "crl": estimate(crl, "crl"),
        "crl_iqm": estimate(crl, "crl", iqm),
        "gap": gap(rl, crl),
        "retention": estimate(matrix(kept, places), "crl"),
        "forgetting": estimate(matrix(lost, places), "crl"),
        "forward_transfer": estimate(matrix(transfer, places), "crl"),
    }


def differences(
    ours: pl.DataFrame, theirs: pl.DataFrame, tasks: Sequence[str], column: str = "success_final"
) -> dict[str, Estimate | None]:
    """What one method gains over another, paired by seed and task: evaluations of each → ours − theirs of each number.

    ``gap``: the difference of the two RL − CRL gaps, from the paired differences in rl and in crl. ``improvement``: not
    paired, the probability of it in crl.
    """
    paired: dict[str, Float[ndarray, "S T"]] = {}
    places = range(len(tasks))
    for name, protocol, scores in (
        ("rl", "rl", final_scores), ("crl", "crl", final_scores), ("retention", "crl", retention_scores),
    ):  # fmt: skip
        both = [scores(evals.filter(pl.col("protocol") == protocol), tasks, column) for evals in (ours, theirs)]
        paired[name] = matrix(paired_scores(*both), places)
    crl = (final_scores(evals.filter(pl.col("protocol") == "crl"), tasks, column) for evals in (ours, theirs))
    mine, yours = (matrix(scores, places) for scores in crl)
    return {
        "rl": estimate(paired["rl"], "rl"),
        "crl": estimate(paired["crl"], "crl"),
        "crl_iqm": estimate(paired["crl"], "crl", iqm),
        "gap": gap(paired["rl"], paired["crl"]),
        "retention": estimate(paired["retention"], "crl"),
        "improvement": improvement(mine, yours, "crl"),
    }


def _scores(evals: pl.DataFrame, tasks: Sequence[str], column: str) -> pl.DataFrame:
    lines = everywhere(placed(evals.filter(pl.col(column).is_not_null()), tasks), tasks)
    return lines.filter(pl.col("place").is_not_null()).select("seed", "place", "task", score=column).cast(SCORES)


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


SCORES = pl.Schema({"seed": pl.Int64, "place": pl.Int64, "task": pl.String, "score": pl.Float64})
