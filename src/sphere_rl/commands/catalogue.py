"""What there is to choose from, as tables for ``sphere list``.

Names, summaries and defaults stand in the source as plain values: they are read there, as loading PyTorch for them
would take seconds. A module that says them in another way is loaded after all.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from sphere_rl import plugins
from sphere_rl.suites import suites

SOURCE = Path(__file__).parents[1]


def list_suites() -> list[dict[str, Any]]:
    """Name, summary, sequence and preset of each suite."""
    return [
        {
            "suite": suite.name,
            "what it is": suite.summary,
            "tasks": len(suite.tasks) or "any",
            "preset": settings(suite.preset) or "the defaults",
        }
        for suite in suites().values()
    ]


def list_tasks() -> list[dict[str, Any]]:
    """Every task of every suite, with its place in the suite's sequence."""
    return [
        {"suite": suite.name, "task": task, "place": suite.tasks.index(task) + 1 if task in suite.tasks else None}
        for suite in suites().values()
        for task in (*suite.tasks, *(t for t in suite.all_tasks if t not in suite.tasks))
    ]


def list_actors() -> list[dict[str, Any]]:
    """Architectures of actors and critics."""
    return [{"actor": kind, "what it is": summary} for kind, summary in summaries_of_actors().items()]


def list_methods() -> list[dict[str, Any]]:
    """Mitigation methods with their defaults and sources."""
    if plugins.anything():
        return loaded_methods()
    files = sorted(SOURCE.joinpath("methods").glob("[!_]*.py"))
    rows = [written_method(file) for file in files if file.stem != "base"]
    return rows if all(rows) else loaded_methods()  # type: ignore[return-value]


def list_metrics() -> list[dict[str, Any]]:
    """Columns of ``spectrum.jsonl`` with their definitions."""
    found = table_of("spectrum", "SPECTRAL_METRICS") or import_module("sphere_rl.spectrum").SPECTRAL_METRICS
    return [{"metric": name, "what it is": definition} for name, definition in found.items()]


def summaries_of_actors() -> dict[str, str]:
    """A line about each architecture."""
    if plugins.anything() or not (written := table_of("experts.network", "KINDS")):
        from sphere_rl.experts.network import kinds

        return {name: kind.summary for name, kind in kinds().items()}
    return written


def list_presets() -> list[dict[str, Any]]:
    """Grids that ``sphere sweep --preset`` takes, with the first sentence of each."""
    files = sorted(SOURCE.joinpath("presets").glob("*.toml"))
    return [{"preset": file.stem, "what it is": comment(file)} for file in files]


def comment(file: Path) -> str:
    """The text of the comment that a file begins with, up to its first empty line."""
    words = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not (text := line.removeprefix("#").strip()) or not line.startswith("#"):
            break
        words.append(text)
    return " ".join(words).removesuffix(":")


def loaded_methods() -> list[dict[str, Any]]:
    """`list_methods` from the classes themselves."""
    from sphere_rl.methods import methods

    return [
        method_row(name, method.summary, {f.name: getattr(method.Config(), f.name) for f in fields(method.Config)},
                   method.citation)
        for name, method in methods().items()
    ]  # fmt: skip


def method_row(name: str, summary: str, defaults: dict[str, Any], citation: str) -> dict[str, Any]:
    """A method's row of the table."""
    return {"method": name, "what it does": summary, "defaults": settings(defaults), "source": citation}


def written_method(file: Path) -> dict[str, Any] | None:
    """A method's row as its file says it in plain values; ``None`` where it does not."""
    classes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    try:
        (method,) = (one for one in classes if "citation" in assigned(one))
        said = assigned(method)
        config = next((one for one in classes if one.name == getattr(said.get("Config"), "id", None)), None)
        if "Config" in said and (config is None or [ast.unparse(base) for base in config.bases] != ["MethodConfig"]):
            return None
        defaults = {} if config is None else {name: ast.literal_eval(value) for name, value in assigned(config).items()}
        return method_row(file.stem, ast.literal_eval(said["summary"]), defaults, ast.literal_eval(said["citation"]))
    except (KeyError, ValueError):
        return None


def assigned(owner: ast.ClassDef) -> dict[str, ast.expr]:
    """What a class sets in its body, by name."""
    found: dict[str, ast.expr] = {}
    for node in owner.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def table_of(module: str, name: str) -> dict[str, str]:
    """A table that a module of the package holds: its texts, or the first ones of what its entries are made of.

    Empty where it is not written in plain values.
    """
    path = SOURCE / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and isinstance(node.value, ast.Dict):
            values = [value.args[0] if isinstance(value, ast.Call) else value for value in node.value.values]
            try:
                pairs = zip(node.value.keys, values, strict=True)
                return {ast.literal_eval(key): ast.literal_eval(value) for key, value in pairs if key is not None}
            except ValueError:
                break
    return {}


def settings(values: Mapping[str, Any]) -> str:
    """Names and values in one text, those of tables with a dot."""
    flat = {
        f"{name}.{inner}" if inner else name: item
        for name, value in values.items()
        for inner, item in (value.items() if isinstance(value, Mapping) else (("", value),))
    }
    return ", ".join(f"{name} {value}" for name, value in flat.items())


TOPICS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "suites": list_suites,
    "tasks": list_tasks,
    "actors": list_actors,
    "methods": list_methods,
    "metrics": list_metrics,
    "presets": list_presets,
}
