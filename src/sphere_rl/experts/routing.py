"""Which expert sees which sample: assignments sorted by expert, and how logits and weights become them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sphere_rl.experts.tracing import unsorted_weights
from sphere_rl.kernels.routing import Gating, blocks_of, route


@dataclass(frozen=True)
class Routing:
    """Which expert sees which sample: M assignments sorted by expert, and by sample inside an expert.

    ``weights`` and ``gate`` carry gradients to the logits.

    Attributes:
        weights: dense routing weights, zero where not selected.
        sample: the row of each assignment.
        gate: its routing weight.
        counts: assignments of each expert.
    """

    weights: Float[Tensor, "N E"]
    sample: Int[Tensor, "M"]
    gate: Float[Tensor, "M"]
    counts: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """N, the rows that were routed."""
        return self.weights.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    @cached_property
    def expert(self) -> Int[Tensor, "M"]:
        """The expert of each assignment, ascending."""
        counts = torch.tensor(self.counts, device=self.sample.device)
        experts = torch.arange(self.num_experts, device=self.sample.device)
        return experts.repeat_interleave(counts, output_size=len(self.sample))

    @cached_property
    def blocks(self) -> tuple[tuple[int, int, int], ...]:
        """(expert, first row, end row) of every expert that has assignments."""
        return tuple(blocks_of(list(self.counts)))

    @cached_property
    def block_rows(self) -> tuple[Int[Tensor, "_"], ...]:
        """The samples of each block, ascending."""
        return tuple(self.sample[start:end] for _, start, end in self.blocks)


def gated_routing(logits: Float[Tensor, "N R"], gating: Gating) -> Routing:
    """Route by the logits of R experts; the layer it drives has E = gating.shared + R.

    Raises ValueError where gating.k is not 1 to R.
    """
    if not 1 <= gating.k <= logits.shape[1]:
        raise ValueError(f"k = {gating.k}: expected 1 to {logits.shape[1]}, the number of routed experts")
    if torch.compiler.is_exporting():
        return _weights_alone(unsorted_weights(logits, gating))
    found = route(logits, gating)
    return Routing(weights=found.weights, sample=found.sample, gate=found.gate, counts=tuple(found.counts))


def top_k_routing(logits: Float[Tensor, "N E"], k: int, temperature: float = 1.0) -> Routing:
    """Softmax over each row's k largest logits, zero elsewhere; of equal logits the lowest index wins."""
    return gated_routing(logits, Gating(k, 0, temperature))


def dense_routing(logits: Float[Tensor, "N E"], temperature: float = 1.0) -> Routing:
    """Softmax over all experts: every expert sees every sample, M = N·E."""
    return gated_routing(logits, Gating(logits.shape[1], 0, temperature))


def shared_top_k_routing(logits: Float[Tensor, "N R"], num_shared: int, k: int, temperature: float = 1.0) -> Routing:
    """Always-on experts 0 … num_shared − 1 with weight 1, then top-k of the R routed ones (DeepSeekMoE).

    The layer it drives has E = num_shared + R experts.
    """
    return gated_routing(logits, Gating(k, num_shared, temperature))


def weighted_routing(weights: Float[Tensor, "N E"]) -> Routing:
    """Every sample to the experts whose weight is not zero; gradients reach the weights of these."""
    if torch.compiler.is_exporting():
        return _weights_alone(weights)
    expert, sample = (weights.detach() != 0).t().nonzero().unbind(1)
    counts = torch.bincount(expert, minlength=weights.shape[1])
    return Routing(weights=weights, sample=sample, gate=weights[sample, expert], counts=tuple(counts.tolist()))


def _weights_alone(weights: Float[Tensor, "N E"]) -> Routing:
    """What a graph that no sample changes can have of a routing: who sees which sample would be its shape."""
    nothing = torch.zeros(0, dtype=torch.int64, device=weights.device)
    return Routing(weights=weights, sample=nothing, gate=weights[:0, 0], counts=(0,) * weights.shape[1])


def single_routing(
    num_samples: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Routing:
    """Every sample to the only expert with weight 1: a plain MLP as a layer of one expert."""
    weights = torch.ones(num_samples, 1, device=device, dtype=dtype)
    sample = torch.arange(num_samples, device=device)
    return Routing(weights=weights, sample=sample, gate=weights[:, 0], counts=(num_samples,))
