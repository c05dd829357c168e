"""Concatenated ReLU: [relu(z), relu(−z)] on half as many linear units, so that no unit can die."""

from __future__ import annotations

from typing import Any

from sphere_rl.methods import Method


class CReLU(Method):
    """A layer keeps its width: w/2 units give w features. Widths must be even."""

    summary = "concatenated ReLU: relu(z) beside relu(-z), on half the units"
    citation = "Abbas et al. 2023, Loss of Plasticity in Continual Deep Reinforcement Learning (CoLLAs)"

    def network_options(self) -> dict[str, Any]:
        """Turn the activation on."""
        return {"crelu": True}
