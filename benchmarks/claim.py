"""Tables of the claim's runs, by task as far as they are and by arm, and a picture of them; see claim.toml.

    python benchmarks/claim.py docs/results/cw10 [docs/media/ten-tasks.png] [--without hammer]
    python benchmarks/claim.py docs/results/cw10 --task push-wall

``--without`` leaves tasks out of those that are learned alone: where hammer's goal wandered, it was not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from measure import markdown

from sphere_rl import statistics
from sphere_rl.correlations import correlation
from sphere_rl.numbers import with_interval
from sphere_rl.report.appearance import COLORS, LINES, MARKERS, drawing
from sphere_rl.report.axes import mark_tasks
from sphere_rl.report.curves import curves
from sphere_rl.report.foresight import entries, foresight
from sphere_rl.results import Results, load_results

NAMES = {
    "none": "plain PPO",
    "sphere_free": "SPHERE, scale-free",
    "sphere_literal": "SPHERE, the authors' default",
    "bound_loss": "bound loss",
    "reset_head": "fresh output layers",
    "free_bounded": "both, scale-free",
    "literal_bounded": "both, the authors' default",
}
LEARNED = ("hammer", "push-wall", "faucet-close", "handle-press-side", "push", "window-close", "peg-unplug-side")
"""Tasks that plain PPO learns alone: success of half the episodes or more at the end; see docs/results/alone.md."""
CHANGES = {"r_e_K": 1, "r_e_A": 1, "feature_norm": 1, "output_size": 1, "gate_entropy": 2}
"""What is shown of a task's first and last measurement, and with how many digits."""
FORETELLING = {"r_e_K": "r_e(K)", "r_e_A": "r_e(A)", "feature_norm": "length of features",
               "output_size": "size of mean actions", "gate_entropy": "gate's entropy",
               "dormant_ratio": "dormant units"}  # fmt: skip


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


def arms(results: Results, learned: tuple[str, ...] = LEARNED) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: of each arm over all ten tasks, and over those that are learned alone, success at the tasks' ends
    (each seed, mean and interquartile mean), its difference to plain PPO's of the same seed, the probability that it is
    above (Agarwal et al. 2021), success after the last task, and r_e(K). Seeds that have finished all tasks. Without
    intervals, which say nothing of two seeds.
    """
    finished = (pl.col("protocol") == "crl") & (pl.col("state") == "finished")
    done = results.runs.filter(finished).sort("seed")
    evals = results.evals.filter(pl.col("run").is_in(done["run"].implode()))
    own = {method: evals.filter(pl.col("method") == method) for method in NAMES}
    table = []
    for part, tasks in (("all ten", results.tasks["cw10"]), ("learned alone", learned)):
        scored = {row["method"]: row for row in statistics.headline(evals, {"cw10": tasks})}
        spectra = results.spectra.filter(pl.col("task").is_in(tasks))
        plain = by_seed(statistics.final_scores(own["none"], tasks), tasks)
        for method, name in arm_names(done):
            found, ends = scored[method], statistics.final_scores(own[method], tasks)
            each, left = by_seed(ends, tasks), by_seed(statistics.retention_scores(own[method], tasks), tasks)
            gain = statistics.differences(own[method], own["none"], tasks) if method != "none" else {}
            above = several(score - plain[seed] for seed, score in each.items() if gain and seed in plain)
            kernel = "; ".join(
                ranks(spectra.filter(pl.col("run") == run)) for run in done.filter(pl.col("method") == method)["run"]
            )
            estimates = (found["crl"], found["crl_iqm"], gain.get("improvement"))
            mean, middle, better = (f"{estimate.value:.2f}" if estimate else "" for estimate in estimates)
            cells = (several(each.values()), mean, middle, above, better, several(left.values()), kernel)
            table.append((name, part, *cells))
    head = ["arm", "tasks", "each seed", "mean", "IQM", "above plain PPO", "P(above)", "after the last task",
            "r_e(K): own, fixed; each seed"]  # fmt: skip
    return head, table


def arm_names(runs: pl.DataFrame) -> list[tuple[str, str]]:
    """The arms that some of these runs are of, and what they are called."""
    return [(method, name) for method, name in NAMES.items() if method in runs["method"]]


def within(results: Results, task: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: how each run goes through one task, as far as it is. r_e(K): means over the task; what follows is
    on the policy's own states, as first and last measured.
    """
    table = []
    for run, steps in results.runs.sort("protocol", "method", "seed").select("run", "steps_per_task").rows():
        here = (pl.col("run") == run) & (pl.col("task") == task)
        evals = results.evals.filter(here & pl.col("phase").is_in(["train", "final"])).sort("task_step")
        spectra = results.spectra.filter(here).sort("task_step")
        own = spectra.filter(pl.col("batch") == "rollout")
        if not evals.height:
            continue
        half = evals.filter(pl.col("task_step") >= steps / 2 - 1e4)["mean_return"]
        returns = [half[0], half[-1]] if len(half) else [evals["mean_return"][-1]]
        done = evals["phase"][-1] == "final"
        success = f"{evals['success_final'][-1]:.2f}" if done else f"– ({evals['task_step'][-1] / 1e6:.2f} M)"
        changes = (
            "–" if own[name].is_null().any() else f"{own[name][0]:.{digits}f}, {own[name][-1]:.{digits}f}"
            for name, digits in CHANGES.items()
        )
        table.append((f"`{run}`", success, ", ".join(f"{value:.0f}" for value in returns), ranks(spectra), *changes))
    head = ["run", "success", "return at half, at the end", "r_e(K): own, fixed", "r_e(K)", "r_e(A)", "feature_norm",
            "mean actions", "gate's entropy"]  # fmt: skip
    return head, table


def foretold(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: of each measure on the fixed states as last taken on the task before, its rank correlation with
    success at the task's end, over all entries into a task and within tasks (`sphere_rl.report.foresight`).
    """
    evals, spectra = (table.with_columns(place="task_index", label="method") for table in of_claim(results))
    entered = entries(evals, spectra, "success_final")
    table = []
    for metric, name in FORETELLING.items():
        found = foresight(entered, metric)
        whole = with_interval(found.spearman, found.spearman_low, found.spearman_high)
        within = with_interval(found.within, found.within_low, found.within_high)
        table.append((name, whole, within, f"{found.entries}, {found.runs}"))
    return ["before a task", "rank correlation with success at its end", "within tasks", "entries, runs"], table


def proxy(results: Results) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: how r_e(A) of the last layer goes with r_e(K), on own and on fixed states."""
    spectra = of_claim(results)[1]
    table = []
    for batch, name in (("rollout", "own"), ("probe", "fixed")):
        found = correlation(spectra.filter(pl.col("batch") == batch))
        table.append((name, with_interval(found["pearson_r"], found["low"], found["high"]), str(found["batches"])))
    return ["states", "Pearson's r of r_e(A) and r_e(K)", "batches"], table


def of_claim(results: Results) -> list[pl.DataFrame]:
    """Evaluations and spectra of the three arms of claim.toml, in sequence."""
    mine = pl.col("method").is_in(["none", "sphere_free", "sphere_literal"]) & (pl.col("protocol") == "crl")
    return [table.filter(mine) for table in (results.evals, results.spectra)]


def by_seed(scores: pl.DataFrame, tasks: Sequence[str]) -> dict[int, float]:
    """Mean over the tasks of each seed that has them all."""
    means = scores.group_by("seed").agg(pl.col("score").mean(), pl.len()).sort("seed")
    return dict(means.filter(pl.col("len") == len(tasks)).select("seed", "score").rows())


def several(values: Iterable[float]) -> str:
    """With two digits and the minus of text."""
    return ", ".join(f"{value:z.2f}" for value in values).replace("-", "−")


def picture(results: Results) -> Figure:
    """Draw r_e(K) on the policy's own states through the tasks, and success at the end of each that is finished: means
    over seeds, with the range of ranks and each seed's success.
    """
    tasks, shown = results.tasks["cw10"], arm_names(results.runs)
    ends = results.evals.filter(pl.col("phase") == "final", pl.col("protocol") == "crl")
    spectra = results.spectra.filter(pl.col("protocol") == "crl", pl.col("batch") == "rollout").with_columns(
        (pl.col("task_index") + pl.col("task_step") / pl.col("task_step").max()).alias("place")
    )
    figure = Figure(figsize=(9.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    width = 0.84 / len(shown)
    for i, (method, name) in enumerate(shown):
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
    above.set(ylabel="$r_e(K)$, own states", xlim=(0, len(tasks)))
    below.set(ylabel="success at its end", xlabel="million steps", ylim=(-0.03, 1.05))
    below.set_xticks(range(len(tasks) + 1))
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, help="folder of published runs")
    options.add_argument("picture", type=Path, nargs="?", help="file of the picture")
    options.add_argument("--without", nargs="+", default=[], help="tasks that were not learned alone")
    options.add_argument("--task", help="only how each run goes through this task")
    given = options.parse_args()
    results = load_results(given.runs)
    if given.task:
        print(markdown(*within(results, given.task)))
        return
    learned = tuple(task for task in LEARNED if task not in given.without)
    found = rows(results), arms(results, learned), foretold(results), proxy(results)
    print(*(markdown(*table) for table in found), sep="\n\n")
    if given.picture:
        with drawing():
            picture(results).savefig(given.picture, dpi=160)


if __name__ == "__main__":
    main()
