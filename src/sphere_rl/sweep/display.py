"""What the user of a sweep sees: a live table on a terminal, one line an event elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sphere_rl.errors import RunFolderError
from sphere_rl.runs import RunFolder
from sphere_rl.runs.records import read_row
from sphere_rl.sweep.plan import PlannedRun, state
from sphere_rl.training.display import duration

TAIL_BYTES = 8192
SHOWN = 24
"""Rows of the live table at most; running runs come first."""
STYLES = {"running": "bold", "finished": "green", "failed": "bold red", "interrupted": "yellow"}


@dataclass(frozen=True)
class Standing:
    """How far a run is, from its folder."""

    state: str
    task: str = ""
    steps: int = 0
    speed: float | None = None
    success: float | None = None


def standing(run: PlannedRun) -> Standing:
    """Read the last lines of a run's logs; what cannot be read is not shown, for the other runs go on."""
    try:
        now, status = state(run), RunFolder(run.folder).status()
    except RunFolderError:
        return Standing("failed", "status.json cannot be read")
    if now == "new":
        return Standing(now)
    train, evaluation = (last_row(run.folder / f"{log}.jsonl") for log in ("train", "eval"))
    return Standing(
        now,
        status.get("task") or "",
        train.get("global_step", 0),
        train.get("steps_per_second"),
        evaluation.get("success_final"),
    )


def last_row(path: Path) -> dict[str, Any]:
    """The last whole line of a log; empty where there is none that can be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return read_row(str(path), lines[-1], path.stem, ()) if lines else {}
    except (OSError, RunFolderError):
        return {}


class Lines:
    """One line for every run that starts or ends."""

    def __init__(self, runs: Sequence[PlannedRun], console: Console) -> None:
        self.runs, self.console = runs, console
        self._began: dict[str, float] = {}
        self._done = 0

    def started(self, run: PlannedRun) -> None:
        """Say that the run goes on or begins."""
        self._began[run.name] = monotonic()
        self.console.print(f"{'started' if state(run) == 'new' else 'resumed'} {run.name}", soft_wrap=True)

    def ended(self, run: PlannedRun, code: int) -> None:
        """Say how the run ended, and how many are left."""
        self._done += 1
        found, seconds = standing(run), monotonic() - self._began[run.name]
        result = "" if found.success is None else f" · success {found.success:.2f}"
        word = "finished" if code == 0 else f"FAILED (exit {code})"
        text = f"{word} {run.name} after {duration(seconds)}{result} · {self._done}/{len(self.runs)}"
        self.console.print(text, soft_wrap=True)

    def tick(self) -> None:
        """Nothing moves in a file."""

    def close(self) -> None:
        """Nothing is open."""


class LiveTable:
    """Runs, task, steps/s, success and time left, refreshed every second."""

    def __init__(self, runs: Sequence[PlannedRun], console: Console, already: int) -> None:
        self.runs, self.already = runs, already
        self._found = {run.name: standing(run) for run in runs}
        self._first = self._steps()
        self._began = self._drawn = monotonic()
        self._live = Live(self.table(), console=console, auto_refresh=False)
        self._live.start()

    def started(self, run: PlannedRun) -> None:
        """Show it with the next tick."""

    def ended(self, run: PlannedRun, code: int) -> None:
        """Read the run's last state; it does not change any more."""
        self._found[run.name] = standing(run)

    def tick(self) -> None:
        """Read what moves and draw the table, once a second."""
        if monotonic() - self._drawn < 1:
            return
        self._drawn = monotonic()
        for run in self.runs:
            if self._found[run.name].state != "finished":
                self._found[run.name] = standing(run)
        self._live.update(self.table(), refresh=True)

    def close(self) -> None:
        """Leave the table as it is."""
        self._live.update(self.table(), refresh=True)
        self._live.stop()

    def table(self) -> Table:
        """The table as of now."""
        table = Table(box=box.SIMPLE_HEAD, title=self._title(), title_justify="left", title_style="bold")
        for name in ("run", "state", "task", "steps", "steps/s", "success", "left"):
            table.add_column(name, justify="left" if name in ("run", "state", "task") else "right", no_wrap=True)
        order = ("running", "failed", "interrupted", "finished", "new")
        rows = sorted(self.runs, key=lambda run: order.index(self._found[run.name].state))
        for run in rows[:SHOWN]:
            found = self._found[run.name]
            left = (run.steps - found.steps) / found.speed if found.speed and found.state == "running" else None
            table.add_row(
                run.name,
                Text("waiting" if found.state == "new" else found.state, STYLES.get(found.state, "dim")),
                found.task,
                f"{found.steps / run.steps:4.0%}",
                "" if found.speed is None else f"{found.speed:.0f}",
                "" if found.success is None else f"{found.success:.2f}",
                "" if left is None else duration(left),
            )
        if len(rows) > SHOWN:
            table.caption = f"and {len(rows) - SHOWN} more"
        return table

    def _title(self) -> str:
        steps, total = self._steps(), sum(run.steps for run in self.runs)
        states = [found.state for found in self._found.values()]
        pace = (monotonic() - self._began) / (steps - self._first) if steps > self._first else None
        left = "" if pace is None else f" · {duration(pace * (total - steps))} left"
        failed = states.count("failed")
        return (
            f"{self.already + states.count('finished')}/{self.already + len(states)} runs · "
            f"{states.count('running')} running{f' · {failed} failed' if failed else ''}{left}"
        )

    def _steps(self) -> int:
        return sum(found.steps for found in self._found.values())
