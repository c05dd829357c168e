"""What a configuration takes of memory and disk, known before anything is trained."""

from __future__ import annotations

import io
import os
from typing import Any

import torch

from sphere_rl.config import TrainConfig
from sphere_rl.errors import ConfigError
from sphere_rl.learner.actor_critic import Spaces, make_networks
from sphere_rl.training.agent import Agent, made_methods, options_with

BYTES = 4
"""Of a float32 number."""
COPIES = 4
"""Of a parameter while it is trained: itself, its gradient and Adam's two moments."""


def check_memory(config: TrainConfig, spaces: Spaces) -> None:
    """Refuse networks and rollouts that cannot fit the memory of this machine, before they are made.

    Raises:
        ConfigError: parameters, their gradients and moments, or the observations, actions and values of a rollout are
            more bytes than there are. Less than that may be too much, too: what else runs is not counted.
    """
    there = memory()
    networks = COPIES * BYTES * parameters(config, spaces)
    if networks > there:
        raise ConfigError("width", config.network.width, _fitting("networks", networks, there))
    numbers = 2 * spaces.observation_dim + 3 * spaces.action_dim + 6
    rollout = BYTES * numbers * config.steps_per_iteration
    if rollout > there:
        raise ConfigError("num_steps", config.num_steps, _fitting("rollouts", rollout, there))


def parameters(config: TrainConfig, spaces: Spaces) -> int:
    """Parameters of actor and critic, with the options that methods set, counted without making them."""
    options = options_with(made_methods(config), config)
    try:
        with torch.device("meta"):
            networks = make_networks(config, spaces, options, torch.Generator())
    except RuntimeError:  # one tensor alone has more bytes than can be counted
        return 2**62
    return sum(p.numel() for network in networks for p in network.parameters())


def memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def checkpoint_bytes(config: TrainConfig, spaces: Spaces) -> tuple[int, int]:
    """About how large ``step-*.pt`` and ``task-*.pt`` of a run become, without states of its environments."""
    agent = Agent(config, spaces, seed=0)
    for parameter in (*agent.actor_parameters, *agent.critic_parameters):
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        optimizer.step()  # its moments are there from the first step on
    state = agent.state_dict()
    return _saved(state), _saved({name: state[name] for name in ("actor", "normalizer", "methods")})


def size(count: int) -> str:
    """Bytes in words: 1.5 MB."""
    number = float(count)
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 1000:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} TB"


def _saved(state: dict[str, Any]) -> int:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell()


def _fitting(what: str, need: int, there: int) -> str:
    return f"{what} that fit the memory of this machine ({size(there)}; these need {size(need)} or more)"
