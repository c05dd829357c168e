"""``sphere report``: a folder of runs as one static page and as figures for papers."""

from __future__ import annotations

import time
from pathlib import Path

from sphere_rl.parsers import ArgumentParser, positive


def command(words: list[str]) -> int | None:
    """Make a page and figures from a folder of runs."""
    options = ArgumentParser(prog="sphere report", description=command.__doc__)
    options.add_argument("runs", type=Path, help="folder of runs")
    options.add_argument("--out", type=Path, default=Path("page"), help="folder of the page (page)")
    options.add_argument("--watch", type=positive, metavar="SECONDS", help="make it anew whenever the runs moved on")
    given = options.parse_args(words)
    from sphere_rl.report.page import write_page
    from sphere_rl.runtime import tune_process

    tune_process(1)  # the matrices are small: more threads only spin, and take cores from runs that go on
    if given.watch is None:
        print(write_page(given.runs, given.out))
        return 0
    return watch(given.runs, given.out, given.watch)


def watch(runs: Path, out: Path, seconds: int) -> int:
    """Rewrite the page while runs go on or wait; the open page reloads itself. Ends with the runs, or by Ctrl-C."""
    from sphere_rl.report.page import planned, write_page
    from sphere_rl.results import load_results, run_folders

    seen: dict[Path, int] = {}
    while True:
        results = load_results(runs)
        going = bool(set(results.runs["state"]) & {"new", "running"} or planned(results))
        logs = [path for folder in run_folders(runs) for path in folder.glob("*.json*")]
        now = {path: path.stat().st_mtime_ns for path in logs}
        if now != seen or not going:
            print(write_page(runs, out, seconds if going else None), flush=True)
            seen = now
        if not going:
            return 0
        time.sleep(seconds)
