"""Table of the claim's runs as far as they are; see benchmarks/claim.toml.

python benchmarks/claim.py docs/results/cw10
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from measure import markdown

from sphere_rl.results import Results, load_results


def rows(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: of each task that a run has finished, success at its end with the return in brackets, and the mean
    of r_e(K) within it on the policy's own states and on the fixed probe states.
    """
    begun = results.evals.filter(pl.col("phase") == "final")["run"].unique().implode()
    runs = results.runs.filter(pl.col("protocol") == "crl", pl.col("run").is_in(begun)).sort("method", "seed")
    table = []
    for index, task in enumerate(results.tasks["cw10"]):
        cells = []
        for run in runs["run"]:
            here = (pl.col("run") == run) & (pl.col("task_index") == index)
            final = results.evals.filter(here & (pl.col("phase") == "final"))
            if not final.height:
                cells += ["–", "–"]
                continue
            ranks = [
                results.spectra.filter(here & (pl.col("batch") == batch))["r_e_K"].mean()
                for batch in ("rollout", "probe")
            ]
            cells.append(f"{final['success_final'][0]:.2f} ({final['mean_return'][0]:.0f})")
            cells.append(", ".join(f"{rank:.1f}" for rank in ranks))
        if set(cells) != {"–"}:
            table.append((task, *cells))
    names = [f"`{method}`, seed {seed}" for method, seed in runs.select("method", "seed").rows()]
    return ["task", *(text for name in names for text in (name, "r_e(K): own, fixed"))], table


def main() -> None:
    print(markdown(*rows(load_results(Path(sys.argv[1])))))


if __name__ == "__main__":
    main()
