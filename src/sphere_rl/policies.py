"""Trained policies, read back from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphere_rl import checkpoint
from sphere_rl.agent import Agent, Policy, Spaces
from sphere_rl.config import from_dict
from sphere_rl.runs import RunFolder


def load_policy(run_dir: Path | str, checkpoint: str = "latest") -> Policy:
    """Load the policy of a run as a torch module: raw observations [N, D] → mean action (or logits) [N, A].

    Args:
        run_dir: the run folder.
        checkpoint: ``"latest"``, or a file of its ``checkpoints`` folder, such as ``"task-00-hammer"``.

    Raises:
        RunFolderError: no run, no such checkpoint, or a broken one.
    """
    return _policy(RunFolder.existing(run_dir), checkpoint)


def _policy(folder: RunFolder, name: str) -> Policy:
    path = checkpoint.find(folder, name)
    state: dict[str, Any] = checkpoint.load(path)
    if state["agent"] is None:  # between two tasks of protocol rl: the next agent is not made yet
        state = checkpoint.load(checkpoint.task_checkpoints(folder)[state["progress"]["task_index"] - 1])
    agent = Agent(from_dict(folder.config()), Spaces(**state["spaces"]), seed=0, learns=False)
    saved = state["agent"]
    for method in agent.methods:
        method.load_state_dict(saved["methods"][method.name])
    agent.actor.load_state_dict(saved["actor"])
    if agent.normalizer:
        agent.normalizer.load_state_dict(saved["normalizer"])
    policy = Policy(agent.actor, agent.normalizer)
    return policy.eval()
