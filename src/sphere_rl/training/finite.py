"""Numbers that are none: the first NaN or infinity in a state, named by its place."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphere_rl.errors import TrainingError
from sphere_rl.training.agent import Agent


def bad_number(state: Any, where: str = "") -> str | None:
    """The first number that is not finite in nested mappings, sequences, arrays and tensors, as "a.b[1, 2] is nan"."""
    if isinstance(state, Mapping):
        parts = ((f"{where}.{key}" if where else str(key), value) for key, value in state.items())
    elif isinstance(state, list | tuple):
        parts = ((f"{where}[{i}]", value) for i, value in enumerate(state))
    elif isinstance(state, Tensor | np.ndarray):
        return _bad_entry(state if isinstance(state, Tensor) else torch.from_numpy(state), where)
    else:
        return f"{where} is {state}" if isinstance(state, float) and not isfinite(state) else None
    return next((found for name, value in parts if (found := bad_number(value, name))), None)


def _bad_entry(tensor: Tensor, where: str) -> str | None:
    fine = tensor.isfinite()
    if fine.all():
        return None
    index = (~fine).nonzero()[0].tolist()
    return f"{where}{index or ''} is {tensor[tuple(index)].item()}"


def bad_agent(agent: Agent) -> str | None:
    """The first number of networks, optimisers and normalisers that is not finite."""
    parts = {
        "actor": agent.actor, "critic": agent.critic,
        "actor_optimizer": agent.actor_optimizer, "critic_optimizer": agent.critic_optimizer,
        "normalizer": agent.normalizer, "reward_normalizer": agent.reward_normalizer,
    }  # fmt: skip
    return bad_number({name: part.state_dict() for name, part in parts.items() if part is not None})


def check_agent(agent: Agent) -> None:
    """Raise `TrainingError` where an update has left a number that is not finite, which no loss has shown yet."""
    if found := bad_agent(agent):
        raise TrainingError(f"after the update {found}")
