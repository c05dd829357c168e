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
from sphere_rl.spectrum.plasticity import outside_share, root_mean_square
from sphere_rl.suites import make_suite
from sphere_rl.training.diagnosis import collecting
from sphere_rl.training.policies import read_policy, spaces_of
from sphere_rl.training.probe import probe_batch
from sphere_rl.training.saved import config_of


def beginnings(folder: RunFolder) -> dict[str, str]:
    """Of each task but the first, the root mean square of the mean actions that the task before has left, and the share
    of them outside the action box.
    """
    config, found = config_of(folder), {}
    for path, task in zip(checkpoint.task_checkpoints(folder), config.task_sequence[1:], strict=False):
        policy, _ = read_policy(folder, path)
        states = policy.normalize(torch.as_tensor(probe_batch(config, task)))
        with collecting(policy), torch.no_grad():
            mean = policy.actor.trace(states).output
        box = spaces_of(make_suite(config.suite), task, config.environment).box
        assert box is not None
        found[task] = f"{root_mean_square([mean]):.2f}, {outside_share(mean, *box):.0%}"
    return found


def main() -> None:
    runs = {Path(path).name: beginnings(RunFolder(Path(path))) for path in sys.argv[1:]}
    tasks = dict.fromkeys(task for found in runs.values() for task in found)
    print(markdown(("begins", *runs), [(task, *(found.get(task, "–") for found in runs.values())) for task in tasks]))


if __name__ == "__main__":
    main()
