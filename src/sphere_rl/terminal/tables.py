"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sphere_rl.numbers import number


def print_table(title: str, rows: list[dict[str, Any]], piped: int = 400) -> None:
    """Rows with equal keys as a table; wide cells fold on a terminal, and in a pipe at the width ``piped``."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=piped)
    table = Table(box=box.SIMPLE_HEAD)
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(*map(cell, row.values()))
    console.print(f"[bold]{escape(title)}[/]")
    console.print(table)


def print_columns(title: str, head: str, columns: Mapping[str, Mapping[str, Any]]) -> None:
    """A table with one column for each key, as many at a time as the terminal is wide."""
    console, names = Console(), list(columns)
    rows = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    space = (console.width if console.is_terminal else 400) - max(map(len, (head, *rows))) - 5  # 5: borders
    fit = max(1, space // (3 + max(len(str(text)) for name in names for text in (name, *columns[name].values()))))
    for start in range(0, len(names), fit):
        shown = names[start : start + fit]
        print_table(title, [{head: row} | {name: columns[name].get(row) for name in shown} for row in rows])


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return number(value)
    return "–" if value is None else escape(str(value))
