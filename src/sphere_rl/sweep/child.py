"""The process of one run of a sweep: ``python -m sphere_rl.sweep.child FOLDER WORDS…`` trains it, or goes on with it.

It ends when the process that started it dies, however that happened, so that no run is left behind without its
sweep; and it waits for such a predecessor's lock before it begins.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from filelock import FileLock

from sphere_rl import cli
from sphere_rl.runs import RunFolder

PR_SET_PDEATHSIG = 1
LOCK_SECONDS = 60


def main(parent: int, folder: Path, words: list[str]) -> int:
    """Train, resume, or do nothing for a run that is finished; the exit code is that of ``sphere``."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 130
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
        run = RunFolder(folder)
    if not run.config_path.is_file():
        return cli.main(["train", *words, "--out", str(folder), "--quiet"])
    if run.status().get("state") == "finished":
        return 0
    return cli.main(["resume", str(folder), "--quiet"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
