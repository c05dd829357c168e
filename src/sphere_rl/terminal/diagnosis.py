"""What ``sphere diagnose`` prints: tables, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import polars as pl

from sphere_rl.correlations import correlation
from sphere_rl.runs import RunFolder
from sphere_rl.terminal.tables import print_columns, print_table
from sphere_rl.training.diagnosis import Diagnosis
from sphere_rl.training.proxy import BATCH

INTERVAL = "95 % interval by Fisher's z, which takes batches as independent"


def show(folder: RunFolder, found: Sequence[Diagnosis], as_json: bool) -> None:
    """Print every metric and the blocks of K, a column a checkpoint; or one JSON object a checkpoint."""
    if as_json:
        print("\n".join(json.dumps(one.row()) for one in found))
        return
    metrics = {one.checkpoint: _metric_cells(one) for one in found}
    print_columns(f"{folder.path}, on {found[0].states} probe states", "metric", metrics)
    title = f"Blocks of K on {found[0].kernel_states} probe states: share of tr K, r_e, and load of experts"
    print_columns(title, "block", {one.checkpoint: _block_cells(one) for one in found})


def _metric_cells(one: Diagnosis) -> dict[str, Any]:
    scalars = {name: value for name, value in one.metrics.items() if not isinstance(value, list)}
    return {"global_step": one.global_step, "task": one.task} | scalars


def _block_cells(one: Diagnosis) -> dict[str, Any]:
    """Gate and layers, then every expert with its load; one that no state was routed to has nothing else."""
    load = one.metrics["expert_load"]
    assert isinstance(load, list)
    parts = {(b.kind, b.name): f"{b.share:.1%}, {b.effective_rank:.3g}" for b in one.blocks}
    cells = {name: text for (kind, name), text in parts.items() if kind != "expert"}
    for expert, share in enumerate(load):
        cells[f"expert {expert}"] = f"{parts.get(('expert', str(expert)), '–')}, {share:.2f}"
    return cells


def show_proxy(folder: RunFolder, table: pl.DataFrame, as_json: bool) -> None:
    """Print the correlation over all batches, and within one policy on one kind of states."""
    groups = {("all", "all"): table} | dict(table.group_by("checkpoint", "source", maintain_order=True))
    rows = [{"checkpoint": of, "states": source} | correlation(part) for (of, source), part in groups.items()]
    if as_json:
        print("\n".join(map(json.dumps, rows)))
        return
    print_table(f"{folder.path}: r_e(A) of the last expert layer against r_e(K), batches of {BATCH} states", rows)
    print(INTERVAL)
