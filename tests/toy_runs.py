"""Runs of a second on the environments of `toy_envs`."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from sphere_rl import protocol
from sphere_rl.config import TrainConfig, override
from sphere_rl.experts.network import MoENetwork, make_actor
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.runs import RunFolder
from sphere_rl.suites import make_suite

TINY: dict[str, Any] = {
    "suite": "gym",
    "num_envs": 2,
    "num_steps": 16,
    "minibatch_size": 8,
    "num_epochs": 2,
    "steps_per_task": 64,
    "checkpoint_every": 32,
    "eval_every": 10_000,
    "final_eval_episodes": 3,
    "eval_max_steps": 40,
    "spectrum_every": -1,
    "network": {"width": 16, "depth": 2, "num_experts": 3},
}
WORDS = [
    word
    for name, value in [*TINY.items(), *TINY["network"].items()]
    if name != "network"
    for word in (f"--{name.replace('_', '-')}", str(value))
]
CPU = torch.device("cpu")
GYM = make_suite("gym")


def config(task: str, **changes: Any) -> TrainConfig:
    return override(TrainConfig(), TINY | {"tasks": [f"toy_envs:{task}-v0"]} | changes)


def train(settings: TrainConfig, path: Path) -> RunFolder:
    with RunFolder(path) as folder:
        protocol.start(settings, folder, lambda step: [])
    return folder


def store(path: Path, state: Any) -> None:
    """A checkpoint with a checksum that fits, of a state that no run would write."""
    torch.save(state, buffer := io.BytesIO())
    path.write_bytes(hashlib.sha256(buffer.getvalue()).hexdigest().encode() + b"\n" + buffer.getvalue())


def networks(action_dim: int, discrete: bool = False) -> tuple[Any, MoENetwork]:
    options = NetworkOptions(width=8, depth=1, num_experts=3)
    critic = MoENetwork("dense", 3, 1, options, torch.Generator().manual_seed(1))
    return make_actor("topk_moe", 3, action_dim, width=8, depth=1, num_experts=3, discrete=discrete), critic
