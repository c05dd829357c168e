"""The SPHERE penalty of routed features and its gradient, both from the routed rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sphere_rl.chain import scripted

if TYPE_CHECKING:
    from sphere_rl.experts import Routing


class RoutedPenalty(torch.autograd.Function):
    """‖S − cI‖_F² + (m − N)c² with S = ΦΦᵀ/N, c = tr S/m; its gradient is 4/N (S − cI)Φ.

    A sum of squares: ‖A‖² − (tr A)²/m would cancel where the spectrum is almost flat. Two samples meet in S only
    through experts they share, so expert e adds the products of its own rows Φ_e. An expert that sees most
    samples does so as an N × N product, the others through the index of their c_e² entries.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor, routing: Routing) -> Tensor:
        n, m = routing.num_samples, routing.num_experts * values.shape[1]
        weighted = gate[:, None] * values
        spans = [(start, end) for _, start, end in routing.blocks]
        gram, entries = _gram(weighted, routing.sample, spans, n)
        mean = gram.trace() / m
        gram.diagonal().sub_(mean)
        ctx.save_for_backward(values, gate, routing.sample)
        ctx.kept = weighted, spans, gram, entries
        return torch.dot(gram.view(-1), gram.view(-1)) + (m - n) * mean.square()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: use sphere_rl.sphere_penalty(features.weighted()) in its place")
        (grad,) = grad_outputs
        values, gate, sample = ctx.saved_tensors
        weighted, spans, gram, entries = ctx.kept
        grad_weighted = _times_gram(weighted, sample, spans, gram, entries).mul_(grad * (4 / len(gram)))
        grad_gate = (grad_weighted * values).sum(1) if ctx.needs_input_grad[1] else None
        return grad_weighted.mul_(gate[:, None]), grad_gate, None


@scripted
def _gram(weighted: Tensor, sample: Tensor, spans: list[tuple[int, int]], n: int) -> tuple[Tensor, list[Tensor]]:
    """ΦΦᵀ/N of rows sorted by expert, and for each span the index of its entries, empty for an N × N product."""
    gram = weighted.new_zeros(n, n)
    entries: list[Tensor] = []
    for start, end in spans:
        block, rows = weighted[start:end], sample[start:end]
        if 4 * (end - start) > 3 * n:
            whole = block if end - start == n else weighted.new_zeros(n, block.size(1)).index_copy_(0, rows, block)
            gram.addmm_(whole, whole.t())
            entries.append(sample[:0])
        else:
            index = rows.mul(n).unsqueeze(1).add(rows).view(-1)
            gram.view(-1).scatter_add_(0, index, torch.mm(block, block.t()).view(-1))
            entries.append(index)
    return gram.div_(n), entries


@scripted
def _times_gram(
    weighted: Tensor, sample: Tensor, spans: list[tuple[int, int]], gram: Tensor, entries: list[Tensor]
) -> Tensor:
    """Each span's rows of the symmetric matrix ``gram`` times Φ_e, one row for each of ``weighted``."""
    out, n = torch.empty_like(weighted), gram.size(0)
    for i in range(len(spans)):
        start, end = spans[i]
        block, rows = weighted[start:end], sample[start:end]
        if entries[i].numel() > 0:
            own = gram.view(-1).index_select(0, entries[i]).view(end - start, end - start)
            torch.mm(own, block, out=out[start:end])
        elif end - start == n:
            torch.mm(gram, block, out=out[start:end])
        else:
            torch.mm(gram.index_select(0, rows).index_select(1, rows), block, out=out[start:end])
    return out
