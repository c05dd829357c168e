"""``sphere compare``: what one run or sweep gains over another, paired by task and seed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from sphere_rl import statistics
from sphere_rl.errors import CommandLineError
from sphere_rl.numbers import number
from sphere_rl.report.tables import rank_scores
from sphere_rl.results import Results, load_results, merged
from sphere_rl.terminal.parsers import ArgumentParser
from sphere_rl.terminal.tables import print_table

SCORES = {"success_final": "success", "mean_return": "return", "r_e_K": "r_e(K)"}
"""What is compared at the end of training on each task; r_e(K) on the probe batch."""
ALL = "all tasks"


def command(words: list[str]) -> None:
    """Compare two runs or two folders of runs, paired by task and seed."""
    options = ArgumentParser(prog="sphere compare", description=command.__doc__)
    options.add_argument("ours", type=Path, metavar="A", help="a run, or a folder of runs")
    options.add_argument("theirs", type=Path, metavar="B", help="another one; differences are A − B")
    options.add_argument("--json", action="store_true", help="one JSON object a row instead of the table (off)")
    given = options.parse_args(words)
    both = load_results(given.ours), load_results(given.theirs)
    for results in both:
        for reason in results.broken["reason"]:
            print(f"sphere: left out: {reason}", file=sys.stderr)
    rows = list(compare(*both))
    if not rows:
        raise CommandLineError(f"compare: {given.ours} and {given.theirs} have no seed that finished the same task")
    if given.json:
        print("\n".join(json.dumps(row, allow_nan=False) for row in rows))
    else:
        print_table(f"A {given.ours} against B {given.theirs}, at the end of each task", list(map(readable, rows)))


def compare(ours: Results, theirs: Results) -> Iterator[dict[str, Any]]:
    """Rows of A − B: suite, actors and methods, protocol, score, task, means of both, difference, interval and seeds.

    ``place`` tells one time of a task in the sequence from another.

    Only what both have counts: the seeds that finished a task in both, and for all tasks the seeds that finished every
    task that any seed finished in both.

    Raises:
        CommandLineError: several methods in one of them, and none of the same name in the other; or agents of one seed
            that were trained on several sequences.
    """
    for results in (ours, theirs):
        check_sequences(results)
    for suite in [name for name in ours.tasks if name in theirs.tasks]:
        tasks = merged(ours.tasks[suite], theirs.tasks[suite])
        for ours_key, theirs_key in pairs(groups(ours, suite), groups(theirs, suite)):
            for protocol in ("rl", "crl"):
                one, two = (
                    (of(r.evals, suite, protocol, key), of(r.spectra, suite, protocol, key))
                    for r, key in ((ours, ours_key), (theirs, theirs_key))
                )
                place = {"suite": suite, "A": " ".join(ours_key), "B": " ".join(theirs_key), "protocol": protocol}
                for name in SCORES:
                    yield from (place | row for row in differences(one, two, tasks, protocol, name))


def check_sequences(results: Results) -> None:
    """Raise `CommandLineError` where two runs of crl differ in nothing but their tasks."""
    crl = results.runs.filter(pl.col("protocol") == "crl")
    for _, group in crl.group_by("suite", "actor", "method", "seed", maintain_order=True):
        if group.height > 1:
            one, two = (results.root / run for run in group["run"][:2])
            raise CommandLineError(f"compare: {one} and {two} differ in their tasks; give folders of one sequence each")


def groups(results: Results, suite: str) -> list[tuple[str, str]]:
    """Actor and method of each experiment of a suite."""
    runs = results.runs.filter(pl.col("suite") == suite).select("actor", "method").unique(maintain_order=True)
    return runs.rows()


def pairs(ours: list[tuple[str, str]], theirs: list[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Which experiment is compared with which: the only ones, whatever their names, else those of the same name."""
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    if same := [(key, key) for key in ours if key in theirs]:
        return same
    names = [", ".join(method for _, method in keys) for keys in (ours, theirs)]
    raise CommandLineError(f"compare: no method in common ({names[0]} and {names[1]}); give folders of one method each")


def of(table: pl.DataFrame, suite: str, protocol: str, key: tuple[str, str]) -> pl.DataFrame:
    """The lines of one experiment."""
    known = {"suite": suite, "protocol": protocol, "actor": key[0], "method": key[1]}
    return table.filter(*(pl.col(name) == value for name, value in known.items()))


def differences(
    ours: tuple[pl.DataFrame, pl.DataFrame],
    theirs: tuple[pl.DataFrame, pl.DataFrame],
    tasks: tuple[str, ...],
    protocol: str,
    name: str,
) -> Iterator[dict[str, Any]]:
    """A row a task, and where there are several one for all of them; each side: its evals and its spectra."""
    one, two = (
        rank_scores(evals, spectra, tasks) if name == "r_e_K" else statistics.final_scores(evals, tasks, name)
        for evals, spectra in (ours, theirs)
    )
    paired = statistics.paired_scores(one, two)
    both = {"A": one.join(two, on=["seed", "place"], how="semi"), "B": two.join(one, on=["seed", "place"], how="semi")}
    places = sorted(paired["place"].unique())
    for chosen in [*([place] for place in places), *([places] if len(places) > 1 else [])]:
        gain = statistics.estimate(statistics.matrix(paired, chosen), protocol, tasks=[tasks[i] for i in chosen])
        if gain is not None:
            means = {f"mean_{side}": mean_of(scores, chosen) for side, scores in both.items()}
            ends = {"difference": gain.value, "low": gain.low, "high": gain.high, "seeds": gain.seeds}
            place = chosen[0] if len(chosen) == 1 else None
            yield {"score": name, "task": ALL if place is None else tasks[place], "place": place} | means | ends


def mean_of(scores: pl.DataFrame, places: list[int]) -> float:
    """Mean over the seeds that have all of these tasks, as the difference counts them."""
    return float(statistics.complete(statistics.matrix(scores, places)).mean())


def readable(row: dict[str, Any]) -> dict[str, Any]:
    """A row for the eye."""
    names = row["A"] if row["A"] == row["B"] else f"{row['A']} − {row['B']}"
    interval = None if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"
    return {
        "what": f"{row['suite']} {row['protocol']}: {names}",
        "score": SCORES[row["score"]],
        "task": row["task"],
        "A": row["mean_A"],
        "B": row["mean_B"],
        "A − B": row["difference"],
        "95 % interval": interval,
        "seeds": row["seeds"],
    }
