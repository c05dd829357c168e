"""Correlation of what runs measured, with intervals that know that a run's measurements are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.statistics import RESAMPLES, interval


def correlation_interval(
    x: Float[ndarray, "n"], y: Float[ndarray, "n"], groups: Sequence[Any], *, ranks: bool = False, seed: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of Pearson's r, with ``ranks`` of Spearman's, under resampling of whole ``groups``.

    What one run measures again and again is not independent, so runs are drawn, not their lines. One group has none.
    """
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return None, None
    chances = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), chances, RESAMPLES).astype(float)  # [B, G]
    if ranks:
        times = drawn[:, group]
        a, b = (_midranks(values, times) for values in (x, y))
        n, *sums = ((times * part).sum(-1) for part in (np.ones_like(a), a, b, a * a, b * b, a * b))
    else:
        a, b = x - x.mean(), y - y.mean()
        n, *sums = (drawn @ np.bincount(group, part) for part in (np.ones_like(a), a, b, a * a, b * b, a * b))
    mean_a, mean_b, square_a, square_b, product = (total / n for total in sums)
    spread = (square_a - mean_a**2) * (square_b - mean_b**2)
    known = spread > 1e-12 * square_a * square_b
    found = (product - mean_a * mean_b)[known] / np.sqrt(spread[known])
    return interval(found if found.size else None)


def _midranks(values: Float[ndarray, "n"], times: Float[ndarray, "B n"]) -> Float[ndarray, "B n"]:
    """Ranks of values that occur so often each, equal ones at the middle of theirs."""
    _, starts, of = np.unique(values[order := np.argsort(values)], return_index=True, return_inverse=True)
    alike = np.add.reduceat(times[:, order], starts, axis=1)
    found = np.empty_like(times)
    found[:, order] = (np.cumsum(alike, axis=1) - alike + (alike + 1) / 2)[:, of]
    return found


def correlation(table: pl.DataFrame) -> dict[str, Any]:
    """Batches, mean ranks and Pearson's r of r_e(A) and r_e(K) with its 95 % interval.

    The interval is that of `correlation_interval` where the table names runs, so one run has none; else Fisher's z, for
    independent batches. r is None where one of them is constant or there are fewer than three batches, the interval
    where fewer than four.
    """
    from scipy.stats import pearsonr

    a, k = table["r_e_A"], table["r_e_K"]
    row = {"batches": table.height, "r_e_A": a.mean(), "r_e_K": k.mean(), "pearson_r": None, "low": None, "high": None}
    if table.height > 2 and a.n_unique() > 1 and k.n_unique() > 1:
        found: Any = pearsonr(a, k)
        row["pearson_r"] = float(found.statistic)
        if table.height > 3 and "run" in table.columns:
            row["low"], row["high"] = correlation_interval(a.to_numpy(), k.to_numpy(), table["run"].to_list())
        elif table.height > 3:
            row["low"], row["high"] = map(float, found.confidence_interval())
    return row
