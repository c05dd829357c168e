"""The numbers of a report as files: CSV for programs, LaTeX for papers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl

from sphere_rl.numbers import with_interval
from sphere_rl.report import tables
from sphere_rl.report.content import SuiteContent
from sphere_rl.results import Results
from sphere_rl.runs import make_folder, write_atomic

NUMBERS = {
    "rl": "RL",
    "crl": "CRL",
    "crl_iqm": "CRL, IQM",
    "r_e_K": "rₑ(K)",
    "gap": "RL − CRL",
    "retention": "Retention",
    "forgetting": "Forgetting",
    "forward_transfer": "Forward transfer",
}
"""Columns of the headline table."""
DIFFERENCES = {name: NUMBERS[name] for name in ("rl", "crl", "crl_iqm", "r_e_K", "gap", "retention")}
DIFFERENCES["improvement"] = "P(improves), CRL"
"""Columns of the table of differences to plain PPO."""
ENDS = {"": "value", "_low": "low", "_high": "high"}
SEEDS = {"_seeds": "seeds"}
LATEX = {"rₑ(K)": "$r_e(K)$", "−": "$-$", "ρ": r"$\rho$"}
LATEX |= {sign: "\\" + sign for sign in "_&%#${}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def write_tables(
    suites: Sequence[SuiteContent], results: Results, out: Path, formats: Collection[str] = ("csv",)
) -> None:
    """Write the headline, the differences to plain PPO and the table by task in each format.

    What metrics foretell, and every line of the evaluations and the measurements, follow where ``csv`` is among the
    formats.
    """
    make_folder(out)
    found = {"headline": number_table(suites, False), "differences": number_table(suites, True)}
    found["tasks"] = task_table(suites)
    for form in formats:
        for name, table in found.items():
            FORMATS[form](table, out / name)
    if "csv" in formats:
        write_csv(foresight_table(suites), out / "foresight")
        for name, lines in (("evaluations", results.evals), ("spectrum", results.spectra)):
            write_csv(lines.select(column for column, kind in lines.schema.items() if not kind.is_nested()), out / name)


def number_table(suites: Sequence[SuiteContent], differences: bool) -> pl.DataFrame:
    """One row a number of a method, with its interval and seeds: the headline's, or the differences to plain PPO."""
    rows = [
        {"part": suite.name, "actor": row["actor"], "method": row["method"], "number": name}
        | {key: getattr(row[name], key, None) for key in ("value", "low", "high", "seeds")}
        for suite in suites
        for row in (suite.differences if differences else suite.rows)
        for name in (DIFFERENCES if differences else NUMBERS)
    ]
    columns = dict.fromkeys(("part", "actor", "method", "number"), pl.String)
    columns |= dict.fromkeys(("value", "low", "high"), pl.Float64) | {"seeds": pl.Int64}
    return pl.DataFrame(rows, schema=columns)


def task_table(suites: Sequence[SuiteContent]) -> pl.DataFrame:
    """One row a task of a method and protocol, with its numbers and their intervals."""
    names = dict.fromkeys(("part", "task", "actor", "method", "protocol"), pl.String)
    cells = [(f"{name}{end}", name, key) for name in tables.COLUMNS for end, key in (ENDS | SEEDS).items()]
    rows = [
        row | {"part": suite.name} | {column: getattr(row[name], key, None) for column, name, key in cells}
        for suite in suites
        for row in suite.by_task
    ]
    numbers = {column: pl.Int64 if key == "seeds" else pl.Float64 for column, _, key in cells}
    schema = names | {"place": pl.Int64, "seeds": pl.Int64} | numbers
    return pl.DataFrame([{name: row[name] for name in schema} for row in rows], schema=schema)


def foresight_table(suites: Sequence[SuiteContent]) -> pl.DataFrame:
    """One row a metric: how it goes, as agents enter their tasks, with the score that they reach; see `foresight`."""
    columns = {"part": pl.String, "metric": pl.String, "entries": pl.Int64, "runs": pl.Int64}
    names = ("spearman", "within", "spearman_low", "spearman_high", "within_low", "within_high")
    columns |= dict.fromkeys(names, pl.Float64)
    rows = [
        {"part": suite.name, "metric": name} | asdict(found)
        for suite in suites
        for name, found in suite.foretold.items()
    ]
    return pl.DataFrame(rows, schema=columns)


def write_csv(table: pl.DataFrame, path: Path) -> None:
    """Write ``path.csv``."""
    write_atomic(path.with_suffix(".csv"), table.write_csv().encode())


def write_latex(table: pl.DataFrame, path: Path) -> None:
    """Write ``path.tex``: a tabular in the manner of booktabs, one row a method, a number with its interval a cell."""
    text = latex(*(by_number(table) if "number" in table.columns else by_column(table)))
    write_atomic(path.with_suffix(".tex"), text.encode())


def by_number(table: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table that has a row a number; columns without any number are left out."""
    known = table.filter(pl.col("value").is_not_null())
    titles = NUMBERS | DIFFERENCES
    names = [name for name in titles if name in set(known["number"])]
    rows = []
    for key, group in table.group_by("part", "actor", "method", maintain_order=True):
        cells = {row["number"]: cell(row["value"], row["low"], row["high"]) for row in group.iter_rows(named=True)}
        rows.append([*map(str, key), *(cells.get(name, "") for name in names)])
    return ["Tasks", "Actor", "Method", *(titles[name] for name in names)], rows


def by_column(table: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table by task; columns without any number are left out."""
    names = [name for name in tables.COLUMNS if table[name].is_not_null().any()]
    key = ("task", "actor", "method", "protocol")
    rows = [
        [*(row[name] for name in key), str(row["seeds"]), *(cell(*(row[name + end] for end in ENDS)) for name in names)]
        for row in table.iter_rows(named=True)
    ]
    return ["Task", "Actor", "Method", "Protocol", "Seeds", *(tables.COLUMNS[name] for name in names)], rows


def cell(value: float | None, low: float | None, high: float | None) -> str:
    """A number and its interval, with two places."""
    return with_interval(value, low, high, missing="")


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with the rules of booktabs; texts to the left, numbers to the right."""
    texts = len([name for name in head if name in ("Tasks", "Task", "Actor", "Method", "Protocol")])
    lines = [" & ".join(map(escaped, row)) + r" \\" for row in (head, *rows)]
    columns = "l" * texts + "r" * (len(head) - texts)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}", ""])


def escaped(text: str) -> str:
    """A text as LaTeX takes it."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)


FORMATS: dict[str, Callable[[pl.DataFrame, Path], None]] = {"csv": write_csv, "latex": write_latex}
