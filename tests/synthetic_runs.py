"""Run folders made of their files alone, as many as wanted, with whatever names; no policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphere_rl.config import TrainConfig, overridden, to_dict

SMALL: dict[str, Any] = {"suite": "gym", "num_envs": 2, "num_steps": 16, "minibatch_size": 8, "steps_per_task": 320}


def write_run(path: Path, tasks: list[str], error: str | None = None, **changes: Any) -> None:
    """Ten iterations on each task, with evaluations and measurements; ``changes`` may be what no run here has."""
    config = to_dict(overridden(TrainConfig(), SMALL | {"tasks": ["Pendulum-v1"]})) | {"tasks": tasks} | changes
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"config": config, "versions": {}, "commit": None}))
    state = {"state": "failed" if error else "finished", "global_step": 320 * len(tasks), "task": tasks[-1]}
    (path / "status.json").write_text(json.dumps(state | {"error": error}))
    seed: Any = config["seed"]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "spectrum": []}
    for index, task in enumerate(tasks):
        for i in range(1, 11):
            step = 32 * i
            place = {"global_step": 320 * index + step, "task_index": index, "task": task, "task_step": step}
            rows["train"].append(place | {"iteration": i, "steps_per_second": 100.0 + seed, "policy_loss": 0.1})
            ranks = {"batch": "probe", "r_e_K": 3.0 + 0.1 * i + seed % 7, "r_e_A": 2.0, "feature_rank": 5}
            rows["spectrum"].append(place | ranks | {"gate_entropy": 0.5, "expert_load": [0.5, 0.5]})
            if i % 5 == 0:
                score = {"success_final": 0.1 * i * ((seed + index) % 2), "success_once": 0.1 * i, "std_return": 0.0}
                score |= {"mean_return": float(i), "mean_length": 8.0, "episodes": 2}
                rows["eval"].append(place | {"phase": "final" if i == 10 else "train"} | score)
    for log, lines in rows.items():
        (path / f"{log}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
