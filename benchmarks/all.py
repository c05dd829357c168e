"""Run the speed benchmarks and keep their tables in docs/benchmarks.md.

python benchmarks/all.py
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
COMMANDS = (
    "learner.py --threads 1",
    "learner.py --threads 2",
    "train.py",
    "methods.py",
    "breakdown.py --suite cw10 --method sphere --steps 256",
    "breakdown.py --suite h1 --method sphere",
    "entk.py",
    "h1.py",
)


def main() -> None:
    sections = ["# Benchmarks", "Written by `make bench`. Every ratio is from one run; times are medians of turns."]
    for command in COMMANDS:
        script, *options = command.split()
        result = subprocess.run(
            [sys.executable, HERE / script, *options], check=True, stdout=subprocess.PIPE, text=True
        )
        print(result.stdout, flush=True)
        sections += [f"## `benchmarks/{command}`", result.stdout.strip()]
        PAGE.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
