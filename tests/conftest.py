"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jaxtyping import config as jaxtyping_config

from sphere_rl.config import TrainConfig, override

TINY: dict[str, Any] = {
    "suite": "gym",
    "tasks": ["Pendulum-v1"],
    "num_envs": 2,
    "num_steps": 64,
    "minibatch_size": 32,
    "num_epochs": 2,
    "steps_per_task": 512,
    "eval_every": 256,
    "eval_episodes": 1,
    "final_eval_episodes": 2,
    "checkpoint_every": 128,
    "spectrum_every": 256,
    "network": {"width": 16, "depth": 2, "num_experts": 3},
}
"""Changes to the defaults that make a run of a second: Pendulum, four segments, a checkpoint and logs of each kind."""


@pytest.fixture(autouse=True)
def _plain_process() -> None:
    """Undo what a run sets for the whole process: hypothesis wants its subnormal numbers."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Users run without the shape checker: there the functions' own errors are what they see."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny() -> TrainConfig:
    """A run of about a second."""
    return override(TrainConfig(), TINY)
