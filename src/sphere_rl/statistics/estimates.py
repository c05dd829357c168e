"""Estimates from matrices of scores [S, T], seeds by tasks, with bootstrap intervals from a seeded generator.

What is resampled follows the protocol: in ``rl`` every entry is a run of its own, so seeds are drawn anew within each
task (the task is the stratum, Agarwal et al. 2021); in ``crl`` a row is one agent, so whole rows are drawn. One seed
has no interval. ``tasks`` names the columns: those of one task with the same scores are the same runs, at a task that
comes again, and are drawn once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

CONFIDENCE = 0.95
RESAMPLES = 2000


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
    scores: Float[ndarray, "S T"],
    protocol: str,
    statistic: Statistic = mean,
    tasks: Sequence[str] = (),
    *,
    seed: int = 0,
) -> Estimate | None:
    """Statistic of all entries with its interval; ``None`` without scores. Seeds that miss a task are left out."""
    scores = complete(scores)
    if not scores.size:
        return None
    draws = bootstrap(scores, protocol, statistic, tasks, seed=seed)
    low, high = interval(draws)
    return Estimate(float(statistic(scores.ravel())), low, high, len(scores))


def bootstrap(
    scores: Float[ndarray, "*k S T"],
    protocol: str,
    statistic: Statistic = mean,
    tasks: Sequence[str] = (),
    *,
    seed: int = 0,
) -> Float[ndarray, "*k B"] | None:
    """Draws of the statistic under resampling of seeds; ``None`` for a single seed, whose spread is unknown.

    Leading axes are several matrices of the same runs, which share their draws.
    """
    from scipy.stats import bootstrap as resample

    if scores.shape[-2] < 2:
        return None
    columns = np.moveaxis(scores, -1, 0)
    of = _first(columns, tasks)
    kept = sorted({*of})

    def of_tasks(*drawn: Float[ndarray, "*b S"], axis: int = -1) -> Float[ndarray, "*b"]:
        return statistic(np.concatenate([drawn[kept.index(i)] for i in of], axis))

    result = resample(
        tuple(columns[kept]),
        of_tasks,
        paired=protocol == "crl",
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.bootstrap_distribution


def _first(columns: Float[ndarray, "T *k S"], tasks: Sequence[str]) -> list[int]:
    """For each column the first one of the same task with the same scores; itself, where no tasks are named."""
    names = tasks or range(len(columns))
    return [
        next(i for i in range(j + 1) if names[i] == names[j] and np.array_equal(columns[i], columns[j]))
        for j in range(len(columns))
    ]


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
    scores: Float[ndarray, "S T"], thresholds: Float[ndarray, "Q"], protocol: str, tasks: Sequence[str] = ()
) -> Float[ndarray, "3 Q"] | None:
    """Performance profile: share of (seed, task) whose score is above each threshold, and its 95 % interval's ends.

    ``None`` without scores; with one seed the ends are the share itself. Source: Agarwal et al. 2021.
    """
    scores = complete(scores)
    if not scores.size:
        return None
    above = (scores > thresholds[:, None, None]).astype(float)
    share, draws = above.mean((1, 2)), bootstrap(above, protocol, tasks=tasks)
    return np.stack([share, *([share, share] if draws is None else ends(draws))])


def gap(
    rl: Float[ndarray, "S T"], crl: Float[ndarray, "R T"], tasks: Sequence[str] = (), *, seed: int = 0
) -> Estimate | None:
    """Mean over RL runs − mean over CRL runs. Positive: continual learning costs.

    The two are resampled independently, except a first task with the same scores in both: a sweep trains it once, for
    both. ``seeds`` is the smaller of the two numbers of seeds.
    """
    rl, crl = complete(rl), complete(crl)
    if not rl.size or not crl.size:
        return None
    both = _in_both(rl, crl, tasks)
    mine = rl[:, both].sum(1) if both.any() else 0.0  # an agent's part of the mean over RL runs
    own = (crl.sum(1) - mine) / crl.shape[1]
    agents = bootstrap(own[:, None], "crl", seed=seed + 1)
    alone = np.float64(0)
    if not both.all():
        names = [task for task, shared in zip(tasks, both, strict=False) if not shared]
        alone = bootstrap(rl[:, ~both], "rl", tasks=names, seed=seed)
    low, high = interval(None if alone is None or agents is None else alone * (1 - both.mean()) - agents)
    return Estimate(float(rl.mean() - crl.mean()), low, high, min(len(rl), len(crl)))


def forward_transfer(
    crl: Float[ndarray, "S T"], rl: Float[ndarray, "R T"], tasks: Sequence[str] = (), *, seed: int = 0
) -> Estimate | None:
    """Mean over tasks of (CRL − RL)/(1 − RL), from areas under learning curves, each the mean over its runs.

    ``None`` where RL is at 1 throughout on a task. Resampling and ``seeds`` as in `gap`. Source: Wołczyk et al. 2021.
    """
    rl, crl = complete(rl), complete(crl)
    if not rl.size or not crl.size or (rl.mean(0) >= 1).any():
        return None
    low = high = None
    if min(len(rl), len(crl)) > 1:
        agents = np.array(bootstrap(crl.T[..., None], "crl", seed=seed + 1))  # [T, B]
        alone = np.array([bootstrap(rl[:, [i]], "rl", seed=seed + 2 + i) for i in _first(rl.T, tasks)])
        alone[_in_both(rl, crl, tasks)] = agents[0]
        known = (alone < 1).all(0)
        low, high = interval(_transfer(agents[:, known], alone[:, known]) if known.any() else None)
    value = _transfer(crl.mean(0, keepdims=True).T, rl.mean(0, keepdims=True).T).item()
    return Estimate(value, low, high, min(len(rl), len(crl)))


def _transfer(crl: Float[ndarray, "T B"], rl: Float[ndarray, "T B"]) -> Float[ndarray, "B"]:
    return ((crl - rl) / (1 - rl)).mean(0)


def _in_both(rl: Float[ndarray, "S T"], crl: Float[ndarray, "R T"], tasks: Sequence[str]) -> Bool[ndarray, "T"]:
    """Where the RL runs are those of the first task whose scores the CRL runs have, too."""
    shared = rl.shape == crl.shape and np.array_equal(rl[:, 0], crl[:, 0])
    return np.array([shared and i == 0 for i in _first(rl.T, tasks)])


def complete(scores: Float[ndarray, "S T"]) -> Float[ndarray, "R T"]:
    """The seeds that have a score on every task."""
    return scores[~np.isnan(scores).any(axis=1)] if scores.size else scores
