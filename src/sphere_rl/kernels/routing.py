"""Which expert sees which sample: what autograd and TorchScript both run."""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.script import scriptable


class Gating(NamedTuple):
    """How logits [N, R] become routing weights [N, E], E = shared + R."""

    k: int
    """Softmax over the k largest logits of each sample."""
    shared: int
    """Experts of weight 1 that see all samples, before the others."""
    temperature: float
    """Logits are divided by it."""


class Assignments(NamedTuple):
    """The M selected pairs of expert and sample, sorted by expert and then by sample."""

    weights: Tensor
    """Routing weights [N, E], zero where not selected."""
    expert: Tensor
    """[M]."""
    sample: Tensor
    """[M]."""
    gate: Tensor
    """Routing weight of each pair [M]."""
    counts: list[int]
    """Pairs of each expert."""


@scriptable
def selected(logits: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k largest logits [N, R] of each sample; of equal ones the lowest wins."""
    return logits.detach().argsort(dim=1, descending=True, stable=True)[:, :k]


@scriptable
def gate_weights(logits: Tensor, gating: Gating) -> tuple[Tensor, Tensor]:
    """Routing weights [N, E] of logits [N, R], and whether an expert is chosen; of equal ones the lowest index wins."""
    # 1, for True is a value that cannot be traced.
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, selected(logits, gating.k), 1)
    weights = (logits / gating.temperature).masked_fill(~chosen, -float("inf")).softmax(1)
    if gating.shared > 0:
        ones = weights.new_ones(weights.size(0), gating.shared)
        weights, chosen = torch.cat((ones, weights), 1), torch.cat((ones.to(torch.bool), chosen), 1)
    return weights, chosen


@scriptable
def route(logits: Tensor, gating: Gating) -> Assignments:
    """Assign samples by their logits [N, R]; of equal ones the lowest index wins."""
    weights, chosen = gate_weights(logits, gating)
    expert, sample = chosen.t().nonzero().unbind(1)
    counts: list[int] = chosen.sum(0).tolist()
    return Assignments(weights, expert, sample, weights[sample, expert], counts)


@scriptable
def blocks_of(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    blocks: list[tuple[int, int, int]] = []
    start = 0
    for expert, count in enumerate(counts):
        if count > 0:
            blocks.append((expert, start, start + count))
        start += count
    return blocks
