"""A grid of runs, from flags or a TOML file: which runs there are, what their folders are called, how they stand.

A run of protocol ``rl`` is planned once for each task: single tasks are the same runs alone as in a sequence, and
alone they go in parallel. Every run is checked before the first one starts.

A grid file may name *arms*, a method with its options under one name (``[arms.sphere_free]``), which the axis
``methods`` then takes as it takes methods, and *stages* (``[[stages]]``): grids that go one after the other, each with
the axes that it names itself and the file's for all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, repeat
from pathlib import Path
from typing import Any, Literal

from sphere_rl.config import TrainConfig, idle_options, read_toml, tell_idle, to_dict
from sphere_rl.conversion import convert
from sphere_rl.errors import ConfigError
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder, file_name, read_sweep, write_atomic
from sphere_rl.settings import ROLES
from sphere_rl.suites.env_args import value_of, word_of
from sphere_rl.terminal.arguments import load_plugins, named_options, option_words, parse_train
from sphere_rl.training.saved import config_of


@dataclass(frozen=True)
class Grid:
    """Every combination of these is a run; a method is one name or several joined by ``+``."""

    suites: tuple[str, ...] = ("cw10",)
    protocols: tuple[str, ...] = ("crl",)
    actors: tuple[str, ...] = ("topk_moe",)
    methods: tuple[str, ...] = ("none", "sphere")
    """Methods, composed ones joined by ``+``, or names of arms."""
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = ()
    """Tasks in training order; each suite's own sequence when none are named."""
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """More axes: a flag of ``sphere train`` without dashes, and values. A method's option concerns only its runs."""
    train: tuple[str, ...] = ()
    """Words of ``sphere train`` that every run gets."""
    arms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Name of an arm, and the words of ``sphere train`` that make it."""
    stages: tuple[Mapping[str, Any], ...] = ()
    """Axes that differ from this grid's, stage by stage; none: this grid is all."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: its folder, the words of ``sphere train`` that make it, and what they mean."""

    folder: Path
    words: tuple[str, ...]
    config: TrainConfig

    @property
    def name(self) -> str:
        """The folder's name: stable and readable."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """What the run's process prints, beside the run folders."""
        return self.folder.parent / "logs" / f"{self.name}.log"

    @property
    def steps(self) -> int:
        """Environment steps of the whole run."""
        return self.config.steps_of_task * len(self.config.task_sequence)

    @property
    def threads(self) -> int:
        """Cores that the run asks for; with ``auto`` it takes what it is given."""
        return max([1, *(asked for asked in self._asked if asked != "auto")])

    @property
    def takes_what_is_given(self) -> bool:
        """Whether any of its threads are ``auto``."""
        return "auto" in self._asked

    @property
    def _asked(self) -> tuple[int | Literal["auto"], int | Literal["auto"]]:
        return self.config.torch_threads, self.config.env_threads


def plan(grid: Grid, out: Path) -> list[PlannedRun]:
    """All runs of a grid, stage by stage; within one seeds outermost, so that every method has its first seed early.

    Raises:
        ConfigError: an axis without values, a combination that is not allowed, two names of one configuration, or a
            folder that holds a run with another configuration.
    """
    axes = [_flag(name, value) for name, values in grid.options if name == "plugin" for value in values]
    for words in (grid.train, *(words for _, words in grid.arms), *axes):  # first: an axis may be of their methods
        load_plugins(words)
    check_axes(grid)
    runs: dict[str, PlannedRun] = {}
    for stage in grid.stages or ({},):
        for run in _plan_stage(_checked(replace(grid, **stage)), out):
            if runs.setdefault(run.name, run).config != run.config:
                raise ConfigError("out", str(run.folder), "names of tasks and values that differ in files' names")
    known: dict[TrainConfig, str] = {}
    for run in runs.values():
        if (other := known.setdefault(run.config, run.name)) != run.name:
            raise ConfigError("grid", run.name, f"other values: it would be the same run as {other}")
        check_folder(run)
    return list(runs.values())


def _checked(grid: Grid) -> Grid:
    """The grid, where each of its axes has values; without tasks they are each suite's own."""
    axes = {name: getattr(grid, name) for name in AXES if name != "tasks"} | dict(grid.options)
    for name, values in axes.items():
        if not values:
            raise ConfigError(name, [], "at least one value")
    return grid


def _plan_stage(grid: Grid, out: Path) -> Iterator[PlannedRun]:
    axes, arms = (grid.seeds, grid.suites, grid.protocols, grid.actors, grid.methods), dict(grid.arms)
    for seed, suite, protocol, actor, method in product(*axes):
        own = arms.get(method, ("--method", *method.split("+")))
        for options in product(*_axes(grid, methods_named_by(own))):
            words = ["--suite", suite, "--protocol", protocol, "--actor", actor, *own]
            words += ["--seed", str(seed), *grid.train]
            words += [word for name, value in options for word in _flag(name, value)]
            config, _, _ = parse_train([*words, *_tasks(grid.tasks)])
            tags = [f"{name.rpartition('.')[2]}{value}" for name, value in options]
            tail = "-".join([actor, method, *tags, f"seed{seed}"])
            for task in dict.fromkeys(config.task_sequence) if protocol == "rl" else (None,):
                tasks = grid.tasks if task is None else (task,)
                name = file_name("-".join([suite, protocol, *([] if task is None else [task]), tail]))
                full = (*words, *_tasks(tasks))
                yield PlannedRun(out / name, full, parse_train(list(full))[0])


def tell_idle_in(grid: Grid, runs: Sequence[PlannedRun]) -> None:
    """Say which options of the grid are of methods that no run uses, and which of an arm are not of its own methods."""
    used = dict.fromkeys(method for run in runs for method in run.config.method)
    tell_idle(idle_options([*(name for name, _ in grid.options), *named_options(grid.train)], used), used)
    for _, words in grid.arms:
        own = methods_named_by(words)
        tell_idle(idle_options(named_options(words), own), own)


def methods_named_by(words: Sequence[str]) -> Sequence[str]:
    """The methods that words beginning with ``--method`` name."""
    return words[1 : next((i for i, word in enumerate(words) if i and word.startswith("--")), None)]


def check_axes(grid: Grid) -> None:
    """Raise `ConfigError` where what is an axis of its own is set for all runs, as another axis or in an arm.

    It would win, and runs would not be what their folders' names say. An arm may have another actor.
    """
    tables = {"train": named_options(grid.train), "grid": [name for name, _ in grid.options]}
    tables |= {f"arms.{name}": named_options(words) for name, words in grid.arms}
    for table, names in tables.items():
        own = ("actor", "method") if table.startswith("arms.") else ()
        for name in names:
            if name in OF_ONE and name not in own:
                raise ConfigError(f"{table}.{name}", "set", f"the list {OF_ONE[name]} in its place")


def check_folder(run: PlannedRun) -> None:
    """Raise `ConfigError` where the run's folder holds a run of another configuration."""
    if not RunFolder(run.folder).config_path.is_file():
        return
    ours, theirs = to_dict(run.config), to_dict(config_of(RunFolder(run.folder)))
    for name in ours:
        if ROLES.get(name) != "spares" and ours[name] != theirs[name]:
            raise ConfigError(name, ours[name], f"{theirs[name]!r}, as in {run.folder}; choose another --out")


def state(run: PlannedRun) -> str:
    """How the run stands: new, running, interrupted, failed or finished."""
    folder = RunFolder(run.folder)
    return folder.status().get("state", "new") if folder.config_path.is_file() else "new"


def preset_path(name: str) -> Path:
    """The grid file that the package brings under this name.

    Raises:
        ConfigError: it brings none.
    """
    found = {path.stem: path for path in sorted(PRESETS.glob("*.toml"))}
    if name not in found:
        raise ConfigError("preset", name, f"one of {', '.join(found)}")
    return found[name]


def load_grid(path: Path) -> dict[str, Any]:
    """Read a TOML grid file: the names of `Grid`'s axes, ``[grid]`` for more axes, ``[train]`` for fixed options.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a key or a value of a kind that does not exist.
    """
    data = read_toml(path)
    for key, value in data.items():
        if key not in TABLES:
            raise ConfigError(key, value, f"one of {', '.join(TABLES)}")
        kind = TABLES[key]
        if not isinstance(value, kind):
            raise ConfigError(key, value, "a table" if kind is dict else "a list")
    arms = tuple((name, _arm(name, options)) for name, options in data.get("arms", {}).items())
    found: dict[str, Any] = {"methods": tuple(name for name, _ in arms)} if arms else {}
    found |= _axes_of(data) | {"arms": arms}
    found["options"] = tuple(
        (name, tuple(map(_word, repeat(name), values if isinstance(values, list) else [values])))
        for name, values in _flat(data.get("grid", {}))
    )
    found["train"] = tuple(
        word for name, value in _flat(data.get("train", {})) for word in _flag(name, _word(name, value))
    )
    found["stages"] = tuple(map(_stage, data.get("stages", [])))
    return found


PATIENCE = 60.0
"""Seconds that a sweep waits for another one that writes into ``sweep.json``."""
PRESETS = Path(__file__).parents[1] / "presets"
OF_ONE = {"suite": "suites", "protocol": "protocols", "actor": "actors", "method": "methods", "seed": "seeds"}
"""What `sphere train` has one of, and the axis that has several."""
AXES = ("suites", "protocols", "actors", "methods", "seeds", "tasks")
TABLES: dict[str, type] = dict.fromkeys(AXES, list) | {"grid": dict, "train": dict, "arms": dict, "stages": list}


def _arm(name: str, options: Any) -> tuple[str, ...]:
    """The words of an arm: its methods first, then its name as the runs' label, then its options."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"arms.{name}", options, "a table")
    chosen = options.get("method", "none")
    names = chosen if isinstance(chosen, list) else str(chosen).split("+")
    words = [word for key, value in _flat(options) if key != "method" for word in _flag(key, _word(key, value))]
    return ("--method", *map(str, names), *option_words("label", name), *words)


def _stage(table: Any) -> dict[str, Any]:
    """The axes of a stage, as fields of `Grid`."""
    if not isinstance(table, Mapping) or not all(key in AXES and isinstance(table[key], list) for key in table):
        raise ConfigError("stages", table, f"tables of lists, of {', '.join(AXES)}")
    return _axes_of(table, "stages.")


def _axes_of(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The axes that a table names, of the kinds that `Grid` has."""
    kinds = dict.fromkeys(AXES, tuple[str, ...]) | {"seeds": tuple[int, ...]}
    return {key: convert(prefix + key, table[key], kinds[key]) for key in AXES if key in table}


def record(out: Path, command: str, runs: Sequence[PlannedRun]) -> None:
    """Add the command and its runs to ``sweep.json``, for the report and for whoever asks how this came about.

    Raises:
        RunFolderError: ``out`` is no folder, or one that cannot be written to.
    """
    with RunFolder(out, PATIENCE):  # two sweeps may share a folder
        old = read_sweep(out) or {"commands": [], "runs": []}
        new = {
            "commands": list(dict.fromkeys([*old["commands"], command])),
            "runs": list(dict.fromkeys([*old["runs"], *(run.name for run in runs)])),
        }
        if new != old:
            write_atomic(out / "sweep.json", json.dumps(new, indent=2).encode() + b"\n")


def _axes(grid: Grid, names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The option axes that concern a composition of methods."""
    return [
        [(name, value) for value in values]
        for name, values in grid.options
        if name.partition(".")[0].replace("-", "_") in names
        or name.partition(".")[0].replace("-", "_") not in methods()
    ]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, "" if key == "network" else f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _word(name: str, value: Any) -> Any:
    """A value as a word of the command line; a text that is an environment's argument stays one: "1" is not 1."""
    if _of_environment(name):
        return word_of(value)
    return value if isinstance(value, list) else str(value)


def _flag(name: str, word: Any) -> list[str]:
    """Words of one option that is set to a word, as axes have them: a truth value is a switch."""
    meant = {"true": True, "false": False}.get(str(word).lower(), word)
    return option_words(name, value_of(word) if _of_environment(name) else meant)


def _of_environment(name: str) -> bool:
    return name.replace("-", "_").startswith("env_args.")


def _tasks(tasks: Sequence[str]) -> list[str]:
    return ["--tasks", *tasks] if tasks else []
