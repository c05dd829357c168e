"""How large the mean actions are with which an agent begins each task of a sequence: on the task's probe states.

    python benchmarks/bounds.py RUN [RUN ...]

Takes the policies of finished tasks, which are in a run's folder and not among the published files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from measure import markdown

from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.spectrum.plasticity import root_mean_square
from sphere_rl.training.diagnosis import collecting
from sphere_rl.training.policies import read_policy
from sphere_rl.training.probe import probe_batch
from sphere_rl.training.saved import config_of


def beginnings(folder: RunFolder) -> dict[str, str]:
    """Of each task but the first, the root mean square of the mean actions that the task before has left, and the share
    of them beyond ±1, CW10's bounds.
    """
    config, found = config_of(folder), {}
    for path, task in zip(checkpoint.task_checkpoints(folder), config.task_sequence[1:], strict=False):
        policy, _ = read_policy(folder, path)
        states = policy.normalize(torch.as_tensor(probe_batch(config, task)))
        with collecting(policy), torch.no_grad():
            mean = policy.actor.trace(states).output
        found[task] = f"{root_mean_square([mean]):.2f}, {(mean.abs() > 1).float().mean().item():.0%}"
    return found


def main() -> None:
    runs = {Path(path).name: beginnings(RunFolder(Path(path))) for path in sys.argv[1:]}
    tasks = dict.fromkeys(task for found in runs.values() for task in found)
    print(markdown(("begins", *runs), [(task, *(found.get(task, "–") for found in runs.values())) for task in tasks]))


if __name__ == "__main__":
    main()
