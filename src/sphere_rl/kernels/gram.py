"""The Gram matrix of routed features, how far it is from isotropic, and the gradient of that: from routed rows only.

The value is `sphere_rl.penalty`'s; tests hold one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.routing import blocks_of
from sphere_rl.kernels.script import scriptable, scripted


class _RoutedPenalty(torch.autograd.Function):
    """‖S − cI‖_F² + (m − N)c² with S = ΦΦᵀ/N, c = tr S/m; its gradient is 4/N (S − cI)Φ.

    A sum of squares: ‖A‖² − (tr A)²/m would cancel where the spectrum is almost flat. Two samples meet in S only
    through experts they share, so expert e adds the c_e² products of its own rows Φ_e = g F_e. The scale-free penalty L
    is the same over (tr S)²; its gradient is 4/(N (tr S)²) (S − cI − L tr S I)Φ.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, gate: Tensor, sample: Tensor, counts: Sequence[int], n: int, free: bool
    ) -> Tensor:
        blocks = blocks_of(list(counts))
        with torch.autocast(values.device.type, enabled=False):
            found = centred_gram(values, gate, sample, blocks, n, len(counts), free)
        ctx.save_for_backward(found.features, gate, sample)
        ctx.kept = blocks, Centred(*found)
        return found.penalty.clone()  # what is returned gets a graph; what is kept must not

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: use sphere_rl.sphere_penalty(features.weighted()) in its place")
        (grad,), (features, gate, sample), (blocks, found) = grad_outputs, ctx.saved_tensors, ctx.kept
        with torch.autocast(gate.device.type, enabled=False):
            of_values, of_gate = gram_gradients(gate, sample, blocks, found._replace(features=features))
        return of_values.mul_(grad), of_gate.mul_(grad), None, None, None, None


def routed_penalty(
    values: Tensor, gate: Tensor, sample: Tensor, counts: Sequence[int], n: int, *, free: bool = False
) -> Tensor:
    """The penalty of features [M, H] with gate weights [M] of n samples; it can be differentiated once.

    Rows are sorted by expert, so many of each; ``sample`` is whose they are. ``free``: the scale-free penalty. In
    float32 at least, under autocast, too.
    """
    dtype = torch.promote_types(torch.promote_types(values.dtype, gate.dtype), torch.float32)
    return _RoutedPenalty.apply(values.to(dtype), gate.to(dtype), sample, counts, n, free)


class Centred(NamedTuple):
    """A penalty, and its gradient for the weighted features: factor · gram Φ.

    features: F over their size, which is 1 unless their products would leave the range of numbers. least: what
    ‖gram Φ‖² must be above, or nothing but round-off is left. entries: of each block the index of its entries in gram,
    empty where it has more than half of the samples.
    """

    penalty: Tensor
    gram: Tensor
    factor: Tensor
    features: Tensor
    size: Tensor
    least: Tensor
    entries: list[Tensor]


@scripted
def _products(
    values: Tensor, gate: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], n: int
) -> tuple[Tensor, list[Tensor]]:
    """ΦΦᵀ [N, N] and `Centred.entries`."""
    gram = values.new_zeros(n, n)
    entries: list[Tensor] = []
    for _, start, end in blocks:
        block, rows, weight = values[start:end], sample[start:end], gate[start:end]
        weighted, index = torch.mm(block, block.t()).mul_(weight).mul_(weight.unsqueeze(1)), rows[:0]
        if end - start == n:
            gram.add_(weighted)
        elif 2 * (end - start) > n:
            gram.index_add_(1, rows, gram.new_zeros(n, end - start).index_copy_(0, rows, weighted))
        else:
            index = rows.mul(n).unsqueeze(1).add(rows).view(-1)
            gram.view(-1).scatter_add_(0, index, weighted.view(-1))
        entries.append(index)
    return gram, entries


@scriptable
def _round_off(values: Tensor) -> float:
    """`sphere_rl.penalty.ROUND_OFF` units in the last place."""
    return 64 * (2.0**-52 if values.dtype == torch.float64 else 2.0**-23)


@scripted
def centred_gram(
    values: Tensor,
    gate: Tensor,
    sample: Tensor,
    blocks: list[tuple[int, int, int]],
    n: int,
    experts: int,
    free: bool,
) -> Centred:
    """The penalty of N samples; ``free``: the scale-free one. ``values`` are F, features before they are weighted."""
    gram, entries = _products(values, gate, sample, blocks, n)
    trace, m, size = gram.trace(), experts * values.size(1), gate.new_ones([])
    if free and not 1e-10 < float(trace) < 1e15:  # its square, and those of products, must stay numbers
        largest = values.abs().amax()
        size = largest + (largest == 0).to(largest.dtype)
        values = values / size
        gram, entries = _products(values, gate, sample, blocks, n)
        trace = gram.trace()
    mean = trace / m
    gram.diagonal().sub_(mean)
    squares = torch.dot(gram.view(-1), gram.view(-1)) + (m - n) * mean.square()
    if not free:
        factor, least = gate.new_full([], 4 / n**2), gate.new_full([], -1.0)
        return Centred(squares / n**2, gram, factor, values, size, least, entries)
    square = trace.square() + (trace == 0).to(trace.dtype)
    penalty = squares / square
    gram.diagonal().sub_(penalty * trace)
    least = (_round_off(values) * (mean + penalty * trace)).square() * trace
    return Centred(penalty, gram, 4 / square, values, size, least, entries)


@scripted
def gram_gradients(
    gate: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], found: Centred
) -> tuple[Tensor, Tensor]:
    """The penalty's gradients for ``values`` [M, H] and ``gate`` [M], from what `centred_gram` found.

    Zeros where all eigenvalues that are not zero are equal (as of equal states) and the scale-free penalty has none:
    round-off has no direction, and mode grad would make it as long as any gradient.
    """
    of_values, n = torch.empty_like(found.features), found.gram.size(0)
    for i in range(len(blocks)):
        _, start, end = blocks[i]
        rows, own = sample[start:end], found.gram
        if found.entries[i].numel() > 0:
            own = own.view(-1).index_select(0, found.entries[i]).view(end - start, end - start)
        elif end - start < n:
            own = own.index_select(0, rows).index_select(1, rows)
        torch.mm(own * gate[start:end], found.features[start:end], out=of_values[start:end])
    squares = torch.dot(of_values.view(-1), of_values.view(-1))
    factor = found.factor * (squares > found.least).to(squares.dtype)
    of_gate = (of_values * found.features).sum(1).mul_(factor)
    return of_values.mul_((gate * (factor / found.size)).unsqueeze(1)), of_gate
