"""Gates: what makes a routing of a gate's logits. A gate is one object with one method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.errors import ConfigError, described
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.experts.routing import Routing, gated_routing
from sphere_rl.kernels.routing import Gating


@runtime_checkable
class Gate(Protocol):
    """Logits [N, R] of R experts → `Routing` of E = shared + R: weights, and which expert sees which sample.

    Gradients reach the logits through the routing's weights (`sphere_rl.experts.weighted_routing` makes one of weights
    alone). Whatever a gate draws at random must come from PyTorch's global stream on the CPU, as by
    ``torch.randn(logits.shape).to(logits)``: runs seed it, and measuring and evaluating put it back.
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


def is_top_k(gate: Gate) -> TypeGuard[TopK]:
    """Whether kernels may route in a gate's place: it is `TopK` itself, not a subclass that may route otherwise."""
    return type(gate) is TopK


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
        """Raise `ConfigError` where there are not as many experts as the gate selects, or where it is no gate."""
        gate = self.gate
        if gate is None:
            return
        for training in (False, True):
            try:
                made = gate(options, training)
                routed = options.num_experts - made.shared
            except Exception as error:  # whatever somebody's code makes of these options
                raise ConfigError("actor", self.summary, f"a kind that makes a gate ({described(error)})") from error
            least = made.k if is_top_k(made) else 1
            if is_top_k(made) and made.k > options.num_experts:
                raise ConfigError("top_k", made.k, f"1 to num_experts ({options.num_experts})")
            if routed < least:
                most = options.num_experts - least
                raise ConfigError("num_shared", made.shared, f"0 to {most}, num_experts - top_k")
            if not is_top_k(made) and (wrong := _fault(made, options)):
                wanted = f"a kind whose {type(made).__name__} makes a Routing [2, {options.num_experts}], not {wrong}"
                raise ConfigError("actor", self.summary, wanted)


def _fault(gate: Gate, options: NetworkOptions) -> str:
    """What a gate that is none of this package makes of two samples' logits where that is no routing of them.

    Raises:
        ConfigError: it fails, and there are fewer experts than it may have to select.
    """
    routed = options.num_experts - gate.shared
    cpu, draws = torch.device("cpu"), torch.random.fork_rng(devices=[])
    try:
        with cpu, draws, torch.no_grad():  # on the CPU also where networks are only sized, on meta
            found = gate(torch.zeros(2, routed))
    except Exception as error:
        if options.top_k > routed:
            raise ConfigError("top_k", options.top_k, f"1 to {routed} for this gate ({described(error)})") from error
        return described(error)
    if not isinstance(found, Routing):
        return type(found).__name__
    fits = list(found.weights.shape) == [2, found.num_experts] == [2, options.num_experts]
    return "" if fits else f"{list(found.weights.shape)}, of {found.num_experts} experts"
