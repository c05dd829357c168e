"""What a sweep costs: steps, and hours at the speed of runs that are there, or of a short calibration."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import harmonic_mean, median

from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.errors import RunFolderError, TrainingError
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.settings import settings
from sphere_rl.suites import make_suite
from sphere_rl.suites.guard import make_envs
from sphere_rl.sweep.display import standing
from sphere_rl.sweep.engines import start
from sphere_rl.sweep.plan import PlannedRun
from sphere_rl.training.sizes import checkpoint_bytes, size

CALIBRATION_STEPS = 1024
"""Environment steps of one iteration of a calibration, at least."""


def steps_left(run: PlannedRun) -> int:
    """Environment steps that the run still has to take."""
    found = standing(run)
    return 0 if found.state == "finished" else run.steps - found.steps


def speeds(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Training steps per second of every run by name, one run alone: from like runs of this sweep, or measured now.

    Evaluations come on top: some percent at the default rate.
    """
    known: dict[tuple[str, str], float] = {}
    for run in runs:
        for task, measured in _measured(run).items():
            known.setdefault(_kind(run.config, task), measured)
    for run in runs:
        for task in run.config.task_sequence:
            if (kind := _kind(run.config, task)) not in known:
                known[kind] = calibrate(run, task)
    return {
        run.name: harmonic_mean([known[_kind(run.config, task)] for task in run.config.task_sequence]) for run in runs
    }


def calibrate(run: PlannedRun, task: str) -> float:
    """Train a task of the run for two short iterations in a temporary folder; the speed of the second."""
    config = run.config
    unit = config.minibatch_size // math.gcd(config.minibatch_size, config.num_envs)
    steps = unit * math.ceil(CALIBRATION_STEPS / (unit * config.num_envs))
    words = [*run.words, "--tasks", task, "--num-steps", str(steps), "--final-eval-episodes", "1"]
    words += ["--steps-per-task", str(2 * steps * config.num_envs), "--eval-every", str(2**62)]
    words += ["--spectrum-every", "-1", "--log", "tensorboard", "--no-films"]  # what is timed is training alone
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "run", Path(temporary) / "log"
        process = start(str(folder), words, str(log), run.threads)
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code:
            raise TrainingError(f"{run.name}: the calibration failed: {last_line(log)}")
        return RunFolder(folder).read("train")[-1]["steps_per_second"]


def reason(run: PlannedRun, code: int) -> str:
    """Why a run failed: the error of its status, or the last line of its process, where that was refused (2), too."""
    folder = RunFolder(run.folder)
    try:
        error = folder.status().get("error") if folder.config_path.is_file() else None
    except RunFolderError as unreadable:
        error = str(unreadable)
    return error if error and code != 2 else last_line(run.log)


def last_line(log: Path) -> str:
    """The last line that a process printed."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "no output"


def room(runs: Sequence[PlannedRun]) -> str:
    """What checkpoints of the runs take on disk, in words; the first task's spaces stand for those of all."""
    kinds: dict[tuple[str, str], tuple[int, int]] = {}
    total, one = 0, list[int]()
    for run in runs:
        task = run.config.task_sequence[0]
        kind = _kind(run.config, task)
        if kind not in kinds:
            envs = make_envs(make_suite(run.config.suite), task, 1, 0, 1, run.config.environment)
            kinds[kind] = checkpoint_bytes(run.config, Spaces.of(envs))
            envs.close()
        step, policy = kinds[kind]
        one.append(step)
        total += checkpoint.KEPT * step + policy * len(run.config.task_sequence)
    sizes = dict.fromkeys((size(min(one)), size(max(one))))
    kept = f"the last {checkpoint.KEPT} of a run are kept and a policy a task"
    return f"checkpoints of {' to '.join(sizes)}, {kept}: {size(total)} on disk"


def speed_class(config: TrainConfig) -> str:
    """Runs of a class have one speed on a task: they differ in label, seed, protocol, tasks and real numbers only."""
    given = settings(to_dict(config), "trains", "watches", "spares")
    kept = {name: value for name, value in given if not isinstance(value, float)}
    return repr((config.suite, config.actor, config.method, kept))


def _kind(config: TrainConfig, task: str) -> tuple[str, str]:
    """What has one speed: runs of a class on a task, or on whatever tasks of a suite that has one kind of them."""
    return speed_class(config), "" if make_suite(config.suite).same_spaces else task


def _measured(run: PlannedRun) -> dict[str, float]:
    """Steps per second on each task that the run has been on."""
    folder = RunFolder(run.folder)
    rows = folder.read("train", ("task", "steps_per_second")) if folder.config_path.is_file() else []
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["task"], []).append(row["steps_per_second"])
    return {task: median(values) for task, values in found.items()}
