"""Trained policies, read back from a run folder: which checkpoint holds a task's policy, and whether it fits a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sphere_rl.config import TrainConfig
from sphere_rl.errors import ConfigError, RunFolderError
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.runtime import check_device
from sphere_rl.suites import Suite, check_task, make_suite
from sphere_rl.suites.guard import make_envs
from sphere_rl.training import exported
from sphere_rl.training.agent import Agent, Policy
from sphere_rl.training.finite import bad_number
from sphere_rl.training.progress import Progress, record_of
from sphere_rl.training.saved import config_of


def load_policy(run_dir: Path | str, checkpoint: str = "latest", device: str = "cpu") -> Policy:
    """Load the policy of a run as a torch module: raw observations [N, D] → mean action (or logits) [N, A].

    Args:
        run_dir: the run folder, or one that ``sphere export --format safetensors`` has written; wherever they are now.
        checkpoint: ``"latest"``, or a file of its ``checkpoints`` folder, such as ``"task-00-hammer"``.
        device: where to load it to, whatever device the run was made on.

    Raises:
        RunFolderError: no run, no such checkpoint, or one that is broken or does not fit the run's configuration.
        ConfigError: PyTorch cannot compute on this device here.
    """
    if (Path(run_dir) / exported.DESCRIPTION).is_file():
        if checkpoint != "latest":
            raise RunFolderError(f"{run_dir}: an exported policy has no checkpoints; expected checkpoint='latest'")
        return exported.load(Path(run_dir), device)
    return _load(RunFolder.existing(run_dir), checkpoint, device)


def _load(folder: RunFolder, name: str, device: str) -> Policy:
    return read_policy(folder, placed(folder, checkpoint.find(folder, name)).path, device)[0]


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that holds a policy, and where in the run it was written."""

    path: Path
    global_step: int
    task_index: int


def placed(folder: RunFolder, path: Path) -> Chosen:
    """Where a checkpoint belongs; one that was written between two tasks of protocol rl stands for the task before.

    Raises:
        RunFolderError: it is missing, broken, or of another run.
    """
    state = checkpoint.load(path)
    with checkpoint.fitting(path):
        config, progress = config_of(folder), record_of(Progress, state["progress"])
        # What is written at the end of a task stands at the start of the next one, on which nothing was trained yet.
        index = progress.task_index - (progress.iteration == 0)
        if not 0 <= index < len(config.task_sequence):
            raise ValueError(f"it is of task {index + 1}, and the run has {len(config.task_sequence)}")
        if state["agent"] is not None:
            return Chosen(path, progress.global_step, index)
    before = checkpoint.task_checkpoint(folder, index)
    if before is None:
        raise RunFolderError(f"{folder.checkpoints}: the policy at the end of task {index + 1} is missing")
    return placed(folder, before)


def own_policies(folder: RunFolder, config: TrainConfig) -> dict[int, Chosen]:
    """The policy that a run has of each task, by the task's place in the sequence; those not begun have none.

    In ``rl`` a task's own: that of its end, or of the newest checkpoint for the task in progress. In ``crl`` the one
    agent's newest, for all tasks.

    Raises:
        RunFolderError: there is no checkpoint yet, or one of them is broken.
    """
    latest = placed(folder, checkpoint.find(folder, "latest"))
    if config.protocol == "crl":
        return dict.fromkeys(range(len(config.task_sequence)), latest)
    found = {index: checkpoint.task_checkpoint(folder, index) for index in range(len(config.task_sequence))}
    return {latest.task_index: latest} | {index: placed(folder, path) for index, path in found.items() if path}


def policy_for(
    folder: RunFolder, config: TrainConfig, tasks: Sequence[str] | None, name: str | None
) -> list[tuple[str, Chosen]]:
    """Pairs of task and checkpoint: the named ``checkpoint`` for all ``tasks``, or each task's own (`own_policies`).

    Without ``tasks`` all of the run, in order, that there is a policy of. A named task that the run trains several
    times has the last policy of it.

    Raises:
        ConfigError: the suite has no such task.
        RunFolderError: a named task has no policy of its own (yet); or as `own_policies`.
    """
    for task in tasks or ():
        check_task(make_suite(config.suite), task)
    if name is not None:
        chosen = placed(folder, checkpoint.find(folder, name))
        return [(task, chosen) for task in tasks or config.task_sequence]
    own = own_policies(folder, config)
    if tasks is None:
        return [(config.task_sequence[index], own[index]) for index in sorted(own)]
    if config.protocol == "crl":
        return [(task, own[0]) for task in tasks]
    last = {config.task_sequence[index]: own[index] for index in sorted(own)}
    for task in tasks:
        if task not in last:
            raise RunFolderError(
                f"{folder.path}: has no policy of task {task!r}, only of {', '.join(last)}; "
                "expected one of these, or a --checkpoint to use"
            )
    return [(task, last[task]) for task in tasks]


def load_for_task(
    run_dir: Path | str, task: str | None = None, name: str | None = None, device: str = "cpu"
) -> tuple[Suite, str, Chosen, Policy]:
    """One task with its suite and policy; by default the newest policy and the task that it was trained on.

    Raises:
        ConfigError: the suite has no such task, the policy does not fit it, or no such device.
        RunFolderError: as `policy_for`.
    """
    folder = RunFolder.existing(run_dir)
    suite, (task, chosen) = make_suite(config_of(folder).suite), choose(folder, task, name)
    return suite, task, chosen, read_policies(folder, suite, [(task, chosen)], device)[chosen.path]


def choose(folder: RunFolder, task: str | None = None, name: str | None = None) -> tuple[str, Chosen]:
    """A task and the checkpoint that `policy_for` has for it; by default the newest one and the task of it."""
    config = config_of(folder)
    if task is not None:
        return policy_for(folder, config, [task], name)[0]
    chosen = placed(folder, checkpoint.find(folder, name or "latest"))
    return config.task_sequence[chosen.task_index], chosen


def read_policy(folder: RunFolder, path: Path, device: str = "cpu") -> tuple[Policy, Spaces]:
    """The policy of one checkpoint (of `placed`), and the spaces that it was trained in; raises as `load_policy`."""
    check_device(device)
    config, state = replace(config_of(folder), device=device), checkpoint.load(path)
    with checkpoint.fitting(path):
        spaces, saved = record_of(Spaces, state["spaces"]), state["agent"]
        agent = Agent(config, spaces, seed=0, learns=False)
        for method in agent.methods:
            method.load_state_dict(saved["methods"][method.name])
        agent.actor.load_state_dict(saved["actor"])
        _restore_normalizer(agent, saved["normalizer"])
        if found := bad_number({"actor": saved["actor"], "normalizer": saved["normalizer"]}):
            raise RunFolderError(f"{path}: holds a policy that is no use ({found})")
        return Policy(agent.actor, agent.normalizer).eval(), spaces


def _restore_normalizer(agent: Agent, saved: dict[str, Any] | None) -> None:
    if (agent.normalizer is None) != (saved is None):
        raise ValueError("only one of them normalises observations")
    if agent.normalizer is not None and saved is not None:
        agent.normalizer.load_state_dict(saved)
        if agent.normalizer.mean.shape != (agent.spaces.observation_dim,):
            raise ValueError(f"its normaliser is of {agent.normalizer.mean.size} observations")


def read_policies(
    folder: RunFolder, suite: Suite, chosen: Sequence[tuple[str, Chosen]], device: str = "cpu"
) -> dict[Path, Policy]:
    """The policies of these checkpoints, after a look at whether each fits its task; raises as its parts."""
    found = {one.path: read_policy(folder, one.path, device) for _, one in chosen}
    arguments = config_of(folder).environment
    for task, one in dict.fromkeys(chosen):
        check_spaces(one.path, found[one.path][1], suite, task, arguments)
    return {path: policy for path, (policy, _) in found.items()}


def check_spaces(path: Path, spaces: Spaces, suite: Suite, task: str, arguments: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a task has other spaces than the policy of a checkpoint was trained in."""
    theirs = spaces_of(suite, task, arguments)
    if theirs != spaces:
        raise ConfigError("checkpoint", path.stem, f"a policy for {task} ({theirs}), not for {spaces}")


def spaces_of(suite: Suite, task: str, arguments: Mapping[str, Any]) -> Spaces:
    """The spaces of a task whose environments take these arguments."""
    one = suite.tasks[0] if suite.same_spaces and suite.tasks else task
    return _task_spaces(suite.name, one, tuple(arguments.items()))


@cache
def _task_spaces(suite: str, task: str, arguments: tuple[tuple[str, Any], ...]) -> Spaces:
    envs = make_envs(make_suite(suite), task, 1, 0, 1, dict(arguments))
    envs.close()
    return Spaces.of(envs)
