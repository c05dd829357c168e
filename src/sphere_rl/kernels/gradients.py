"""Gradients of expert tensors [E, …] that cost what the experts with samples cost.

Most experts see no sample of a minibatch, so most of a gradient is zero. A `GradientStore` keeps the tensors of one
backward pass for the next one: only the experts that had samples are written, and only those that had some before and
have none now are zeroed. Every tensor is a whole gradient, zeros included; whoever knows this module may skip the
zeros (`pieces`, `active_experts`), whoever does not needs to know nothing.

A tensor that others have changed in place since (by autograd's version counter) counts as non-zero everywhere.

What is known of a gradient is an attribute of its tensor, and the store of a backward pass is one of the thread that
runs it, because autograd stands between who asks and who answers, and passes neither on. Both are safe to be without:
of a tensor without the attribute nothing is known, and a pass on another thread makes tensors of its own. Stores find
their memory by a weight's address; if another weight of that shape has come there, it gets that memory, zeroed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import local

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class _Kept:
    """A gradient tensor of the store, the experts that may be non-zero in it, and its version when that was true."""

    tensor: Tensor
    active: tuple[int, ...]
    version: int

    @property
    def untouched(self) -> bool:
        """Whether nobody else has changed it."""
        return self.tensor._version == self.version


class _Present(local):
    """The store of the backward pass that this thread is in."""

    store: GradientStore | None = None


_present = _Present()


class GradientStore:
    """The gradient tensors of one kind of backward pass; the next pass overwrites what this one returned."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}
        self._given: set[int] = set()

    def differentiate(self, loss: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
        """∂loss/∂parameters, as `torch.autograd.grad` gives them; zero where the loss does not depend on one."""
        before, _present.store = _present.store, self
        self._given.clear()
        try:
            return list(torch.autograd.grad(loss, parameters, retain_graph=retain_graph, materialize_grads=True))
        finally:
            _present.store = before

    def _tensor_for(self, weight: Tensor, active: tuple[int, ...]) -> Tensor | None:
        """A tensor that is zero but for the active experts' parts, or None where this pass already has used it."""
        address = weight.data_ptr()
        if address in self._given:
            return None
        self._given.add(address)
        kept = self._kept.get(address)
        if kept is None or kept.tensor.shape != weight.shape or kept.tensor.dtype != weight.dtype:
            kept = self._kept[address] = _Kept(torch.zeros_like(weight, requires_grad=False), (), 0)
            kept.tensor.kept = kept  # type: ignore[attr-defined]  # found again by `_kept_of`
        before = kept.active if kept.untouched else range(len(weight))
        for expert in set(before).difference(active):
            kept.tensor[expert].zero_()
        kept.active = active
        return kept.tensor


def expert_gradient(weight: Float[Tensor, "E *s"], counts: Sequence[int]) -> Float[Tensor, "E *s"]:
    """Memory for a weight's gradient, zero for experts without samples; the rest must be written by the caller.

    `written` must be called after that.
    """
    active = tuple(e for e, count in enumerate(counts) if count)
    store = _present.store
    tensor = None if store is None else store._tensor_for(weight, active)
    if tensor is None:
        tensor = torch.empty_like(weight)
        for expert, count in enumerate(counts):
            if not count:
                tensor[expert].zero_()
    return tensor


def written(gradient: Tensor) -> None:
    """The active experts' parts have been changed, and nothing else."""
    kept = _kept_of(gradient)
    if kept is not None:
        kept.version = gradient._version


def active_experts(gradient: Tensor) -> tuple[int, ...] | None:
    """The experts outside which the gradient is known to be zero; ``None`` where nothing is known."""
    kept = _kept_of(gradient)
    return kept.active if kept is not None and kept.untouched else None


def pieces(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Views that hold all parts that may be non-zero; many small ones would cost more than their zeros."""
    views: list[Tensor] = []
    for gradient in gradients:
        active = active_experts(gradient)
        if active is None or 2 * len(active) > len(gradient):
            views.append(gradient)
        else:
            parts = gradient.unbind(0)
            views += [parts[expert] for expert in active]
    return views


def total_norm(gradients: Sequence[Tensor]) -> Float[Tensor, ""]:
    """‖·‖₂ of all gradients as one vector."""
    return torch.nn.utils.get_total_norm(pieces(gradients), foreach=True)


def scale_(gradients: Sequence[Tensor], factor: Float[Tensor, ""]) -> None:
    """Multiply all gradients in place."""
    views = pieces(gradients)
    known = [gradient for gradient in gradients if active_experts(gradient) is not None]
    torch._foreach_mul_(views, factor)  # type: ignore[reportPrivateImportUsage]
    for gradient in known:
        written(gradient)


def add_scaled_(gradients: Sequence[Tensor], others: Sequence[Tensor], factor: Float[Tensor, ""]) -> None:
    """gradients += factor · others, in place."""
    for gradient, other in zip(gradients, others, strict=True):
        active = active_experts(gradient)
        if active is None or active != active_experts(other):
            gradient.addcmul_(other, factor)
            continue
        for own, added in zip(pieces([gradient]), pieces([other]), strict=True):
            own.addcmul_(added, factor)
        written(gradient)


def _kept_of(gradient: Tensor) -> _Kept | None:
    return getattr(gradient, "kept", None)
