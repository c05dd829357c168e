"""The process of one run of a sweep: ``python -m sphere_rl.sweep.child PARENT FOLDER WORDS…``.

It waits for the lock of whoever held the run before, becomes ``sphere train`` or ``sphere resume``, and ends when the
process that started it dies, however that happened: no run is left behind without its sweep.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from sphere_rl.errors import RunFolderError
from sphere_rl.runs import RunFolder

PR_SET_PDEATHSIG = 1
"""From Linux' prctl.h; the setting outlives exec."""
LOCK_SECONDS = 300
"""Longer than a server of network files keeps the locks of a machine that it has lost, 90 seconds as a rule."""


def main(parent: int, folder: Path, words: list[str]) -> int:
    """Do nothing for a run that is finished, else become the process that trains it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            return 130
    with RunFolder(folder, LOCK_SECONDS) as run:
        pass
    if not run.config_path.is_file():
        command = ["train", *words, "--out", str(folder), "--quiet"]
    elif run.status().get("state") == "finished":
        return 0
    else:
        command = ["resume", str(folder), "--quiet"]
    os.execv(sys.executable, [sys.executable, "-m", "sphere_rl.cli", *command])


if __name__ == "__main__":
    try:
        sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
    except RunFolderError as unreadable:
        print(f"sphere: {unreadable}", file=sys.stderr)
        sys.exit(2)
