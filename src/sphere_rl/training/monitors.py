"""Those who watch a run: a live display in a terminal, plain lines elsewhere, TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from time import monotonic
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.errors import CommandLineError
from sphere_rl.runs import RunFolder
from sphere_rl.spectrum.vanishing import FeatureWatch

SKIPPED = {"global_step", "task_index", "task", "task_step", "phase", "batch"}


@runtime_checkable
class Monitor(Protocol):
    """Whoever watches a run: the progress display, TensorBoard."""

    def row(self, log: str, row: dict[str, Any]) -> None:
        """A line has been added to a log."""

    def close(self) -> None:
        """The run has stopped."""


def check_log(log: str) -> None:
    """Raise `CommandLineError` where a log's package is not installed."""
    if log == "wandb" and find_spec("wandb") is None:
        raise CommandLineError("log: wandb is not installed; pip install 'sphere-rl[wandb]'")


def make_monitors(config: TrainConfig, folder: RunFolder, global_step: int, quiet: bool) -> list[Monitor]:
    """TensorBoard and notices always, W&B if asked for; a display unless quiet: bars on a terminal, lines elsewhere.

    Raises:
        CommandLineError: W&B is asked for and cannot be used.
    """
    check_log(config.log)
    monitors: list[Monitor] = [TensorBoard(folder, global_step)]
    if config.log == "wandb":
        monitors.append(WandB(config, folder, quiet))
    console = Console(file=sys.stderr, highlight=False)
    if not quiet:
        display = Bars if console.is_terminal else Lines
        monitors.append(display(config, console, global_step))
    monitors.append(Notices(config, folder, console))
    return monitors


def scalars(log: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a row's numbers, grouped by log; retention has a curve for each task."""
    prefix = {"eval": f"eval_{row.get('phase')}", "spectrum": f"spectrum_{row.get('batch')}"}.get(log, log)
    if row.get("phase") == "retention":
        prefix = f"{prefix}/{row['task_index']:02d}_{row['task']}"
    for name, value in row.items():
        if name not in SKIPPED and isinstance(value, int | float):
            yield f"{prefix}/{name}", value


class TensorBoard:
    """Scalars of all three logs under ``tb/``, by environment step."""

    def __init__(self, folder: RunFolder, global_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tb"), purge_step=global_step + 1)

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Write every number of the row."""
        for name, value in scalars(log, row):
            self._writer.add_scalar(name, value, row["global_step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """The same scalars in Weights & Biases, one run a folder, by environment step; files in ``wandb/`` of the folder.

    ``WANDB_MODE=offline`` keeps them there, for ``wandb sync``. The other variables of W&B hold, too: project, entity.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, quiet: bool) -> None:
        wandb: Any = importlib.import_module("wandb")
        place = folder.path.resolve()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sphere-rl"), name=place.name, dir=str(place), resume="allow",
                id=hashlib.sha256(str(place).encode()).hexdigest()[:16], group=place.parent.name,
                config=to_dict(config), settings=wandb.Settings(silent=quiet, console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise CommandLineError(f"log: wandb cannot start ({error}); offline: WANDB_MODE=offline") from None
        self._run.define_metric("*", step_metric="global_step")

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Send every number of the row."""
        self._run.log({"global_step": row["global_step"], **dict(scalars(log, row))})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Notices:
    """A line, above the bars where there are some, when the policy's features vanish and when they are back."""

    def __init__(self, config: TrainConfig, folder: RunFolder, console: Console) -> None:
        self._watch, self._console = FeatureWatch(fresh=config.protocol == "rl"), console
        for line in folder.read("spectrum"):  # before an interruption: has been said
            self._watch.notice(line)

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Print what there is to tell."""
        if log == "spectrum" and (text := self._watch.notice(row)):
            self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is open."""


class Lines:
    """One line an iteration and one an evaluation, for files and pipes."""

    def __init__(self, config: TrainConfig, console: Console, global_step: int) -> None:
        self.config, self.console = config, console
        self.clock = Clock(config, global_step)

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Print the line."""
        if log == "train":
            left = self.clock.left(row["global_step"])
            self._print(f"{headline(self.config, row)} · {row['steps_per_second']:.0f} steps/s · {left} left")
        elif log == "eval":
            self._print(f"{row['task']}: {row['phase']} evaluation, {row['episodes']} episodes{outcome(row)}")

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class Bars:
    """Two live bars, the task and the sequence; evaluations as lines above them."""

    def __init__(self, config: TrainConfig, console: Console, global_step: int) -> None:
        self.config, self.clock = config, Clock(config, global_step)
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            console=console,
        )  # fmt: skip
        steps = config.iterations_per_task * config.steps_per_iteration
        self._task = self._progress.add_task("task", total=steps, note="")
        self._all = self._progress.add_task("sequence", total=steps * len(config.task_sequence), note="")
        self._progress.update(self._all, completed=global_step)
        self._progress.start()

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Move the bars, or print an evaluation."""
        if log == "train":
            speed = f"{row['steps_per_second']:.0f} steps/s"
            self._progress.update(
                self._task, description=row["task"], completed=row["task_step"], note=outcome(row).strip(" ·")
            )
            left = self.clock.left(row["global_step"])
            self._progress.update(self._all, completed=row["global_step"], note=f"{speed} · {left} left")
        elif log == "eval":
            self._progress.console.print(f"{row['task']} · {row['phase']} evaluation{outcome(row)}", markup=False)

    def close(self) -> None:
        """Leave the bars as they are."""
        self._progress.stop()


class Clock:
    """Time left at the mean speed since this process began."""

    def __init__(self, config: TrainConfig, global_step: int) -> None:
        steps = config.iterations_per_task * config.steps_per_iteration
        self._total, self._first, self._began = steps * len(config.task_sequence), global_step, monotonic()

    def left(self, global_step: int) -> str:
        """As hours, minutes and seconds."""
        pace = (monotonic() - self._began) / max(1, global_step - self._first)
        return duration(pace * (self._total - global_step))


def duration(seconds: float) -> str:
    """3725 becomes 1h02m, 65 becomes 1m05s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}h{minutes_left:02d}m" if hours else f"{minutes}m{rest:02d}s"


def headline(config: TrainConfig, row: dict[str, Any]) -> str:
    """Task, place in the sequence, steps, success and return."""
    tasks, steps = len(config.task_sequence), config.iterations_per_task * config.steps_per_iteration
    place = f"{row['task']} ({row['task_index'] + 1}/{tasks})"
    return f"{place} · {row['task_step']:,}/{steps:,}{outcome(row)}"


def outcome(row: dict[str, Any]) -> str:
    """Success and return of a row, those that it has."""
    text = ""
    if row.get("success_final") is not None:
        text += f" · success {row['success_final']:.2f}"
    if row.get("mean_return") is not None:
        text += f" · return {row['mean_return']:.1f}"
    return text
