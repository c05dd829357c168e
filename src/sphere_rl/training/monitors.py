"""Those who watch a run: the display, notices, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from socket import gethostname
from time import time
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rich.console import Console

from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.errors import CommandLineError, StorageError
from sphere_rl.extras import require
from sphere_rl.runs import RunFolder, make_folder, write_atomic, written
from sphere_rl.settings import settings
from sphere_rl.spectrum.vanishing import FeatureWatch
from sphere_rl.training.display import Bars, Lines
from sphere_rl.training.films import Films

if TYPE_CHECKING:
    from sphere_rl.training.agent import Agent

OUTCOMES = ("eval_final/success_final", "eval_final/mean_return", "spectrum_probe/r_e_K", "spectrum_probe/r_e_A")
"""Curves that TensorBoard sets beside the hyperparameters."""
SKIPPED = {"global_step", "task_index", "task", "task_step", "phase", "batch"}


@runtime_checkable
class Monitor(Protocol):
    """Whoever watches a run: the progress display, TensorBoard."""

    def row(self, log: str, row: dict[str, Any]) -> None:
        """A line has been added to a log."""

    def close(self) -> None:
        """The run has stopped."""


@runtime_checkable
class Host(Protocol):
    """A monitor that also wants to know who will be trained."""

    def begin(self, agent: Agent) -> None:
        """Environments and agent are there; training begins, or goes on after an interruption."""


def check_watchers(config: TrainConfig) -> None:
    """Raise `MissingExtraError` where a package is not installed that a run's monitors need."""
    if config.log == "wandb":
        require("wandb", "log")
    if config.films:
        require("play", "films")


def make_monitors(config: TrainConfig, folder: RunFolder, global_step: int, quiet: bool) -> list[Monitor]:
    """TensorBoard and notices always, W&B and films if asked for; a display unless quiet, of bars or lines.

    Raises:
        CommandLineError: W&B is asked for and cannot be used.
    """
    check_watchers(config)
    monitors: list[Monitor] = [TensorBoard(config, folder, global_step)]
    if config.log == "wandb":
        monitors.append(WandB(config, folder, quiet))
    console = Console(file=sys.stderr, highlight=False)
    if not quiet:
        display = Bars if console.is_terminal else Lines
        monitors.append(display(config, console, str(folder.path), global_step))
    monitors.append(Notices(config, folder, console))
    if config.films:
        monitors.append(Films(folder, monitors, console))
    return monitors


def scalars(log: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of a row's numbers, grouped by log; a curve for each task of retention and entry of a list."""
    prefix = {"eval": f"eval_{row.get('phase')}", "spectrum": f"spectrum_{row.get('batch')}"}.get(log, log)
    if row.get("phase") == "retention":
        prefix = f"{prefix}/{row['task_index']:02d}_{row['task']}"
    for name, value in row.items():
        if name not in SKIPPED and isinstance(value, int | float):
            yield f"{prefix}/{name}", value
        elif isinstance(value, list):  # the load of each expert
            yield from ((f"{prefix}/{name}/{i:02d}", item) for i, item in enumerate(value))


def hyperparameters(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Every setting of the run by name; of methods only those in use."""
    found = settings(to_dict(config))
    return {name: value if isinstance(value, bool | int | float) else words(value) for name, value in found}


def words(value: Any) -> str:
    """A setting that is no number as a text."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class TensorBoard:
    """Scalars of all three logs under ``tb/``, by environment step, and the run's hyperparameters.

    Records are written here and not by a thread of TensorBoard's, which would print its own traceback where the disk
    is full.
    """

    NUMBER = count()

    def __init__(self, config: TrainConfig, folder: RunFolder, global_step: int) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._proto: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        place = f"{int(time()):010d}.{gethostname()}.{os.getpid()}.{next(self.NUMBER)}"
        self._path = folder.path / "tb" / f"events.out.tfevents.{place}"
        with written(self._path):
            self._path.parent.mkdir(exist_ok=True)
            self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        start = {"status": self._proto.SessionLog.START}  # what was written before from this step on is not shown
        try:
            self._write(file_version="brain.Event:2")
            self._write(step=global_step + 1, session_log=start)
            if global_step == 0:  # beside the curves, in one run
                from torch.utils.tensorboard.summary import hparams

                for summary in hparams(hyperparameters(config), dict.fromkeys(OUTCOMES, 0)):
                    self._write(summary=summary)
        except StorageError:
            with suppress(OSError):
                self._file.close()
            raise

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Write every number of the row."""
        values = [{"tag": name, "simple_value": value} for name, value in scalars(log, row)]
        self._write(step=row["global_step"], summary={"value": values})

    def show(self, name: str, global_step: int, film: Path) -> None:
        """Put the film among the images, where TensorBoard plays it."""
        from PIL import Image

        with Image.open(film) as opened:
            width, height = opened.size
        image = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": film.read_bytes()}
        self._write(step=global_step, summary={"value": [{"tag": name, "image": image}]})

    def close(self) -> None:
        """Write what is left."""
        with written(self._path):
            self._file.close()

    def _write(self, **event: Any) -> None:
        with written(self._path):
            self._records.write(self._proto.Event(wall_time=time(), **event).SerializeToString())
            self._file.flush()


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
                id=_wandb_id(folder), group=place.parent.name,
                config=to_dict(config), settings=wandb.Settings(silent=quiet, console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise CommandLineError(f"log: wandb cannot start ({error}); offline: WANDB_MODE=offline") from None
        self._run.define_metric("*", step_metric="global_step")

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Send every number of the row."""
        self._run.log({"global_step": row["global_step"], **dict(scalars(log, row))})

    def show(self, name: str, global_step: int, film: Path) -> None:
        """Send the film."""
        wandb: Any = importlib.import_module("wandb")
        self._run.log({"global_step": global_step, name: wandb.Video(str(film), format="gif")})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _wandb_id(folder: RunFolder) -> str:
    """The id that the run was given when it began: another run that is made in the same place has another."""
    path = folder.path / "wandb" / "id"
    if not path.is_file():
        make_folder(path.parent)
        write_atomic(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8").strip()


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
