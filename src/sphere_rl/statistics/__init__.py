"""Statistics of runs: pure functions of tables and of matrices of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.statistics.estimates import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    bootstrap,
    complete,
    ends,
    estimate,
    forward_transfer,
    gap,
    improvement,
    interval,
    iqm,
    mean,
    profile,
)
from sphere_rl.statistics.scores import (
    GROUP,
    area_scores,
    area_under_curve,
    check_one_run,
    everywhere,
    final_scores,
    forgetting_scores,
    matrix,
    paired_scores,
    placed,
    retention_scores,
)

SHARES = ("success_final", "success_once")
"""Scores between 0 and 1; forward transfer has no meaning for others."""


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
    curves = by_protocol if column in SHARES else dict.fromkeys(by_protocol, evals.clear())
    areas = {name: matrix(area_scores(part, tasks, steps, column), places) for name, part in curves.items()}
    return {
        "rl": estimate(rl, "rl", tasks=tasks),
        "crl": estimate(crl, "crl"),
        "crl_iqm": estimate(crl, "crl", iqm),
        "gap": gap(rl, crl, tasks),
        "retention": estimate(matrix(kept, places), "crl"),
        "forgetting": estimate(matrix(lost, places), "crl"),
        "forward_transfer": forward_transfer(areas["crl"], areas["rl"], tasks),
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
        "rl": estimate(paired["rl"], "rl", tasks=tasks),
        "crl": estimate(paired["crl"], "crl"),
        "crl_iqm": estimate(paired["crl"], "crl", iqm),
        "gap": gap(paired["rl"], paired["crl"], tasks),
        "retention": estimate(paired["retention"], "crl"),
        "improvement": improvement(mine, yours, "crl"),
    }


__all__ = [
    "CONFIDENCE", "GROUP", "RESAMPLES", "SHARES", "Estimate", "area_scores", "area_under_curve", "bootstrap",
    "check_one_run", "complete", "differences", "ends", "estimate", "everywhere", "final_scores", "forgetting_scores",
    "forward_transfer", "gap", "headline", "improvement", "interval", "iqm", "matrix", "mean", "paired_scores",
    "placed", "profile", "retention_scores",
]  # fmt: skip
