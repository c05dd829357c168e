"""`sphere_rl.regularize` of PyTorch tensors: an operation of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sphere_rl.integrations.gradient_share import SECOND_DERIVATIVE, Amount, gradients_of, with_share
from sphere_rl.measuring import measuring
from sphere_rl.penalty import Scale


def identity(options: Amount, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors; in the backward pass `with_share`."""
    if not torch.is_grad_enabled() or measuring():
        return tensors
    return _Identity.apply(*options, *tensors)  # type: ignore[return-value]


class _Identity(torch.autograd.Function):
    """Copies, so that a layer behind may work in place on what this one gave it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rho: float | None, strength: float | None, scale: Scale, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        options, tensors = Amount(*ctx.options), ctx.saved_tensors
        with torch.autocast(tensors[0].device.type, enabled=False):
            found = with_share(options, incoming, gradients_of(options, *tensors))
        return None, None, None, *(once(*found) if torch.is_grad_enabled() else found)


def once(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors; a derivative of theirs is refused in one line."""
    return _Once.apply(*tensors)  # type: ignore[return-value]


class _Once(torch.autograd.Function):
    """Gradients that must not be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        raise NotImplementedError(SECOND_DERIVATIVE)
