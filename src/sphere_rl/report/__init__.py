"""``sphere report``: a folder of runs as one static page and as figures for papers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sphere_rl.errors import CommandLineError
from sphere_rl.terminal.parsers import ArgumentParser, positive

if TYPE_CHECKING:
    from sphere_rl.report.page import Page

DESCRIPTION = (
    "Make a page and figures from a folder of runs. A run that cannot be read is left out and named with the reason, "
    "on the page and here, and the exit code is 3."
)


def command(words: list[str]) -> int | None:
    """Make a page and figures from a folder of runs."""
    options = ArgumentParser(prog="sphere report", description=DESCRIPTION)
    options.add_argument("runs", type=Path, help="folder of runs")
    options.add_argument("--out", type=Path, default=Path("page"), help="folder of the page (page)")
    options.add_argument("--watch", type=positive, metavar="SECONDS", help="make it anew whenever the runs moved on")
    options.add_argument(
        "--tables", nargs="+", choices=("csv", "latex"), help="make only the tables, in these formats, in OUT/tables"
    )
    given = options.parse_args(words)
    if given.tables and given.watch:
        raise CommandLineError("--tables: not allowed with --watch")
    from sphere_rl.report.page import make_page, make_tables
    from sphere_rl.results import load_results
    from sphere_rl.runs import RunFolder
    from sphere_rl.runtime import tune_process

    if RunFolder(given.out).config_path.exists():
        raise CommandLineError(f"--out: {given.out} is a run's own folder; expected another one")

    tune_process(1)  # the matrices are small: more threads only spin, and take cores from runs that go on
    if given.tables:
        return tell(make_tables(load_results(given.runs), given.out, given.tables))
    if given.watch is None:
        return tell(make_page(load_results(given.runs), given.out))
    return watch(given.runs, given.out, given.watch)


def tell(page: Page) -> int:
    """Print where the page is and what is left out; the exit code that says so."""
    print(page.path, flush=True)
    for run, reason in page.left_out.items():
        print(f"sphere: {run} is left out: {reason}", file=sys.stderr)
    return 3 if page.left_out else 0


def watch(runs: Path, out: Path, seconds: int) -> int:
    """Rewrite the page while runs go on or wait; the open page reloads itself. Ends with the runs, or by Ctrl-C."""
    from sphere_rl.report.page import make_page, planned
    from sphere_rl.results import load_results, run_folders

    seen: dict[Path, int] = {}
    code = 0
    while True:
        results = load_results(runs)
        going = bool(set(results.runs["state"]) & {"new", "running"} or planned(results))
        logs = [path for folder in run_folders(runs) for path in folder.glob("*.json*")]
        now = {path: path.stat().st_mtime_ns for path in logs}
        if now != seen or not going:
            code = tell(make_page(results, out, seconds if going else None))
            seen = now
        if not going:
            return code
        time.sleep(seconds)
