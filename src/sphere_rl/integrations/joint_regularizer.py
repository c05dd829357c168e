"""The penalty's gradient for tensors that arise in different places of a network, added in one backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sphere_rl.integrations.captured import Captured
from sphere_rl.integrations.gradient_share import Amount, feature_gradient, share
from sphere_rl.integrations.torch_regularizer import once


def join(options: Amount, leaves: Sequence[Any], captured: Captured) -> list[Any]:
    """``leaves``, the network's outputs, with an operation behind them that regularises what was captured before.

    Raises ValueError where it cannot: what was captured is not fit for Φ, has no gradients while the output has, or the
    pass runs under torch.func.
    """
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        raise ValueError(
            "regularize: got a pass under torch.func, allowed: autograd; or sphere_rl.regularize inside it"
        )
    if not outputs:
        return list(leaves)
    captured.phi()
    for name, (_, _, recorded) in captured.outputs.items():
        if not recorded:
            why = "allowed: with gradients (checkpoints with use_reentrant=False)"
            raise ValueError(f"regularize: '{name}' ran without gradients in a pass with gradients, {why}")
    sources = captured.tensors()
    if not sources:  # frozen
        return list(leaves)
    joined = iter(_Joint.apply(options, captured, len(outputs), *outputs, *sources))  # type: ignore[arg-type]
    return [next(joined) if any(leaf is output for output in outputs) else leaf for leaf in leaves]


class _Joint(torch.autograd.Function):
    """y, o ↦ y. Its gradient for o is the penalty's part alone: that of the loss comes by the network's own path."""

    @staticmethod
    def forward(ctx: Any, options: Amount, captured: Captured, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.options, ctx.captured = options, captured
        ctx.outputs, ctx.sources = tensors[:count], tensors[count:]
        return tuple(tensor.clone() for tensor in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        added = _added(ctx.options, ctx.captured, ctx.outputs, ctx.sources, [given.detach() for given in incoming])
        if torch.is_grad_enabled():  # by way of the sources, so that no second derivative passes it by
            where = [i for i, one in enumerate(added) if one is not None]
            marked = once(*(one for one in added if one is not None), *ctx.sources)
            for i, one in zip(where, marked, strict=False):
                added[i] = one
        return None, None, None, *incoming, *added


def _added(
    options: Amount,
    captured: Captured,
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    incoming: Sequence[Tensor],
) -> list[Tensor | None]:
    """What each source gets; None for one that Φ does not depend on, which counts in no norm."""
    with torch.enable_grad(), torch.autocast(sources[0].device.type, enabled=False):
        copied, leaves = captured.in_float32(sources)
        phi = copied.phi()
        if not phi.requires_grad:
            return [None] * len(sources)
        found = feature_gradient(options, phi.detach())
        own = torch.autograd.grad(phi, leaves, found, allow_unused=True)
    used = [source for source, gradient in zip(sources, own, strict=True) if gradient is not None]
    reached = [torch.zeros_like(source) for source in used]
    if options.rho is not None:
        found = torch.autograd.grad(outputs, used, incoming, allow_unused=True, retain_graph=True)
        reached = [zero if one is None else one for zero, one in zip(reached, found, strict=True)]
    added = iter(share(options, reached, [gradient for gradient in own if gradient is not None]))
    return [
        None if gradient is None else next(added).to(source.dtype)
        for source, gradient in zip(sources, own, strict=True)
    ]
