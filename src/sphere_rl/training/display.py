"""What a run shows of itself: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from sphere_rl.config import TrainConfig
from sphere_rl.numbers import number

if TYPE_CHECKING:
    from sphere_rl.training.agent import Agent

SEPARATOR = " · "


class Lines:
    """A header, one line an iteration and one an evaluation, for files and pipes."""

    def __init__(self, config: TrainConfig, console: Console, folder: str, global_step: int) -> None:
        self.config, self.console, self.folder = config, console, folder
        self.clock, self._spectrum = Clock(config, global_step), ""

    def begin(self, agent: Agent) -> None:
        """Print the header."""
        self._print(header(self.config, agent, self.folder))

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Print the line."""
        if log == "train":
            pace = f"{number(round(row['steps_per_second']))} steps/s"
            left = f"{self.clock.left(row['global_step'])} left"
            self._print(joined(headline(self.config, row), outcome(row), self._spectrum, pace, left))
        elif log == "eval":
            episodes = f"{row['episodes']} episodes"
            self._print(f"{row['task']}: {row['phase']} evaluation, {joined(episodes, outcome(row))}")
        else:
            self._spectrum = spectrum(row) or self._spectrum

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


class Bars:
    """Live bars, of the task and of the sequence where there are several tasks, with what is known below.

    The header and evaluations are lines above them.
    """

    def __init__(self, config: TrainConfig, console: Console, folder: str, global_step: int) -> None:
        self.config, self.folder, self.clock = config, folder, Clock(config, global_step)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[steps]}"))
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._steps, tasks = config.steps_of_task, config.task_sequence
        index = min(global_step // self._steps, len(tasks) - 1)
        self._task = self._progress.add_task("", total=self._steps, steps="")
        total = self._steps * len(tasks)
        self._all = self._progress.add_task(f"all {len(tasks)} tasks", total=total, steps="", visible=len(tasks) > 1)
        self._outcome, self._spectrum, self._pace = f"making {config.num_envs} environments and the agent", "", ""
        self._move(tasks[index], global_step - index * self._steps, global_step)
        self._live = Live(get_renderable=self._draw, console=console)
        self._live.start()

    def begin(self, agent: Agent) -> None:
        """Print the header; what comes first is a rollout, and the kernels are compiled in the update after it."""
        self._live.console.print(header(self.config, agent, self.folder), markup=False, soft_wrap=True)
        self._outcome = "first rollout, compiling"
        self._live.refresh()

    def row(self, log: str, row: dict[str, Any]) -> None:
        """Move the bars, print an evaluation, or remember a measurement."""
        if log == "train":
            self._move(row["task"], row["task_step"], row["global_step"])
            pace = f"{number(round(row['steps_per_second']))} steps/s"
            self._outcome = outcome(row)
            self._pace = joined(pace, f"{self.clock.left(row['global_step'])} left")
        elif log == "eval":
            text = joined(f"{row['task']}{SEPARATOR}{row['phase']} evaluation", outcome(row))
            self._live.console.print(text, markup=False)
        else:
            self._spectrum = spectrum(row) or self._spectrum

    def close(self) -> None:
        """Leave the bars as they are."""
        self._live.stop()

    def _move(self, task: str, task_step: int, global_step: int) -> None:
        for bar, done, text in ((self._task, task_step, task), (self._all, global_step, None)):
            total = self._progress.tasks[bar].total or 0
            steps = f"{number(done)} / {number(int(total))}"
            self._progress.update(bar, completed=done, description=text, steps=steps)

    def _draw(self) -> Group:
        notes = (joined(self._outcome, self._pace), self._spectrum)
        return Group(self._progress, *(Text(f"  {note}") for note in notes if note))


class Clock:
    """Time left at the mean speed since this process began."""

    def __init__(self, config: TrainConfig, global_step: int) -> None:
        self._total = config.steps_of_task * len(config.task_sequence)
        self._first, self._began = global_step, monotonic()

    def left(self, global_step: int) -> str:
        """As hours, minutes and seconds."""
        pace = (monotonic() - self._began) / max(1, global_step - self._first)
        return duration(pace * (self._total - global_step))


def duration(seconds: float) -> str:
    """3725 becomes 1h02m, 65 becomes 1m05s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours}h{minutes_left:02d}m" if hours else f"{minutes}m{rest:02d}s"


def joined(*parts: str) -> str:
    """The parts that there are, with dots between them."""
    return SEPARATOR.join(part for part in parts if part)


def header(config: TrainConfig, agent: Agent, folder: str) -> str:
    """Methods, networks and their parameters, what is trained, the device and the run's folder."""
    sizes = [number(sum(p.numel() for p in network.parameters())) for network in (agent.actor, agent.critic)]
    tasks = len(config.task_sequence)
    what = f"{tasks} tasks of {config.suite}, {config.protocol}" if tasks > 1 else config.task_sequence[0]
    return joined(
        f"method {'+'.join(config.method)}",
        f"actor {config.actor} ({sizes[0]} parameters)",
        f"critic {config.critic} ({sizes[1]})",
        f"{what}, {number(config.steps_of_task)} steps{' each' if tasks > 1 else ''}",
        config.device,
        folder,
    )


def headline(config: TrainConfig, row: dict[str, Any]) -> str:
    """Task, place in the sequence, and steps."""
    place = f"{row['task']} ({row['task_index'] + 1}/{len(config.task_sequence)})"
    return joined(place, f"{number(row['task_step'])}/{number(config.steps_of_task)}")


def outcome(row: dict[str, Any]) -> str:
    """Success and return of a row, those that it has."""
    success, mean_return = row.get("success_final"), row.get("mean_return")
    return joined(
        "" if success is None else f"success {success:.2f}",
        "" if mean_return is None else f"return {number(mean_return)}",
    )


def spectrum(row: dict[str, Any]) -> str:
    """Effective ranks on the probe batch, and how many experts share the load; empty for a row of another batch."""
    if row["batch"] != "probe":
        return ""
    ranks = {"r_e(K)": row.get("r_e_K"), "r_e(A)": row.get("r_e_A")}
    load = row.get("expert_load") or ()
    return joined(
        *(f"{name} {number(value)}" for name, value in ranks.items() if value is not None),
        f"load on {sharing(load):.1f} of {len(load)} experts" if len(load) > 1 else "",
    )


def sharing(load: Sequence[float | int]) -> float:
    """Experts that share the load, as the exponential of its entropy: E where all get as much, 1 where one gets all."""
    total = sum(load)
    shares = [share / total for share in load if share > 0]
    return exp(-sum(share * log(share) for share in shares))
