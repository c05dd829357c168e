"""What the benchmarks share: interleaved timing, the machine's description and Markdown tables."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu counts the process's own time: on a busy machine, with one thread, the steadier of the two."""


def interleaved(
    steps: Mapping[str, Callable[[], None]],
    repeats: int,
    inner: int = 4,
    clock: str = "wall",
    warmup: int = 2,
) -> dict[str, float]:
    """Median milliseconds of one call of each step, taken in turns so that all meet the same machine.

    Each round has an order of its own: a step is slower after one that fills the caches. Rounds of warming up are not
    counted.
    """
    now, order, shuffle = CLOCKS[clock], list(steps.items()), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(warmup + repeats):
        shuffle(order)
        for name, step in order:
            start = now()
            for _ in range(inner):
                step()
            if round_ >= warmup:
                times[name].append((now() - start) / inner * 1e3)
    return {name: median(values) for name, values in times.items()}


def machine() -> str:
    """Describe processor, cores, load and versions in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flag = next((name for name in ("avx512f", "avx2") if any(f" {name} " in line for line in lines)), "no AVX2")
    return (
        f"{model} ({flag}), {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, envpool {version('envpool')}"
    )


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Format a table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
