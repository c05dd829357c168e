"""The first task of a sequence is the same run as the task alone: what is trained for ``crl`` need not be for ``rl``.

A shared run's folder is that of a trained one, byte for byte but for times, without TensorBoard's files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from sphere_rl import checkpoint
from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.protocol import Progress
from sphere_rl.runs import RunFolder, write_atomic
from sphere_rl.sweep.plan import PlannedRun


def sources(runs: Sequence[PlannedRun]) -> dict[str, PlannedRun]:
    """The ``crl`` run that begins with the task of an ``rl`` run, by the name of the ``rl`` run."""
    known = {_first_task(run.config): run for run in runs if run.config.protocol == "crl"}
    found = {run.name: known.get(_first_task(run.config)) for run in runs if run.config.protocol == "rl"}
    return {name: source for name, source in found.items() if source is not None}


def share(run: PlannedRun, source: PlannedRun) -> bool:
    """Make a finished run's folder from the first task of ``source``; False, and nothing, if that task is not over."""
    taken, task = RunFolder(source.folder), run.config.task_sequence[0]
    policies = checkpoint.task_checkpoints(taken)[:1]
    evaluations = _lines(taken, "eval", lambda row: row["task_index"] == 0 and row["phase"] != "retention")
    if not policies or not evaluations or json.loads(evaluations[-1])["phase"] != "final":
        return False
    with RunFolder(run.folder) as folder:
        folder.create(to_dict(run.config))
        record = json.loads(taken.config_path.read_text()) | {"config": to_dict(run.config)}
        write_atomic(
            folder.config_path, json.dumps(record, indent=2).encode() + b"\n"
        )  # with the versions that trained
        logs = {"eval": evaluations} | {
            name: _lines(taken, name, lambda row: row["task_index"] == 0) for name in ("train", "spectrum")
        }
        for name, lines in logs.items():
            write_atomic(folder.path / f"{name}.jsonl", b"".join(lines))
        shutil.copy2(policies[0], folder.checkpoints)
        state = {
            "progress": asdict(Progress(task_index=1, global_step=run.steps)),
            "agent": None,
            "spaces": checkpoint.load(policies[0])["spaces"],
            "collector": None,
            "logs": {name: sum(map(len, lines)) for name, lines in logs.items()},
        }
        checkpoint.save_run(folder, run.steps, state)
        folder.set_status("finished", run.steps, task)
    return True


def _first_task(config: TrainConfig) -> TrainConfig:
    return replace(config, protocol="rl", tasks=config.task_sequence[:1])


def _lines(folder: RunFolder, log: str, wanted: Callable[[dict[str, Any]], bool]) -> list[bytes]:
    path = folder.path / f"{log}.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n") and wanted(json.loads(line))]
