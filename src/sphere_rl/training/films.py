"""Films of a run in training: after each task one episode of its policy, in ``films/`` and wherever pictures are shown.

A film is made by a process of its own (`sphere_rl.commands.film`): graphics libraries end the process where they fail,
and what is drawn must not touch the run's random streams. A task that cannot be drawn costs the films, not the run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console

from sphere_rl.errors import StorageError
from sphere_rl.runs import RunFolder, checkpoint, make_folder

LONGEST = 600.0
"""Seconds that a film may take."""


@runtime_checkable
class Screen(Protocol):
    """A monitor that also shows films."""

    def show(self, name: str, global_step: int, film: Path) -> None:
        """A gif is there, of a policy after ``global_step`` steps."""


class Films:
    """Films every task's policy after its final evaluation, until a film cannot be made: that is one notice."""

    def __init__(self, folder: RunFolder, monitors: Iterable[object], console: Console) -> None:
        self._folder, self._console = folder, console
        self._screens = [monitor for monitor in monitors if isinstance(monitor, Screen)]
        self._able = True

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Film where a task is over, and show it."""
        if log != "eval" or row["phase"] != "final" or not self._able:
            return
        policy = checkpoint.task_checkpoint(self._folder, row["task_index"])
        assert policy is not None, "a task's policy is saved before its final evaluation"
        film = self._folder.path / "films" / f"{policy.stem}.gif"
        if (fault := made(self._folder.path, policy.stem, film)) is not None:
            self._able = False
            self._console.print(f"no films of this run: {fault}", markup=False, soft_wrap=True)
            return
        for screen in self._screens:
            screen.show(f"film/{policy.stem}", row["global_step"], film)

    def close(self) -> None:
        """Nothing is open."""


def made(run: Path, policy: str, film: Path) -> str | None:
    """Film a checkpoint of a run; in a line why it was not possible, where it was not."""
    command = [sys.executable, "-m", "sphere_rl.commands.film", str(run), policy, str(film)]
    try:
        make_folder(film.parent)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    except StorageError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"the first took more than {LONGEST:g} seconds"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1].removeprefix("sphere: ") if lines else f"the process that draws ended with {done.returncode}"
