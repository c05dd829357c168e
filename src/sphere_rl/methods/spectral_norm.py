"""Spectral normalisation: hidden weights are used as W/σ₁(W)."""

from __future__ import annotations

from typing import Any

from sphere_rl.methods import Method


class SpectralNorm(Method):
    """σ₁ of each expert's matrix is tracked by one power iteration in each training forward pass."""

    summary = "hidden weights divided by their largest singular value"
    citation = "Miyato et al. 2018, Spectral Normalization for Generative Adversarial Networks (ICLR)"

    def network_options(self) -> dict[str, Any]:
        """Turn the normalisation on."""
        return {"spectral_norm": True}
