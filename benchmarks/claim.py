"""Table of the claim's runs as far as they are, and a picture of those that are finished; see benchmarks/claim.toml.

python benchmarks/claim.py docs/results/cw10 [docs/media/ten-tasks.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from measure import markdown

from sphere_rl.report.appearance import COLORS, LINES, MARKERS, drawing
from sphere_rl.report.axes import mark_tasks
from sphere_rl.report.curves import curves
from sphere_rl.results import Results, load_results

NAMES = {"none": "plain PPO", "sphere_free": "SPHERE, scale-free", "sphere_literal": "SPHERE, the authors' default"}


def ranks(spectra: pl.DataFrame) -> str:
    """Mean r_e(K) of these measurements on the policy's own states and on the fixed ones."""
    found = [spectra.filter(pl.col("batch") == batch)["r_e_K"].mean() for batch in ("rollout", "probe")]
    return ", ".join(f"{rank:.1f}" for rank in found)


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
            cells.append(f"{final['success_final'][0]:.2f} ({final['mean_return'][0]:.0f})")
            cells.append(ranks(results.spectra.filter(here)))
        if set(cells) != {"–"}:
            table.append((task, *cells))
    names = [f"`{method}`, seed {seed}" for method, seed in runs.select("method", "seed").rows()]
    return ["task", *(text for name in names for text in (name, "r_e(K): own, fixed"))], table


def picture(results: Results) -> Figure:
    """Of the finished runs, r_e(K) on the fixed probe states through the tasks, and success at the end of each: means
    over seeds, with the range of ranks and each seed's success.
    """
    tasks = results.tasks["cw10"]
    ends = results.evals.filter(pl.col("phase") == "final", pl.col("protocol") == "crl")
    finished = ends.group_by("run").len().filter(pl.col("len") == len(tasks))["run"].implode()
    ends = ends.filter(pl.col("run").is_in(finished))
    spectra = results.spectra.filter(pl.col("run").is_in(finished), pl.col("batch") == "probe").with_columns(
        (pl.col("task_index") + pl.col("task_step") / pl.col("task_step").max()).alias("place")
    )
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    width = 0.84 / len(NAMES)
    for i, (method, name) in enumerate(NAMES.items()):
        own = {"color": COLORS[i]}
        for line in curves(spectra.filter(pl.col("method") == method), "place", "r_e_K", ["method"], "task_index"):
            place, mean, low, high = (np.array(each, float) for each in (line.x, line.mean, line.low, line.high))
            label = f"{name} ({line.seeds})"
            above.plot(place, mean, linestyle=LINES[i], marker=MARKERS[i], markersize=2.5, label=label, **own)
            above.fill_between(place, low, high, alpha=0.2, linewidth=0, **own)
        here = ends.filter(pl.col("method") == method)
        means = here.group_by("task_index").agg(pl.col("success_final").mean())
        start = 0.08 + (i + 0.5) * width
        below.bar(means["task_index"] + start, means["success_final"], width, alpha=0.75, **own)
        below.plot(here["task_index"] + start, here["success_final"], MARKERS[i], markersize=3.5, **own)
    for axes in (above, below):
        mark_tasks(axes, dict(enumerate(tasks)), names=axes is above)
    above.set(ylabel="$r_e(K)$, fixed states", xlim=(0, len(tasks)))
    below.set(ylabel="success at its end", xlabel="million steps", ylim=(-0.03, 1.05))
    below.set_xticks(range(len(tasks) + 1))
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    folder, *out = map(Path, sys.argv[1:])
    results = load_results(folder)
    print(markdown(*rows(results)))
    for path in out:
        with drawing():
            picture(results).savefig(path, dpi=160)


if __name__ == "__main__":
    main()
