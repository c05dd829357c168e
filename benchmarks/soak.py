"""Whether a long run keeps its memory, open files, threads and processor time: watched from outside.

    python benchmarks/soak.py OUT --suite gym --tasks CartPole-v1 --steps-per-task 5e6 [flags of sphere train]
    python benchmarks/soak.py OUT --pid 4711 --run runs/r     # watch a run that is there

Every ``--every`` seconds a line goes to OUT/samples.jsonl; at the run's end, or after ``--hours``, OUT/soak.png is
drawn and one line says how each quantity moved from the first quarter of the run (less a tenth to warm up) to the last.
Processor time, not time: a busy machine is not a run that gets slower.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from sphere_rl.sweep.display import last_row

WARM = 0.1
"""Share of the run that is left out: buffers grow, caches fill."""
MIB = 2**20


def sample(pid: int, run: Path) -> dict[str, Any] | None:
    """Step, resident bytes, open files, threads and processor seconds of a process; ``None`` when it is gone."""
    place = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":\t", 1) for line in (place / "status").read_text().splitlines() if ":\t" in line)
        words = (place / "stat").read_text().rpartition(")")[2].split()
        files = len(list((place / "fd").iterdir()))
    except OSError:
        return None
    if "VmRSS" not in status:  # ended, and nobody has asked how
        return None
    return {
        "time": time.time(),
        "step": last_row(run / "train.jsonl").get("global_step", 0),
        "memory": int(status["VmRSS"].split()[0]) * 1024,
        "files": files,
        "threads": int(status["Threads"]),
        "processor": (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK"),
    }


def watch(pid: int, run: Path, out: Path, every: float, hours: float) -> None:
    """Add samples until the process has ended or the hours are over."""
    end = time.monotonic() + hours * 3600
    with (out / "samples.jsonl").open("a") as file:
        while time.monotonic() < end and (found := sample(pid, run)) is not None:
            print(json.dumps(found), file=file, flush=True)
            time.sleep(every)


def paced(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples at which the run had gone on, each with processor seconds per 10,000 steps since the one before."""
    found, last = [], samples[0]
    for now in samples[1:]:
        if now["step"] > last["step"]:
            found.append(now | {"pace": pace(last, now)})
            last = now
    return found


def pace(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Processor seconds per 10,000 steps from one sample to another."""
    return (after["processor"] - before["processor"]) / (after["step"] - before["step"]) * 1e4


def movement(samples: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """Medians of the first and the last quarter, after warming up; of the pace, which evaluations and rollouts make
    uneven from one sample to the next, that of the whole quarter.
    """
    start, end = samples[0]["step"], samples[-1]["step"]
    warm = [row for row in samples if row["step"] >= start + WARM * (end - start)]
    quarter = max(2, len(warm) // 4)
    first, last = (average(rows, name) for rows in (warm[:quarter], warm[-quarter:]))
    return first, last


def average(rows: list[dict[str, Any]], name: str) -> float:
    """Median of a quantity, or the pace from the first to the last of these samples."""
    return pace(rows[0], rows[-1]) if name == "pace" else median(row[name] for row in rows)


def summary(samples: list[dict[str, Any]]) -> str:
    """How far the run went, and how what was watched moved."""
    hours = (samples[-1]["time"] - samples[0]["time"]) / 3600
    units = {"memory": (1 / MIB, "MiB"), "pace": (1, "s of processor per 10,000 steps"), "files": (1, "open files"),
             "threads": (1, "threads")}  # fmt: skip
    parts = []
    for name, (factor, unit) in units.items():
        first, last = (value * factor for value in movement(samples, name))
        parts.append(f"{first:.4g} to {last:.4g} {unit} ({last / first - 1:+.1%})")
    return f"{samples[-1]['step']:,} steps in {hours:.2f} hours, {len(samples)} samples: {', '.join(parts)}"


def draw(samples: list[dict[str, Any]], path: Path) -> None:
    """Memory and pace over the run's steps."""
    from matplotlib.figure import Figure

    from sphere_rl.report.appearance import drawing

    with drawing():
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots(2, sharex=True)
        steps = [row["step"] / 1e6 for row in samples]
        for axis, name, factor, label in (
            (axes[0], "memory", 1 / MIB, "resident memory (MiB)"),
            (axes[1], "pace", 1, "processor time\n(s per 10,000 steps)"),
        ):
            axis.plot(steps, [row[name] * factor for row in samples], linewidth=1)
            axis.set_ylabel(label)
            axis.set_ylim(0, 1.15 * max(row[name] * factor for row in samples))
        axes[1].set_xlabel("environment steps (millions)")
        figure.savefig(path, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path, help="folder of the samples, the plot and the run")
    options.add_argument("--pid", type=int, help="process of a run that is there; --run is its folder")
    options.add_argument("--run", type=Path)
    options.add_argument("--every", type=float, default=30.0, help="seconds between two samples (30)")
    options.add_argument("--hours", type=float, default=2.0, help="end after so long (2)")
    options.add_argument("--drawn", action="store_true", help="only draw what was sampled")
    given, words = options.parse_known_args()
    given.out.mkdir(parents=True, exist_ok=True)
    run, pid, process = given.run or given.out / "run", given.pid, None
    if not given.drawn:
        if pid is None:
            line = [sys.executable, "-m", "sphere_rl.cli", "train", *words, "--out", str(run), "--quiet"]
            process = subprocess.Popen(line)
            pid = process.pid
        watch(pid, run, given.out, given.every, given.hours)
    samples = [json.loads(line) for line in (given.out / "samples.jsonl").read_text().splitlines()]
    draw(paced(samples), given.out / "soak.png")
    print(summary(paced(samples)))
    if process:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
