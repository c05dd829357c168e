"""Whether two states, or two runs, are bitwise the same, and where they are not."""

from __future__ import annotations

from typing import Any

import torch

from sphere_rl.runs import RunFolder, checkpoint


def difference(one: Any, two: Any, where: str = "state") -> str | None:
    """The first place where two nested states are not bitwise equal; ``None`` where they are."""
    if type(one) is not type(two):
        return where
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return where
        pairs = [(one[key], two[key], f"{where}.{key}") for key in one]
    elif isinstance(one, list | tuple):
        if len(one) != len(two):
            return where
        pairs = [(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, two, strict=True))]
    elif isinstance(one, torch.Tensor):
        return None if one.dtype == two.dtype and torch.equal(one, two) else where
    else:
        return None if one == two else where
    return next((found for pair in pairs if (found := difference(*pair))), None)


def run_difference(one: RunFolder, two: RunFolder) -> str | None:
    """The same of two runs: their logs, newest checkpoints and status, but for measured times."""
    return difference(_content(one), _content(two), "run")


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of train.jsonl without the one column that is a measurement of time."""
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in rows]


def _content(folder: RunFolder) -> dict[str, Any]:
    found = checkpoint.newest(folder)
    assert found is not None
    state = found[1]
    del state["logs"]  # byte lengths: the measured times differ in length
    logs = {log: timeless(folder.read(log)) for log in ("train", "eval", "spectrum")}
    return logs | {"state": state, "status": folder.status()}
