"""A grid of runs, from flags or a TOML file: which runs there are, what their folders are called, how they stand.

A run of protocol ``rl`` is planned once for each task: single tasks are the same runs alone as in a sequence, and
alone they go in parallel. Every run is checked before the first one starts.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, repeat
from pathlib import Path
from typing import Any

from sphere_rl.arguments import parse_train
from sphere_rl.config import TrainConfig, convert, from_dict, to_dict
from sphere_rl.env_args import FLAG, word_of
from sphere_rl.errors import ConfigError
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder, file_name


@dataclass(frozen=True)
class Grid:
    """Every combination of these is a run; a method is one name or several joined by ``+``."""

    suites: tuple[str, ...] = ("cw10",)
    protocols: tuple[str, ...] = ("crl",)
    actors: tuple[str, ...] = ("topk_moe",)
    methods: tuple[str, ...] = ("none", "sphere")
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = ()
    """Tasks in training order; each suite's own sequence when none are named."""
    options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """More axes: a flag of ``sphere train`` without dashes, and values. A method's option concerns only its runs."""
    train: tuple[str, ...] = ()
    """Words of ``sphere train`` that every run gets."""


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
        config = self.config
        return config.iterations_per_task * config.steps_per_iteration * len(config.task_sequence)

    @property
    def threads(self) -> int:
        """Cores that the run keeps busy."""
        return max(self.config.torch_threads, self.config.env_threads)


def plan(grid: Grid, out: Path) -> list[PlannedRun]:
    """All runs of a grid, seeds outermost, so that every method has its first seed early.

    Raises:
        ConfigError: a combination that is not allowed, or a folder that holds a run with another configuration.
    """
    axes = (grid.seeds, grid.suites, grid.protocols, grid.actors, grid.methods)
    runs: dict[str, PlannedRun] = {}
    for seed, suite, protocol, actor, method in product(*axes):
        names = method.split("+")
        for options in product(*_axes(grid, names)):
            words = ["--suite", suite, "--protocol", protocol, "--actor", actor, "--method", *names]
            words += ["--seed", str(seed), *grid.train]
            words += [word for name, value in options for word in _flag(name, value)]
            config, _, _ = parse_train([*words, *_tasks(grid.tasks)])
            tags = [f"{name.rpartition('.')[2]}{value}" for name, value in options]
            tail = "-".join([actor, method, *tags, f"seed{seed}"])
            for task in dict.fromkeys(config.task_sequence) if protocol == "rl" else (None,):
                tasks = grid.tasks if task is None else (task,)
                name = file_name("-".join([suite, protocol, *([] if task is None else [task]), tail]))
                full = (*words, *_tasks(tasks))
                run = PlannedRun(out / name, full, parse_train(list(full))[0])
                if runs.setdefault(name, run).config != run.config:
                    raise ConfigError("out", str(out / name), "names of tasks and values that differ in files' names")
    for run in runs.values():
        check_folder(run)
    return list(runs.values())


def check_folder(run: PlannedRun) -> None:
    """Raise `ConfigError` where the run's folder holds a run of another configuration."""
    if not RunFolder(run.folder).config_path.is_file():
        return
    ours, theirs = to_dict(run.config), to_dict(from_dict(RunFolder(run.folder).config()))
    for name in ours:
        if ours[name] != theirs[name]:
            raise ConfigError(name, ours[name], f"{theirs[name]!r}, as in {run.folder}; choose another --out")


def state(run: PlannedRun) -> str:
    """How the run stands: new, running, interrupted, failed or finished."""
    folder = RunFolder(run.folder)
    return folder.status().get("state", "new") if folder.config_path.is_file() else "new"


def load_grid(path: Path) -> dict[str, Any]:
    """Read a TOML grid file: the names of `Grid`'s axes, ``[grid]`` for more axes, ``[train]`` for fixed options.

    Raises:
        ConfigError: the file is missing, is not TOML, or has a key or a value of a kind that does not exist.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError("config", str(path), f"a readable TOML file ({error})") from None
    known = ("suites", "protocols", "actors", "methods", "seeds", "tasks", "grid", "train")
    for key, value in data.items():
        if key not in known:
            raise ConfigError(key, value, f"one of {', '.join(known)}")
        kind = dict if key in ("grid", "train") else list
        if not isinstance(value, kind):
            raise ConfigError(key, value, "a table" if kind is dict else "a list")
    found: dict[str, Any] = {key: tuple(data[key]) for key in known[:6] if key in data}
    if "seeds" in found:
        found["seeds"] = convert("seeds", data["seeds"], tuple[int, ...])
    found["options"] = tuple(
        (name, tuple(map(_word, repeat(name), values if isinstance(values, list) else [values])))
        for name, values in _flat(data.get("grid", {}))
    )
    found["train"] = tuple(
        word for name, value in _flat(data.get("train", {})) for word in _flag(name, _word(name, value))
    )
    return found


def record(out: Path, command: str, runs: Sequence[PlannedRun]) -> None:
    """Add the command and its runs to ``sweep.json``, for the report and for whoever asks how this came about."""
    from sphere_rl.runs import write_atomic

    out.mkdir(parents=True, exist_ok=True)
    path = out / "sweep.json"
    old = json.loads(path.read_text()) if path.exists() else {"commands": [], "runs": []}
    new = {
        "commands": list(dict.fromkeys([*old["commands"], command])),
        "runs": list(dict.fromkeys([*old["runs"], *(run.name for run in runs)])),
    }
    if new != old:
        write_atomic(path, json.dumps(new, indent=2).encode() + b"\n")


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
    if name.replace("-", "_").startswith("env_args."):
        return word_of(value)
    return value if isinstance(value, list) else str(value)


def _flag(name: str, value: Any) -> list[str]:
    """Words of one option: ``--sphere.rho 0.1``; switches are ``--crelu`` and ``--no-crelu``."""
    if name.replace("-", "_").startswith("env_args."):
        return [FLAG, f"{name.partition('.')[2]}={value}"]
    flag = name.replace("_", "-")
    if str(value).lower() in ("true", "false"):
        table, dot, inner = flag.rpartition(".")
        return [f"--{table}{dot}{'' if str(value).lower() == 'true' else 'no-'}{inner}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def _tasks(tasks: Sequence[str]) -> list[str]:
    return ["--tasks", *tasks] if tasks else []
