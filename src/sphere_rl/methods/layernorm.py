"""LayerNorm in every hidden layer: Linear → LayerNorm (no affine) → nonlinearity."""

from __future__ import annotations

from typing import Any

from sphere_rl.methods import Method


class LayerNorm(Method):
    """Features of actor, critic and gate have mean 0 and variance 1 over each layer before the nonlinearity."""

    summary = "LayerNorm before every nonlinearity"
    citation = "Lyle et al. 2023, Understanding Plasticity in Neural Networks (ICML)"

    def network_options(self) -> dict[str, Any]:
        """Turn the layers on."""
        return {"layer_norm": True}
