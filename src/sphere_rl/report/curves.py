"""Lines of a table: mean over seeds with their range, for figures and for the page's panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from sphere_rl.report.appearance import index


@dataclass(frozen=True)
class Curve:
    """One line of a figure: mean over seeds with the range of the seeds; ``None`` where the line breaks."""

    label: str
    x: Sequence[int | float | None]
    mean: Sequence[int | float | None]
    low: Sequence[int | float | None]
    high: Sequence[int | float | None]
    seeds: int
    seeds_at: Sequence[int | None] = ()
    """Of each point; empty where all are behind every one."""

    @property
    def alone(self) -> list[int]:
        """Indices of points without a neighbour, of which no line can be drawn."""
        sides = zip([None, *self.x], self.x, [*self.x[1:], None], strict=False)
        return [i for i, (before, x, after) in enumerate(sides) if x is not None and before is None and after is None]


def grouped(table: pl.DataFrame, by: str, order: Sequence[str]) -> list[tuple[str, int, pl.DataFrame]]:
    """Rows of each value of ``by``, with its place in ``order``, or, where it is not named there, in the table."""
    groups = enumerate(table.group_by(by, maintain_order=True))
    found = [(str(label), index(str(label), i, order), group) for i, ((label, *_), group) in groups]
    return sorted(found, key=lambda one: one[1])


def curves(table: pl.DataFrame, x: str, y: str, by: Sequence[str], part: str | None = None) -> list[Curve]:
    """Mean and range over seeds of ``y`` at each ``x``, one curve for each value of ``by``; nulls are left out.

    A curve breaks (``None``) wherever ``part`` changes, such as the place of a task in the sequence.
    """
    found = []
    keys = [x] if part is None else [part, x]
    names = (x, "mean", "low", "high", "seeds")
    for key, group in table.filter(pl.col(y).is_not_null()).group_by(by, maintain_order=True):
        line = group.group_by(keys).agg(
            pl.col(y).mean().alias("mean"), pl.col(y).min().alias("low"), pl.col(y).max().alias("high"),
            pl.col("seed").n_unique().alias("seeds"),
        )  # fmt: skip
        columns: dict[str, list[Any]] = {name: [] for name in names}
        parts = [line] if part is None else line.sort(part).partition_by(part, maintain_order=True)
        for i, piece in enumerate(parts):
            for name in names:
                columns[name] += [None, *piece.sort(x)[name]] if i else piece.sort(x)[name].to_list()
        at = columns.pop("seeds")
        label, seeds = " · ".join(map(str, key)), group["seed"].n_unique()
        found.append(Curve(label, *columns.values(), seeds=seeds, seeds_at=at))
    return found
