"""``sphere sweep``: a grid of runs into one folder. Finished runs are skipped, stopped ones go on where they were."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphere_rl.errors import CommandLineError
from sphere_rl.extras import require
from sphere_rl.terminal.parsers import ArgumentParser, integer, positive
from sphere_rl.terminal.waiting import waiting

if TYPE_CHECKING:
    from sphere_rl.sweep.plan import Grid

SINGULAR = {"--protocol", "--actor", "--method", "--seed", "--suites"}
"""Flags of ``sphere train`` that a sweep has as axes."""


def command(words: list[str], report: Callable[[list[str]], object] | None = None) -> int | None:
    """Train a grid of runs on this machine or a Ray cluster; ``report`` is called with words of ``sphere report``."""
    from sphere_rl.sweep.plan import plan, record, state, tell_idle_in

    given, rest = parse(words)
    if given.report:
        require("report", "--report")
    whole = grid_of(given, rest)
    runs = plan(whole, given.out)
    tell_idle_in(whole, runs)
    if given.dry_run:
        return dry_run(runs, given.jobs)
    engine = make_engine(given.engine, given.address, given.jobs, runs)
    record(given.out, f"sphere sweep {shlex.join(words)}", runs)
    waiting = [run for run in runs if state(run) != "finished"]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", flush=True)
    try:
        codes = carry_out(engine, waiting, runs)
    except KeyboardInterrupt:
        print("\nstopped, with its runs; the same command goes on where they were", file=sys.stderr)
        raise
    failed = [run for run in waiting if codes[run.name]]
    left_out = None
    if given.report and report:  # failures do not hide what the others have found
        left_out = report([str(given.out), "--out", str(given.out / "page")])
    if not failed:
        hint = "" if given.report else f" Look at them with: sphere report {given.out}"
        print(f"{len(runs)} of {len(runs)} runs finished.{hint}")
        return 3 if left_out else 0
    from sphere_rl.sweep.cost import reason

    print(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:")
    for run in failed:
        print(f"  {run.name}: {reason(run, codes[run.name])}  ({run.log})")
    return 3


def grid_of(given: Any, rest: Sequence[str]) -> Grid:
    """The grid of a file, if there is one, with what flags say of it; ``rest``: words for ``sphere train``."""
    from sphere_rl.sweep.plan import Grid, load_grid, preset_path

    file = preset_path(given.preset) if given.preset else given.config
    grid = load_grid(file) if file else {}
    flags = {name: getattr(given, name) for name in ("suites", "protocols", "actors", "methods", "seeds", "tasks")}
    chosen = {name: tuple(values) for name, values in flags.items() if values is not None}
    grid |= chosen  # in every stage, too
    grid["stages"] = tuple({**stage, **chosen} for stage in grid.get("stages", ()))
    extra = tuple((axis[0], tuple(axis[1:])) for axis in given.grid)
    if empty := [name for name, values in extra if not values]:
        raise CommandLineError(f"--grid {empty[0]}: expected at least one value after the option's name")
    grid["options"] = grid.get("options", ()) + extra
    grid["train"] = (*grid.get("train", ()), *rest)
    return Grid(**grid)


def parse(words: list[str]) -> tuple[Any, list[str]]:
    """The sweep's own flags, and the words that are for ``sphere train``."""
    options = ArgumentParser(
        prog="sphere sweep",
        description="Train a grid of runs on this machine or a Ray cluster. "
        "Any other flag of `sphere train` is passed to every run.",
        allow_abbrev=False,
    )
    source = options.add_mutually_exclusive_group()
    source.add_argument(
        "--config", type=Path, help="TOML file with axes, [grid], [train], [arms] and [[stages]]; flags win"
    )
    source.add_argument("--preset", help="such a file of the package; `sphere list presets` names them")
    options.add_argument("--suite", dest="suites", nargs="+", help="suites (cw10)")
    options.add_argument("--protocols", nargs="+", help="rl, crl (crl)")
    options.add_argument("--actors", nargs="+", help="architectures (topk_moe)")
    options.add_argument(
        "--methods", nargs="+", help="methods, composed ones as sphere+layernorm, or arms of the file (none sphere)"
    )
    options.add_argument("--seeds", nargs="+", type=integer, help="seeds (0)")
    options.add_argument("--tasks", nargs="+", help="tasks in training order (each suite's own sequence)")
    options.add_argument(
        "--grid", nargs="+", action="append", default=[], metavar=("OPTION", "VALUE"),
        help="one more axis, as in --grid sphere.rho 0.001 0.01",
    )  # fmt: skip
    options.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (runs/sweep)")
    options.add_argument("--engine", choices=("local", "ray"), default="local")
    options.add_argument("--jobs", type=positive, help="runs side by side (as many as there are cores for)")
    options.add_argument("--address", help="address of a Ray cluster; without one, a Ray of this machine")
    options.add_argument("--report", action="store_true", help="make the report afterwards, in OUT/page")
    options.add_argument("--dry-run", action="store_true", help="print the runs, their steps and their hours")
    given, rest = options.parse_known_args(words)
    for word in rest:
        flag = word.partition("=")[0]
        if flag in SINGULAR:
            raise CommandLineError(f"{flag}: not a flag of sphere sweep; expected {flag}s" if flag != "--suites" else
                                   "--suites: not a flag of sphere sweep; expected --suite")  # fmt: skip
        if flag in ("--quiet", "--no-quiet", "-h", "--help"):
            raise CommandLineError(f"{flag}: not a flag of sphere sweep")
    return given, rest


def make_engine(name: str, address: str | None, jobs: int | None, runs: Sequence[Any]) -> Any:
    """The engine, with as many runs side by side as there are cores for, unless ``jobs`` says otherwise."""
    from sphere_rl.sweep import engines

    if address and name != "ray":
        raise CommandLineError(f"--address: {address!r} is not allowed with engine {name}; expected --engine ray")
    if name == "ray":
        return engines.ray(address, jobs)
    return engines.local(jobs or default_jobs(runs))


def default_jobs(runs: Sequence[Any]) -> int:
    """Runs side by side that do not take more threads than there are cores."""
    from sphere_rl.runtime import cores

    return max(1, cores() // max((run.threads for run in runs), default=1))


def carry_out(engine: Any, waiting: Sequence[Any], runs: Sequence[Any]) -> dict[str, int]:
    """Train what waits, but for ``rl`` runs that are the first task of a ``crl`` run; exit code by run."""
    from sphere_rl.sweep.plan import state
    from sphere_rl.sweep.reuse import share, sources

    found = sources(runs)
    last = [run for run in waiting if run.name in found and state(run) == "new"]
    first = [run for run in waiting if run not in last]
    codes = execute(engine, first, len(runs) - len(waiting)) if first else {}
    shared = [run for run in last if share(run, found[run.name])]
    for run in shared:
        print(f"{run.name} is the first task of {found[run.name].name}", flush=True)
    left = [run for run in last if run not in shared]
    codes |= execute(engine, left, len(runs) - len(left)) if left else {}
    return codes | {run.name: 0 for run in shared}


def execute(engine: Any, runs: Sequence[Any], already: int) -> dict[str, int]:
    """Carry the runs out in front of the user; exit code by run."""
    from rich.console import Console

    from sphere_rl.sweep.display import Lines, LiveTable

    console = Console(highlight=False, markup=False)
    watcher = LiveTable(runs, console, already) if console.is_terminal else Lines(runs, console)
    try:
        return engine(runs, watcher)
    finally:
        watcher.close()


def dry_run(runs: Sequence[Any], jobs: int | None) -> int:
    """Print what would be done and what it costs."""
    from sphere_rl.sweep.cost import room, speeds, steps_left
    from sphere_rl.sweep.plan import state
    from sphere_rl.sweep.reuse import sources

    jobs, shared = jobs or default_jobs(runs), sources(runs)
    steps = {run.name: 0 if run.name in shared and state(run) == "new" else steps_left(run) for run in runs}
    for run in runs:
        source = f", the first task of {shared[run.name].name}" if run.name in shared and not steps[run.name] else ""
        print(f"{run.name:<60} {state(run):<12} {steps[run.name]:>14,} steps{source}")
    left = [run for run in runs if steps[run.name]]
    with waiting("measuring how fast these runs train here"):
        speed = speeds(left)
    hours = [steps[run.name] / speed[run.name] / 3600 for run in left]
    cores = sum(alone * run.threads for alone, run in zip(hours, left, strict=True))
    rates = sorted({round(value) for value in speed.values()})
    at = f" at {rates[0]} to {rates[-1]} steps/s a run" if rates else ""
    print(f"{len(left)} of {len(runs)} runs to do, {sum(steps.values()):,} steps{at}: {cores:.2f} core-hours")
    print(f"with {jobs} side by side about {max([sum(hours) / jobs, *hours], default=0):.2f} hours, evaluations on top")
    print(room(runs))
    return 0
