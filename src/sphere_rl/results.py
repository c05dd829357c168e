"""Run folders as tables: what statistics, figures and the report read. Nothing here is written, nothing recomputed.

A *method* in these tables is a label: the composed names, and every setting in which runs of that composition differ
(``sphere rho=0.01``), so that no table mixes runs that were made differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from itertools import chain, count
from pathlib import Path
from typing import Any

import polars as pl

from sphere_rl.config import TrainConfig, preset, task_steps, to_dict, updated
from sphere_rl.errors import RunFolderError
from sphere_rl.extras import require
from sphere_rl.labels import NAMED_IN_FULL, differing, method_labels, short_label
from sphere_rl.methods import methods
from sphere_rl.runs import LOGS, RunFolder, make_folder, write_atomic
from sphere_rl.runs.published import PublishedRun, published_runs
from sphere_rl.runs.records import LOG_COLUMNS, TEXT, TEXTS, WHOLE, check_kinds
from sphere_rl.settings import TRAINS, settings
from sphere_rl.suites import suites
from sphere_rl.training.saved import config_of

KEY = ("suite", "protocol", "actor", "method", "seed")
"""Columns that name an experiment: one seed of one method. Protocol rl may spread its tasks over several folders."""
EVAL = {
    "global_step": pl.Int64, "task_index": pl.Int64, "task": pl.String, "task_step": pl.Int64, "phase": pl.String,
    "episodes": pl.Int64, "success_final": pl.Float64, "success_once": pl.Float64, "mean_return": pl.Float64,
    "std_return": pl.Float64, "mean_length": pl.Float64,
}  # fmt: skip
SPECTRUM = {
    "global_step": pl.Int64, "task_index": pl.Int64, "task": pl.String, "task_step": pl.Int64, "batch": pl.String,
    "r_e_K": pl.Float64, "r_e_A": pl.Float64, "feature_rank": pl.Int64, "gate_entropy": pl.Float64,
    "expert_load": pl.List(pl.Float64),
}  # fmt: skip
TRAIN = {
    "global_step": pl.Int64, "task_index": pl.Int64, "task": pl.String, "task_step": pl.Int64, "iteration": pl.Int64,
    "learning_rate": pl.Float64, "policy_loss": pl.Float64, "value_loss": pl.Float64, "episodes": pl.Int64,
    "success_final": pl.Float64, "success_once": pl.Float64, "mean_return": pl.Float64, "std_return": pl.Float64,
    "mean_length": pl.Float64, "steps_per_second": pl.Float64,
}  # fmt: skip
KEYS = {"run": pl.String} | dict.fromkeys(KEY, pl.String) | {"seed": pl.Int64}
BROKEN = {"run": pl.String, "reason": pl.String}

RUNS: dict[str, Any] = {
    "error": pl.String, "speed": pl.Float64,
    "tasks": pl.List(pl.String), "methods": pl.List(pl.String), "settings": pl.List(pl.String),
}  # fmt: skip


@dataclass(frozen=True)
class Results:
    """Tables that share the columns ``run`` and `KEY`.

    Attributes:
        root: the folder that was read.
        runs: one row a run, with its state, progress and speed, the ``methods`` that it was trained with and the
            ``settings`` of its label.
        evals: one row a line of ``eval.jsonl``. Where a run told success of a task, those that told nothing had none.
        spectra: one row a line of ``spectrum.jsonl``.
        broken: the runs that cannot be read, or are there twice, and are in none of the others: ``run``, ``reason``.
    """

    root: Path
    runs: pl.DataFrame
    evals: pl.DataFrame
    spectra: pl.DataFrame
    broken: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=BROKEN))

    def folder(self, run: str) -> RunFolder:
        """A run's folder by its name in the tables."""
        return run_at(self.root if run == _name(self.root, self.root) else self.root / run)

    @cached_property
    def train(self) -> pl.DataFrame:
        """One row a line of ``train.jsonl``; read when it is asked for, as only few need it.

        Raises:
            RunFolderError: a log is no longer what a run writes.
        """
        key = ["run", *KEY]
        rows = [
            names | line
            for names in self.runs.select(key).iter_rows(named=True)
            for line in self.folder(names["run"]).read("train", LOG_COLUMNS["train"])
        ]
        return _table(rows, KEYS | TRAIN)

    def to_pandas(self) -> dict[str, Any]:
        """The tables runs, train, evals, spectra and broken as pandas data frames, by name.

        Raises:
            MissingExtraError: pandas is not installed; PyArrow is not needed.
        """
        require("pandas", "to_pandas")
        pd: Any = import_module("pandas")
        return {name: pd.DataFrame(table.to_dict(as_series=False)) for name, table in self._by_name().items()}

    def write_csv(self, folder: Path | str) -> list[Path]:
        """Write the same tables as files that are named like them, lists as ``a; b``; the paths of the files."""
        files = {Path(folder) / f"{name}.csv": table for name, table in self._by_name().items()}
        make_folder(Path(folder))
        for path, table in files.items():
            lists = [column for column, kind in table.schema.items() if isinstance(kind, pl.List)]
            flat = pl.col(lists).list.eval(pl.element().cast(pl.String)).list.join("; ")
            write_atomic(path, table.with_columns(flat).write_csv().encode())
        return [*files]

    def _by_name(self) -> dict[str, pl.DataFrame]:
        return {name: getattr(self, name) for name in ("runs", "train", "evals", "spectra", "broken")}

    def trained(self, run: str) -> dict[str, Any]:
        """A run's settings that tell what was trained, by name, as recorded; those it did not know are the defaults."""
        return dict(settings(updated(self.folder(run).config()), TRAINS))

    @cached_property
    def labels(self) -> dict[tuple[str, str, str], str]:
        """What figures and pages call each (suite, actor, method): the method, where it names few settings.

        Of more than `NAMED_IN_FULL`, those with the value that the suite's preset has are left out.
        """
        found = {}
        for row in self.runs.iter_rows(named=True):
            label = row["method"]
            if len(row["settings"]) > NAMED_IN_FULL:
                usual = preset(suites()[row["suite"]]) if row["suite"] in suites() else TrainConfig()
                known = dict(settings(to_dict(usual, row["methods"]) | {"method": row["methods"]}, TRAINS))
                label = short_label(label, row["settings"], self.trained(row["run"]), known)
            found[row["suite"], row["actor"], row["method"]] = label
        return found

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """For each suite its tasks in training order: the longest sequence among the runs, then all others."""
        found: dict[str, tuple[str, ...]] = {}
        for row in self.runs.sort("num_tasks", descending=True, maintain_order=True).iter_rows(named=True):
            found[row["suite"]] = merged(found.get(row["suite"], ()), row["tasks"])
        return found

    def by_sequence(self) -> dict[str, Results]:
        """Results of each suite apart, and of each task sequence where CRL runs of a suite differ in theirs.

        RL runs belong to every sequence that has their tasks; those of no sequence are a part of their own. The first
        part of a suite has the suite's name, the others ``NAME-2`` and so on, as far as no suite is called so.
        """
        parts = dict[str, Results]()
        for suite in self.tasks:
            runs = self.runs.filter(pl.col("suite") == suite).select("run", "protocol", "tasks").rows()
            crl = dict.fromkeys(tuple(tasks) for _, protocol, tasks in runs if protocol == "crl")
            members = [
                [
                    run
                    for run, protocol, tasks in runs
                    if tuple(tasks) == one or (protocol == "rl" and Counter(tasks) <= Counter(one))
                ]
                for one in sorted(crl, key=len, reverse=True)
            ]
            known = {run for names in members for run in names}
            if rest := [run for run, _, _ in runs if run not in known]:
                members.append(rest)
            numbered = (f"{suite}-{i}" for i in count(2))
            free = chain([suite], (name for name in numbered if name not in self.tasks))
            for names, part in zip(members, free, strict=False):
                tables = (table.filter(pl.col("run").is_in(names)) for table in (self.runs, self.evals, self.spectra))
                parts[part] = Results(self.root, *tables)
        return parts


def merged(sequence: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    """A task sequence, then what another one has beyond it: a task that comes twice in one of them does so here."""
    more = [task for i, task in enumerate(other) if other[:i].count(task) >= sequence.count(task)]
    return (*sequence, *more)


def run_folders(root: Path | str) -> list[Path]:
    """Every run folder at or below ``root``, by name."""
    return sorted(path.parent for path in Path(root).rglob("config.json") if (path.parent / "checkpoints").is_dir())


def run_at(path: Path) -> RunFolder:
    """The run of a folder, or of published files with this stem."""
    published = PublishedRun(path.resolve())
    return published if published.config_path.exists() else RunFolder.existing(path)


def _name(path: Path, root: Path) -> str:
    """A run's name below the root that was read; that of the folder itself, where it is one run's."""
    return str(path.relative_to(root)) if path != root else root.resolve().name


def load_results(root: Path | str) -> Results:
    """Read every run folder at or below ``root``, and every run that is published there as three files.

    Runs that are still going are read as far as they are.

    One that cannot be read, or that is a run which another folder holds, too, is left out of the tables, and listed
    in `Results.broken`. Of runs that are one and the same, that stays which has finished or has come furthest.

    Raises:
        RunFolderError: there is no run folder, or none that can be read.
    """
    root = Path(root)
    folders = [*run_folders(root), *published_runs(root)]
    if not folders:
        raise RunFolderError(f"{root}: holds no run folder")
    found, broken = list[_Read](), list[dict[str, str]]()
    for path in folders:
        try:
            found.append(_read(run_at(path), _name(path, root)))
        except RunFolderError as error:
            broken.append({"run": _name(path, root), "reason": str(error)})
    if not found:
        raise RunFolderError(broken[0]["reason"] + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""))
    return _tables(root, found, broken)


def _tables(root: Path, found: Sequence[_Read], broken: list[dict[str, str]]) -> Results:
    """The tables of all that was read, by name; what is there twice is added to ``broken``."""
    configs, sequences = [one.config for one in found], _sequences(found)
    rows, known = {}, dict[tuple[Any, ...], str]()
    labelled = zip(found, method_labels(configs), differing(configs), strict=True)
    for one, label, differs in sorted(labelled, key=lambda read: read[0].progress, reverse=True):
        key = {"run": one.run} | {name: one.config[name] for name in KEY} | {"method": label}
        made = {"methods": list(one.config["method"]), "settings": differs}
        tasks = tuple(one.config["tasks"] or sequences[one.config["suite"]])
        parts = [(*[key[name] for name in KEY], part) for part in (tasks if key["protocol"] == "rl" else (tasks,))]
        if twin := next((known[part] for part in parts if part in known), None):
            broken.append({"run": one.run, "reason": f"{root / one.run}: {_like(twin, key)}"})
            continue
        known |= dict.fromkeys(parts, str(root / one.run))
        rows[one.run] = key, key | made | _run_row(one, tasks), one.logs
    kept = [rows[one.run] for one in found if one.run in rows]
    runs = [row for _, row, _ in kept]
    evals, spectra = ([key | row for key, _, logs in kept for row in logs[log]] for log in ("eval", "spectrum"))
    return Results(
        root,
        pl.DataFrame(runs, infer_schema_length=None, schema_overrides=RUNS),
        _with_failures(_table(evals, KEYS | EVAL)),
        _table(spectra, KEYS | SPECTRUM),
        pl.DataFrame(broken, schema=BROKEN),
    )


def _like(twin: str, key: Mapping[str, Any]) -> str:
    """Why a run is left out that has the key and tasks of another one."""
    name = " ".join(str(key[part]) for part in ("suite", "protocol", "actor", "method"))
    return f"is {name} with seed {key['seed']} on tasks of {twin}, too; expected one run of each (look at them apart)"


@dataclass(frozen=True)
class _Read:
    """What one folder adds to the tables."""

    run: str
    config: dict[str, Any]
    commit: str | None
    status: dict[str, Any]
    logs: dict[str, list[dict[str, Any]]]

    @property
    def state(self) -> str:
        """The state that it recorded; new before it began."""
        return self.status.get("state", "new")

    @property
    def steps(self) -> int:
        """Environment steps that it has made."""
        train = self.logs["train"]
        return train[-1]["global_step"] if train else self.status.get("global_step", 0)

    @property
    def progress(self) -> tuple[bool, int]:
        """Whether it has finished, and its steps."""
        return self.state == "finished", self.steps


NEEDED = {
    "suite": TEXT, "protocol": TEXT, "actor": TEXT, "method": TEXTS, "seed": WHOLE, "tasks": TEXTS,
    "steps_per_task": WHOLE, "num_envs": WHOLE, "num_steps": WHOLE,
}  # fmt: skip
"""Fields without which nothing can be said of a run, and their kinds."""


def _read(folder: RunFolder, run: str) -> _Read:
    """Read one folder. Its suite and methods need not be known here: what it recorded is what counts.

    Raises:
        RunFolderError: any of its files is not what a run writes.
    """
    record = folder.record()
    config = record["config"]
    where = f"{folder.config_path}: config"
    check_kinds(where, config, {name: NEEDED[name] for name in ("suite", "method")}, ())
    if config.get("suite") in suites() and set(config.get("method", ())) <= methods().keys():
        config_of(folder)  # refuses what is no configuration
    elif missing := [name for name in NEEDED if name not in config]:
        raise RunFolderError(f"{folder.config_path}: its config has no {missing[0]}")
    check_kinds(where, config, NEEDED, ())
    logs = {log: folder.read(log, LOG_COLUMNS[log]) for log in LOGS}
    return _Read(run, updated(config), record.get("commit"), folder.status(), logs)


def _sequences(found: Sequence[_Read]) -> dict[str, tuple[str, ...]]:
    """Task sequence of each suite, for runs that name no tasks: its own, or, where it is not known here, as recorded.

    Recorded is what the logs name, by place; of several runs, the one that has come furthest knows the most.
    """
    sequences: dict[str, tuple[str, ...]] = {}
    for one in found:
        name = one.config["suite"]
        if name in suites():
            sequences[name] = suites()[name].tasks
        elif not one.config["tasks"]:
            named = {row["task_index"]: row["task"] for rows in one.logs.values() for row in rows}
            sequences[name] = max(sequences.get(name, ()), tuple(named[i] for i in sorted(named)), key=len)
    return sequences


def _run_row(one: _Read, tasks: Sequence[str]) -> dict[str, Any]:
    config, status = one.config, one.status
    speeds = sorted(row["steps_per_second"] for row in one.logs["train"])
    finals = [row["task"] for row in one.logs["eval"] if row["phase"] == "final"]
    return {
        "state": one.state,
        "task": status.get("task"),
        "error": status.get("error"),
        "tasks": list(tasks),
        "num_tasks": len(tasks),
        "tasks_done": len(finals),
        "steps_per_task": task_steps(config),
        "global_step": one.steps,
        "speed": speeds[len(speeds) // 2] if speeds else None,
        "commit": one.commit,
    }


def _with_failures(evals: pl.DataFrame) -> pl.DataFrame:
    """Success is 0 where it was not told, on tasks on which any run was told of some: of a failure some say nothing."""
    told = {
        name: pl.when(pl.col(name).is_not_null().any().over("suite", "task")).then(pl.col(name).fill_null(0.0))
        for name in ("success_final", "success_once")
    }
    return evals.with_columns(**told)


def _table(rows: list[dict[str, Any]], schema: Mapping[str, Any]) -> pl.DataFrame:
    """Rows as a table that has at least the columns of ``schema``, null where a row has no such entry.

    Where a column has lists in some rows, a number in another is a list of one.
    """
    lists = {name for row in rows for name, value in row.items() if isinstance(value, list) and name not in schema}
    complete = [
        dict.fromkeys(schema) | row
        | {name: [row[name]] for name in lists if isinstance(row.get(name), int | float)}
        for row in rows
    ]  # fmt: skip
    if not complete:
        return pl.DataFrame(schema=dict(schema))
    return pl.DataFrame(complete, infer_schema_length=None, schema_overrides=dict(schema), strict=False)
