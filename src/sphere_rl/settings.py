"""What the settings of a run are for: which of them name it, say what is trained, or only watch and compute it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from sphere_rl.config import TABLES, TrainConfig

TRAINS = "trains"
ROLES: dict[str, str] = {field.name: field.metadata.get("role", TRAINS) for field in fields(TrainConfig)}
"""What each field of `TrainConfig` is for, as it is declared there: ``names``, ``trains``, ``watches``, ``spares``."""


def settings(config: Mapping[str, Any], *roles: str) -> Iterator[tuple[str, Any]]:
    """Settings of these roles in what `sphere_rl.config.to_dict` gave, of all roles where none is named.

    Tables are taken apart: ``network.width``, ``env_args.g`` and ``sphere.rho``, the latter of the methods in use. What
    no field is called, as in a run of another version, says what was trained, as tables do.
    """
    for name, value in config.items():
        if roles and ROLES.get(name, TRAINS) not in roles:
            continue
        if not isinstance(value, Mapping):
            yield name, value
        elif name in (*TABLES, *config["method"]):
            yield from ((f"{name}.{inner}", item) for inner, item in value.items())
