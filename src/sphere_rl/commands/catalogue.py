"""What there is to choose from, as tables for ``sphere list``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from sphere_rl.experts.network import KINDS
from sphere_rl.methods import methods
from sphere_rl.spectrum import SPECTRAL_METRICS
from sphere_rl.suites import suites


def list_suites() -> list[dict[str, Any]]:
    """Name, summary, sequence and preset of each suite."""
    return [
        {
            "suite": suite.name,
            "what it is": suite.summary,
            "tasks": len(suite.tasks) or "any",
            "preset": ", ".join(f"{key} {value}" for key, value in suite.preset.items()) or "the defaults",
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
    return [{"actor": kind, "what it is": summary} for kind, summary in KINDS.items()]


def list_methods() -> list[dict[str, Any]]:
    """Mitigation methods with their defaults and sources."""
    return [
        {
            "method": name,
            "what it does": method.summary,
            "defaults": ", ".join(f"{f.name} {getattr(method.Config(), f.name)}" for f in fields(method.Config)),
            "source": method.citation,
        }
        for name, method in methods().items()
    ]


def list_metrics() -> list[dict[str, Any]]:
    """Columns of ``spectrum.jsonl`` with their definitions."""
    return [{"metric": name, "what it is": definition} for name, definition in SPECTRAL_METRICS.items()]


TOPICS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "suites": list_suites,
    "tasks": list_tasks,
    "actors": list_actors,
    "methods": list_methods,
    "metrics": list_metrics,
}
