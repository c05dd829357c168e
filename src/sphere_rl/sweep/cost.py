"""What a sweep costs: steps, and hours at the speed of runs that are there, or of a short calibration."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
    known: dict[str, float] = {}
    for run in runs:
        if (measured := _measured(run)) is not None:
            known.setdefault(speed_class(run.config), measured)
    for run in runs:
        kind = speed_class(run.config)
        if kind not in known:
            known[kind] = calibrate(run)
    return {run.name: known[speed_class(run.config)] for run in runs}


def calibrate(run: PlannedRun) -> float:
    """Train the run's first task for two short iterations in a temporary folder; the speed of the second."""
    config = run.config
    unit = config.minibatch_size // math.gcd(config.minibatch_size, config.num_envs)
    steps = unit * math.ceil(CALIBRATION_STEPS / (unit * config.num_envs))
    words = [*run.words, "--tasks", config.task_sequence[0], "--num-steps", str(steps), "--final-eval-episodes", "1"]
    words += ["--steps-per-task", str(2 * steps * config.num_envs), "--eval-every", str(2**62)]
    words += ["--spectrum-every", "-1"]  # what is timed is training alone
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "run", Path(temporary) / "log"
        process = start(str(folder), words, str(log), run.threads)
        try:
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code:
            raise TrainingError(f"{run.name}: the calibration failed: {reason(run, log)}")
        return RunFolder(folder).read("train")[-1]["steps_per_second"]


def reason(run: PlannedRun, log: Path) -> str:
    """Why a run failed: the error of its status, or the last line that its process printed."""
    folder = RunFolder(run.folder)
    try:
        error = folder.status().get("error") if folder.config_path.is_file() else None
    except RunFolderError as unreadable:
        error = str(unreadable)
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return error or (lines[-1] if lines else "no output")


def room(runs: Sequence[PlannedRun]) -> str:
    """What checkpoints of the runs take on disk, in words; the first task's spaces stand for those of all."""
    kinds: dict[str, tuple[int, int]] = {}
    total, one = 0, list[int]()
    for run in runs:
        kind = speed_class(run.config)
        if kind not in kinds:
            envs = make_envs(make_suite(run.config.suite), run.config.task_sequence[0], 1, 0, 1, run.config.environment)
            kinds[kind] = checkpoint_bytes(run.config, Spaces.of(envs))
            envs.close()
        step, policy = kinds[kind]
        one.append(step)
        total += checkpoint.KEPT * step + policy * len(run.config.task_sequence)
    sizes = dict.fromkeys((size(min(one)), size(max(one))))
    kept = f"the last {checkpoint.KEPT} of a run are kept and a policy a task"
    return f"checkpoints of {' to '.join(sizes)}, {kept}: {size(total)} on disk"


def speed_class(config: TrainConfig) -> str:
    """Runs of a kind have one speed: they differ in label, seed, protocol, tasks and strengths, real numbers, only."""
    given = settings(to_dict(config), "trains", "watches", "spares")
    kept = {name: value for name, value in given if not isinstance(value, float)}
    return repr((config.suite, config.actor, config.method, kept))


def _measured(run: PlannedRun) -> float | None:
    folder = RunFolder(run.folder)
    rows = folder.read("train", ("steps_per_second",)) if folder.config_path.is_file() else []
    found = sorted(row["steps_per_second"] for row in rows)
    return found[len(found) // 2] if found else None
