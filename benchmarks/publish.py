"""Copies the small files of runs to where they are published: two gzipped logs and the configuration of each.

    python benchmarks/publish.py runs/pilot docs/results/pilot

Names are ``<protocol>[-<task>]-<method>-seed<k>``, with the task for runs of protocol rl, and the label that a run was
given in the method's place; a folder that was named by hand keeps that name. Logs are cut to whole lines, so runs that
still go on can be published, too. The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from sphere_rl.results import run_folders
from sphere_rl.runs import RunFolder

LOGS = ("eval", "spectrum")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", type=Path, help="folder of run folders")
    options.add_argument("out", type=Path, help="folder to publish in")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for path in run_folders(given.runs):
        folder = RunFolder(path)
        record = json.loads(folder.config_path.read_text())
        stem = name_of(record["config"], path.name)
        (given.out / f"{stem}-config.json").write_text(
            json.dumps(record | {"status": folder.status()}, indent=2) + "\n"
        )
        for log in LOGS:
            lines = "".join(json.dumps(row) + "\n" for row in folder.read(log))
            (given.out / f"{stem}-{log}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 9, mtime=0))
        print(stem, folder.status().get("state"), folder.status().get("global_step"))


def name_of(config: dict[str, Any], folder: str) -> str:
    if not folder.startswith(config["suite"]):  # no sweep's name: somebody gave it
        return f"{config['protocol']}-{folder}-seed{config['seed']}"
    method = config.get("label") or "+".join(config["method"])
    task = f"{config['tasks'][0]}-" if config["protocol"] == "rl" and len(config["tasks"]) == 1 else ""
    return f"{config['protocol']}-{task}{method}-seed{config['seed']}"


if __name__ == "__main__":
    main()
