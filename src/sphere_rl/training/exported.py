"""A policy on its own: ``policy.json`` says what it is, ``policy.safetensors`` holds its weights and normaliser.

Nothing of the run folder is needed to read it, and no code is run by reading it but that of the plugins it names.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sphere_rl.config import TrainConfig, from_dict, to_dict
from sphere_rl.errors import RunFolderError, described
from sphere_rl.extras import require_module
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.runs.records import OBJECT, read_object
from sphere_rl.runtime import check_device
from sphere_rl.training.agent import Agent, Policy
from sphere_rl.training.progress import record_of

DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"


def describe(config: TrainConfig, spaces: Spaces) -> dict[str, Any]:
    """What `load` needs beside the weights, as plain data."""
    return {"config": to_dict(config), "spaces": asdict(spaces)}


def save(policy: Policy, path: Path) -> None:
    """Write a policy's weights and its normaliser.

    Raises:
        MissingExtraError: safetensors is not installed.
    """
    require_module("safetensors", "format safetensors")
    from safetensors.torch import save as saved

    path.write_bytes(saved({name: tensor.contiguous() for name, tensor in policy.state_dict().items()}))


def load(folder: Path, device: str = "cpu") -> Policy:
    """Read what `describe` and `save` gave.

    Raises:
        RunFolderError: a file is missing, broken, or does not fit the other.
        ConfigError: PyTorch cannot compute on this device here.
        MissingExtraError: safetensors is not installed.
    """
    require_module("safetensors", "format safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_device(device)
    path = folder / WEIGHTS
    if not path.is_file():
        raise RunFolderError(f"{path}: is missing; sphere export RUN --format safetensors writes it")
    kinds = {"config": OBJECT, "spaces": OBJECT}
    description = read_object(folder / DESCRIPTION, kinds, tuple(kinds))
    try:
        said = description["spaces"].items()
        spaces = record_of(Spaces, {name: tuple(value) if isinstance(value, list) else value for name, value in said})
        agent = Agent(replace(from_dict(description["config"]), device=device), spaces, seed=0, learns=False)
        policy = Policy(agent.actor, agent.normalizer)
        policy.load_state_dict(load_file(path))
    except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunFolderError(f"{folder}: not an exported policy ({described(error, longest=200)})") from None
    return policy.eval()
