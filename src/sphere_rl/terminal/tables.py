"""Tables in the terminal."""

from __future__ import annotations

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


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        return number(value)
    return "–" if value is None else escape(str(value))
