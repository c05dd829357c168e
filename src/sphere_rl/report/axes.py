"""What axes of figures have in common: marks of tasks, steps, scales and names that fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = ("Success", "share of (seed, task)")
"""Names of what lies between 0 and 1."""


def mark_tasks(axes: Axes, boundaries: Mapping[float, str], color: str = "#888888", names: bool = True) -> None:
    """Mark where each task begins, with its name."""
    for step, task in boundaries.items():
        axes.axvline(step, color=color, linewidth=0.7, linestyle=(0, (2, 2)))
        if names:
            axes.text(
                step, 1.01, f" {task}", transform=axes.get_xaxis_transform(), fontsize=6, rotation=28, color="#555555",
                va="bottom",
            )  # fmt: skip


def steps(axes: Axes) -> None:
    """Environment steps as 100k and 1M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def scale(axes: Axes, ylabel: str) -> None:
    """A share has the same scale in every figure."""
    if ylabel in SHARES:
        axes.set_ylim(-0.02, 1.05)


def wrapped(text: str, width: int = 14) -> str:
    """A name in lines of at most ``width`` characters, broken behind spaces, plus signs, underscores and dashes."""
    lines = [""]
    for part in re.findall(r"[^\s+_-]*[\s+_-]*", text):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)
