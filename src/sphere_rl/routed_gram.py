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
    through experts they share, so expert e adds the c_e² products of its own rows Φ_e = g F_e.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor, routing: Routing) -> Tensor:
        blocks = list(routing.blocks)
        penalty, centred, entries = centred_gram(
            values, gate, routing.sample, blocks, routing.num_samples, routing.num_experts
        )
        ctx.save_for_backward(values, gate, routing.sample)
        ctx.kept = blocks, centred, entries
        return penalty

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph: use sphere_rl.sphere_penalty(features.weighted()) in its place")
        (grad,) = grad_outputs
        of_values, of_gate = gram_gradients(*ctx.saved_tensors, *ctx.kept)
        return of_values.mul_(grad), of_gate.mul_(grad), None


def routed_penalty(values: Tensor, gate: Tensor, routing: Routing) -> Tensor:
    """The penalty of features [M, H] with gate weights [M]; it can be differentiated once."""
    return _RoutedPenalty.apply(values, gate, routing)


@scripted
def centred_gram(
    values: Tensor, gate: Tensor, sample: Tensor, blocks: list[tuple[int, int, int]], n: int, experts: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The penalty of N samples, N(S − cI), and of each block the index of its entries there, empty where it has more
    than half of the samples. ``values`` are F, the features before they are weighted.
    """
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
    m = experts * values.size(1)
    mean = gram.trace() / m
    gram.diagonal().sub_(mean)
    penalty = (torch.dot(gram.view(-1), gram.view(-1)) + (m - n) * mean.square()) / n**2
    return penalty, gram, entries


@scripted
def gram_gradients(
    values: Tensor,
    gate: Tensor,
    sample: Tensor,
    blocks: list[tuple[int, int, int]],
    gram: Tensor,
    entries: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """The penalty's gradients for ``values`` [M, H] and ``gate`` [M], from what `centred_gram` found."""
    of_values, n = torch.empty_like(values), gram.size(0)
    for i in range(len(blocks)):
        _, start, end = blocks[i]
        rows, own = sample[start:end], gram
        if entries[i].numel() > 0:
            own = gram.view(-1).index_select(0, entries[i]).view(end - start, end - start)
        elif end - start < n:
            own = gram.index_select(0, rows).index_select(1, rows)
        torch.mm(own * gate[start:end], values[start:end], out=of_values[start:end])
    factor = 4 / n**2
    of_gate = (of_values * values).sum(1).mul_(factor)
    return of_values.mul_((gate * factor).unsqueeze(1)), of_gate
