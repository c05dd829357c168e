"""Runs that are killed from outside, at moments that no code has chosen."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

from sphere_rl import protocol
from sphere_rl.runs import RunFolder

# A server that has the libraries loaded but none of this process's threads: forking those could deadlock.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sphere_rl.protocol"])


def resume_until_finished(folder: RunFolder, seconds: float, seed: int = 0) -> int:
    """Resume a run in its own process and SIGKILL it within so many seconds, until it finishes; count the kills."""
    moments, kills = random.Random(seed), 0
    while folder.status().get("state") != "finished":
        process = SERVER.Process(target=resume_alone, args=(folder.path,))
        process.start()
        process.join(moments.uniform(0, seconds) * (1 + kills))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
    return kills


def resume_alone(path: Path) -> None:
    """What the process does."""
    with RunFolder(path) as folder:
        protocol.resume(folder, lambda step: [])
