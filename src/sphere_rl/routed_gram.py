"""The SPHERE penalty of routed features and its gradient, both from the routed rows only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sphere_rl.scripting import scripted

if TYPE_CHECKING:
    from sphere_rl.experts import Routing


class _RoutedPenalty(torch.autograd.Function):
    """‖S − cI‖_F² + (m − N)c² with S = ΦΦᵀ/N, c = tr S/m; its gradient is 4/N (S − cI)Φ.

    A sum of squares: ‖A‖² − (tr A)²/m would cancel where the spectrum is almost flat. Two samples meet in S only
    through experts they share, so expert e adds the products of its own rows Φ_e. An expert that sees most
    samples does so as an N × N product, the others through the index of their c_e² entries.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor, routing: Routing) -> Tensor:
        blocks = list(routing.blocks)
        weighted, centred, entries, penalty = _centred_gram(
            values, gate, routing.sample, blocks, routing.num_samples, routing.num_experts
        )
        ctx.save_for_backward(values, gate, routing.sample)
        ctx.kept = weighted, blocks, centred, entries
        return penalty

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: use sphere_rl.sphere_penalty(features.weighted()) in its place")
        (grad,) = grad_outputs
        values, gate, sample = ctx.saved_tensors
        weighted, blocks, centred, entries = ctx.kept
        grad_weighted = _times_gram(weighted, sample, blocks, centred, entries).mul_(grad * (4 / len(centred)))
        grad_gate = (grad_weighted * values).sum(1) if ctx.needs_input_grad[1] else None
        return grad_weighted.mul_(gate[:, None]), grad_gate, None


def routed_penalty(values: Tensor, gate: Tensor, routing: Routing) -> Tensor:
    """The penalty of features [M, H] with gate weights [M]; it can be differentiated once."""
    return _RoutedPenalty.apply(values, gate, routing)


@scripted
def _gram(weighted: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], n: int) -> tuple[Tensor, list[Tensor]]:
    """ΦΦᵀ/N of rows sorted by expert, and for each block the index of its entries, empty for an N × N product."""
    gram = weighted.new_zeros(n, n)
    entries: list[Tensor] = []
    for _, start, end in blocks:
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
    weighted: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], gram: Tensor, entries: list[Tensor]
) -> Tensor:
    """Each block's rows of the symmetric matrix ``gram`` times Φ_e, one row for each of ``weighted``."""
    out, n = torch.empty_like(weighted), gram.size(0)
    for i in range(len(blocks)):
        _, start, end = blocks[i]
        block, rows = weighted[start:end], sample[start:end]
        if entries[i].numel() > 0:
            own = gram.view(-1).index_select(0, entries[i]).view(end - start, end - start)
            torch.mm(own, block, out=out[start:end])
        elif end - start == n:
            torch.mm(gram, block, out=out[start:end])
        else:
            torch.mm(gram.index_select(0, rows).index_select(1, rows), block, out=out[start:end])
    return out


@scripted
def _centred_gram(
    values: Tensor, gate: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], n: int, experts: int
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Φ's rows, S − cI, the entries of its blocks, and the penalty."""
    m = experts * values.size(1)
    weighted = values * gate.unsqueeze(1)
    centred, entries = _gram(weighted, sample, blocks, n)
    mean = centred.trace() / m
    centred.diagonal().sub_(mean)
    penalty = torch.dot(centred.view(-1), centred.view(-1)) + (m - n) * mean.square()
    return weighted, centred, entries, penalty


@scripted
def penalty_and_gradient(
    values: Tensor, gate: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], n: int, experts: int
) -> tuple[Tensor, Tensor]:
    """The penalty of N samples and its gradient for the rows of Φ [M, H]."""
    weighted, centred, entries, penalty = _centred_gram(values, gate, sample, blocks, n, experts)
    return penalty, _times_gram(weighted, sample, blocks, centred, entries).mul_(4 / n)
