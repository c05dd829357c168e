"""The first task of a sequence is the same run as the task alone: what is trained for ``crl`` need not be for ``rl``.

Where both are measured on the same states: those of a suite without a sequence are of all tasks that a policy learns. A
shared run's folder is that of a trained one, byte for byte but for times, without TensorBoard's files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.errors import RunFolderError
from sphere_rl.runs import LOGS, Logs, RunFolder, checkpoint, write_atomic
from sphere_rl.runs.records import LOG_COLUMNS, content
from sphere_rl.sweep.plan import PlannedRun
from sphere_rl.training.probe import same_probe
from sphere_rl.training.progress import Due, Progress


def sources(runs: Sequence[PlannedRun]) -> dict[str, PlannedRun]:
    """The ``crl`` run that begins with the run of ``rl`` on one task, by the name of the ``rl`` run."""
    known = {_first_task(run.config): run for run in runs if run.config.protocol == "crl"}
    found = {run: known.get(_first_task(run.config)) for run in runs if run.config.protocol == "rl"}
    return {
        run.name: source
        for run, source in found.items()
        if source is not None and same_probe(run.config, source.config, run.config.task_sequence[0])
    }


def share(run: PlannedRun, source: PlannedRun) -> bool:
    """Make a finished run's folder from the first task of ``source``.

    False, and nothing is made, if that task is not over or cannot be read.
    """
    taken = RunFolder(source.folder)
    try:
        policy, origin = checkpoint.task_checkpoint(taken, 0), taken.record() | taken.status()
        rows = {log: [row for row in taken.read(log, LOG_COLUMNS[log]) if row["task_index"] == 0] for log in LOGS}
        spaces = checkpoint.load(policy).get("spaces") if policy else None
    except RunFolderError:
        return False
    rows["eval"] = [row for row in rows["eval"] if row["phase"] != "retention"]
    if policy is None or spaces is None or not rows["eval"] or rows["eval"][-1]["phase"] != "final":
        return False
    try:
        with RunFolder(run.folder) as folder:
            if folder.config_path.exists():  # another sweep has been at it
                return False
            _make(folder, run, rows, (policy.name, content(policy)), spaces, origin)
    except RunFolderError:  # another sweep is at it; or the run's own process says what is wrong with the folder
        return False
    return True


def _make(
    folder: RunFolder,
    run: PlannedRun,
    rows: dict[str, list[dict[str, Any]]],
    policy: tuple[str, bytes],
    spaces: Any,
    origin: Mapping[str, Any],
) -> None:
    """Fill the folder: ``rows`` by log, the policy's file by name; versions, commit and rollbacks are of ``origin``."""
    times = max((row.get("rollbacks", 0) for row in rows["train"]), default=0)
    rollbacks = origin.get("rollbacks", [])[:times]
    folder.create(to_dict(run.config), {name: origin[name] for name in ("versions", "commit")})
    name, data = policy
    final = rows["eval"].pop()
    with closing(Logs(folder, {})) as logs:
        for log in LOGS:
            for row in rows[log]:
                logs.append(log, row)
        write_atomic(folder.checkpoints / name, data)
        lengths = logs.lengths()
        logs.append("eval", final)
    state = {
        "progress": asdict(Progress(task_index=1, global_step=run.steps)),
        "agent": None,
        "spaces": spaces,
        "collector": None,
        "due": asdict(Due("final", 0, run.steps)),  # as trained: the evaluation comes after the checkpoint
        "logs": lengths,
    }
    if rollbacks:
        state["rollbacks"] = rollbacks
    checkpoint.save_run(folder, run.steps, state)
    folder.set_status("finished", run.steps, run.config.task_sequence[0], rollbacks=rollbacks)


def _first_task(config: TrainConfig) -> TrainConfig:
    return replace(config, protocol="rl", tasks=config.task_sequence[:1])
