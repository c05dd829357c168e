"""The shape of actors and critics."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Integral

from sphere_rl.errors import ConfigError

DEEPEST = 1000


@dataclass(frozen=True)
class NetworkOptions:
    """Shape of an actor or critic; the layers of the gate are those of an expert."""

    width: int = 256
    """Units of a hidden layer."""
    depth: int = 3
    """Hidden layers."""
    num_experts: int = 10
    """Experts of a mixture, shared ones included."""
    top_k: int = 2
    """Experts that the gate selects for a sample."""
    num_shared: int = 1
    """Always-on experts of shared_moe."""
    temperature: float = 1.0
    """Divides the gate's logits before the softmax."""
    layer_norm: bool = False
    """Linear, LayerNorm without affine, activation in every hidden layer."""
    crelu: bool = False
    """Activation [relu(z), relu(-z)] on half as many linear units in every hidden layer."""
    spectral_norm: bool = False
    """Every hidden weight divided by its largest singular value."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_experts", "top_k", "num_shared"):
            if not isinstance(getattr(self, name), Integral) or getattr(self, name) >= 2**63:
                raise ConfigError(name, getattr(self, name), "a whole number below 2**63")
        for name in ("width", "depth", "num_experts"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")
        if self.depth > DEEPEST:
            raise ConfigError("depth", self.depth, f"1 to {DEEPEST}")
        if self.crelu and self.width % 2:
            raise ConfigError("width", self.width, "an even number with crelu")
        if self.top_k < 1:
            raise ConfigError("top_k", self.top_k, f"1 to num_experts ({self.num_experts})")
        if self.num_shared < 0:
            raise ConfigError("num_shared", self.num_shared, "0 or more")
        if not 0 < self.temperature < inf:
            raise ConfigError("temperature", self.temperature, "a number above 0")
