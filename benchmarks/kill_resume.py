"""Kill runs of every method at random moments, with and without a normaliser, and compare them with whole runs bitwise.

    python benchmarks/kill_resume.py

The test suite does this for one configuration; all of them take minutes. Pendulum, tiny networks, SIGKILL from outside.
"""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from sphere_rl import checkpoint, protocol
from sphere_rl.config import TrainConfig, override, to_dict
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder

TINY: dict[str, Any] = {
    "suite": "gym", "tasks": ["Pendulum-v1", "Pendulum-v1"], "num_envs": 2, "num_steps": 32, "minibatch_size": 32,
    "num_epochs": 1, "steps_per_task": 192, "checkpoint_every": 64, "eval_every": 128, "eval_episodes": 1,
    "final_eval_episodes": 1, "spectrum_every": -1, "network": {"width": 16, "depth": 2, "num_experts": 3},
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    for name in methods():
        for normalized in (False, True):
            config = override(TrainConfig(), TINY | {"method": [name], "normalize_observations": normalized})
            with tempfile.TemporaryDirectory() as place:
                kills, same = compare(config, Path(place))
            print(
                f"{name:<16} normalised {normalized!s:<6} {kills:>2} kills  {'same' if same else 'DIFFERENT'}",
                flush=True,
            )


def compare(config: TrainConfig, place: Path) -> tuple[int, bool]:
    """Kills that the run survived, and whether it ended as the whole one."""
    whole, killed = RunFolder(place / "whole"), RunFolder(place / "killed")
    with whole:
        protocol.start(config, whole, lambda step: [])
    with killed:
        killed.create(to_dict(config))
    moments, kills = random.Random(0), 0
    while killed.status().get("state") != "finished":
        process = multiprocessing.get_context("fork").Process(target=resume, args=(killed.path,))
        process.start()
        process.join(moments.uniform(0, 0.3) * (1 + kills / 4))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    states = [checkpoint.latest_run(folder) for folder in (whole, killed)]
    logs = [(folder.path / "eval.jsonl").read_bytes() for folder in (whole, killed)]
    return kills, logs[0] == logs[1] and same(*(state["agent"] for state in states if state))


def resume(path: Path) -> None:
    with RunFolder(path) as folder:
        protocol.resume(folder, lambda step: [])


def same(one: Any, two: Any) -> bool:
    """Bitwise equality of nested state."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


if __name__ == "__main__":
    main()
