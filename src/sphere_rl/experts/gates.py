"""Gates: what makes a routing of a gate's logits. A gate is one object with one method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.errors import ConfigError
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.experts.routing import Routing, gated_routing
from sphere_rl.kernels.routing import Gating


@runtime_checkable
class Gate(Protocol):
    """Logits [N, R] of R experts → `Routing` of E = shared + R: weights, and which expert sees which sample.

    Gradients reach the logits through the routing's weights (`sphere_rl.experts.weighted_routing` makes one of weights
    alone). Whatever a gate draws at random must come from a generator of its own.
    """

    @property
    def shared(self) -> int:
        """Always-on experts, the first ones, which have no logit."""
        ...

    def __call__(self, logits: Float[Tensor, "N R"]) -> Routing:
        """Route N samples."""
        ...


@dataclass(frozen=True)
class TopK:
    """Softmax over each sample's k largest logits, after ``shared`` experts of weight 1 that see all samples."""

    k: int
    shared: int = 0
    temperature: float = 1.0

    def __call__(self, logits: Float[Tensor, "N R"]) -> Routing:
        """Route N samples; of equal logits the lowest index wins."""
        return gated_routing(logits, self.gating)

    @property
    def gating(self) -> Gating:
        """The same for kernels."""
        return Gating(self.k, self.shared, self.temperature)


@dataclass(frozen=True)
class Kind:
    """An architecture of actors and critics: a line about it, its gate, and what stands in front of both.

    Attributes:
        summary: the line of ``sphere list``.
        gate: called with the network's options and whether the module is in training mode; ``None`` for one MLP.
        encoder: called with D and the network's options, makes any module of states [N, D] → features [N, F], which
            gate and experts see in place of the states; ``None``: they see the states. It is built with the global
            random stream seeded, and trained with the rest.
    """

    summary: str
    gate: Callable[[NetworkOptions, bool], Gate] | None = None
    encoder: Callable[[int, NetworkOptions], nn.Module] | None = None

    def check(self, options: NetworkOptions) -> None:
        """Raise `ConfigError` where there are not as many experts as the gate selects."""
        made = self.gate(options, False) if self.gate else None
        if made is None:
            return
        if isinstance(made, TopK) and made.k > options.num_experts:
            raise ConfigError("top_k", made.k, f"1 to num_experts ({options.num_experts})")
        routed = options.num_experts - made.shared
        least = made.k if isinstance(made, TopK) else 1
        if routed < least:
            most = options.num_experts - least
            raise ConfigError("num_shared", made.shared, f"0 to {most}, num_experts - top_k")
