"""Copies the small files of runs to where they are published; see `sphere_rl.runs.published`.

    python benchmarks/publish.py runs/pilot docs/results/pilot

Runs that still go on are published as far as they are, once they have ended a task.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sphere_rl.results import run_folders
from sphere_rl.runs import RunFolder
from sphere_rl.runs.published import publish


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, help="folder of run folders")
    options.add_argument("out", type=Path, help="folder to publish in")
    given = options.parse_args()
    for folder in map(RunFolder, run_folders(given.runs)):
        status = folder.status()
        if any(line["phase"] == "final" for line in folder.read("eval")):
            print(publish(folder, given.out), status.get("state"), status.get("global_step"))


if __name__ == "__main__":
    main()
