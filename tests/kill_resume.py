"""Kill runs of every method at random moments, with and without a normaliser, and compare them with whole runs bitwise.

    python tests/kill_resume.py

The test suite does this for one configuration; all of them take minutes. Tiny networks, SIGKILL from outside.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from comparing import run_difference
from conformance.agents import make_config
from killing import resume_until_finished

from sphere_rl import protocol
from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder


def main() -> None:
    torch.set_num_threads(1)
    for name in methods():
        for normalized in (False, True):
            config = make_config(
                name, tasks=["Pendulum-v1", "Pendulum-v1"], steps_per_task=192, normalize_observations=normalized
            )
            with tempfile.TemporaryDirectory() as place:
                kills, difference = compare(config, Path(place))
            verdict = f"DIFFERENT at {difference}" if difference else "same"
            print(f"{name:<16} normalised {normalized!s:<6} {kills:>2} kills  {verdict}", flush=True)


def compare(config: TrainConfig, place: Path) -> tuple[int, str | None]:
    """Kills that the run survived, and where it ended otherwise than the whole one."""
    whole, killed = RunFolder(place / "whole"), RunFolder(place / "killed")
    with whole:
        protocol.start(config, whole, lambda step: [])
    with killed:
        killed.create(to_dict(config))
    kills = resume_until_finished(killed, seconds=0.3)
    return kills, run_difference(whole, killed)


if __name__ == "__main__":
    main()
