"""Table of the runs on a task without signal, then one that PPO learns; see benchmarks/silent.toml.

    python benchmarks/silent.py docs/results/silent

The second part of the pilot's rule: an arm's return at the end of the second task must not be below that of `none`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from measure import markdown

from sphere_rl.results import Results, load_results

HEAD = (
    "arm, seed",
    "longest features, hammer",
    "r_e(K), push-wall",
    "return, hammer",
    "return while training on push-wall",
    "at its end",
)


def rows(results: Results) -> list[tuple[str, ...]]:
    """Of each run, on the policy's own states: feature_norm, r_e(K); and the returns of its evaluations."""
    found = []
    runs = results.runs.filter(pl.col("state") == "finished").sort("method", "seed")
    for run, name, seed in runs.select("run", "method", "seed").rows():
        own = results.spectra.filter((pl.col("run") == run) & (pl.col("batch") == "rollout"))
        evals = results.evals.filter(pl.col("run") == run)
        final = evals.filter(pl.col("phase") == "final").sort("task_index")["mean_return"].to_list()
        training = evals.filter((pl.col("phase") == "train") & (pl.col("task_index") == 1))["mean_return"]
        longest = own.filter(pl.col("task_index") == 0)["feature_norm"].max()
        rank = own.filter(pl.col("task_index") == 1)["r_e_K"].mean()
        row = (f"{name}, {seed}", f"{longest:.1f}", f"{rank:.1f}", f"{final[0]:.0f}")
        found.append((*row, ", ".join(f"{value:.0f}" for value in training), f"{final[1]:.0f}"))
    return found


def main() -> None:
    print(markdown(HEAD, rows(load_results(Path(sys.argv[1])))))


if __name__ == "__main__":
    main()
