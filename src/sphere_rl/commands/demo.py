"""``sphere demo``: Top-K MoE with and without SPHERE on a short sequence of real MetaWorld tasks, then its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sphere_rl.numbers import number
from sphere_rl.terminal.parsers import ArgumentParser

TASKS = ("handle-press-side", "drawer-close")
STEPS_PER_TASK, SHORT = 81_920, 16_384
OPTIONS = {"num-steps": 512, "final-eval-episodes": 20}
"""Shorter rollouts than the CW10 preset: as many updates of each sample, more often."""


def command(words: list[str]) -> int | None:
    """Train with and without SPHERE on a short MetaWorld sequence, about five minutes."""
    options = ArgumentParser(prog="sphere demo", description=command.__doc__)
    options.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (runs/demo)")
    options.add_argument(
        "--short", action="store_true", help="a fifth of the steps: about a minute, to see that all works"
    )
    given = options.parse_args(words)
    steps = SHORT if given.short else STEPS_PER_TASK
    print(
        f"Two agents, a Top-2 mixture of ten experts with and without SPHERE, learn {' and then '.join(TASKS)}:\n"
        f"{number(steps)} environment steps each, one seed. It shows that everything works and proves\n"
        "nothing about the paper, whose tasks get 1 000 000 steps and five seeds each. Ctrl-C stops it, the same\n"
        "command goes on.\n",
        flush=True,
    )
    from sphere_rl import report, sweep

    code = sweep.command([*sweep_words(steps), "--out", str(given.out)])
    if code:
        return code
    print_tables(planned(given.out, steps), steps)
    return report.command([str(given.out), "--out", str(given.out / "page")])


def sweep_words(steps: int) -> list[str]:
    """The demo as words of ``sphere sweep``, with so many steps a task and four evaluations in them."""
    words = ["--suite", "cw10", "--tasks", *TASKS, "--methods", "none", "sphere", "--seeds", "0"]
    every = steps // 4
    words += ["--steps-per-task", str(steps), "--eval-every", str(every), "--checkpoint-every", str(every)]
    return words + [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def planned(out: Path, steps: int) -> list[Path]:
    """Folders of the demo's runs; others may lie beside them."""
    from sphere_rl.sweep import grid_of, parse
    from sphere_rl.sweep.plan import plan

    return [run.folder for run in plan(grid_of(*parse(sweep_words(steps))), out)]


def print_tables(runs: Sequence[Path], steps: int) -> None:
    """Success, return, effective ranks and speed, by task and method."""
    import numpy as np

    from sphere_rl.runs import RunFolder
    from sphere_rl.terminal.tables import print_table
    from sphere_rl.training.saved import config_of

    rows = []
    for folder in map(RunFolder, runs):
        method = "+".join(config_of(folder).method)
        speed = np.median([row["steps_per_second"] for row in folder.read("train")])
        ranks = {row["task_index"]: row for row in folder.read("spectrum") if row["batch"] == "probe"}
        later = {row["task_index"]: row for row in folder.read("eval") if row["phase"] == "retention"}
        for row in folder.read("eval"):
            if row["phase"] == "final":
                task = row["task_index"]
                rows.append(
                    {
                        "task": row["task"],
                        "method": method,
                        "success": row["success_final"],
                        "success after the last task": later[task]["success_final"],
                        "return": row["mean_return"],
                        "r_e(K)": ranks[task]["r_e_K"],
                        "r_e(A)": ranks[task]["r_e_A"],
                        "steps/s": float(speed),
                    }
                )
    rows.sort(key=lambda row: TASKS.index(row["task"]))
    print_table(f"After {number(steps)} steps a task, one seed, 20 deterministic episodes", rows)
