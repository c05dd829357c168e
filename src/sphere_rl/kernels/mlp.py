"""All layers of a grouped MLP as one differentiable operation that runs expert by expert.

The loops over experts and layers are TorchScript: no Python between the products, and half of the experts can go to a
second thread (`sphere_rl.kernels.threads`), which PyTorch's own threads are of no use for: they split a product, and
these are too small. Every product is the same in either thread, so results are bitwise those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sphere_rl.kernels.gradients import expert_gradient, written
from sphere_rl.kernels.routing import blocks_of
from sphere_rl.kernels.script import SCRIPTED, scriptable, scripted
from sphere_rl.kernels.threads import lanes, split_rows


def expert_chain(
    rows: Float[Tensor, "M in"],
    weights: Sequence[Float[Tensor, "E _ _"]],
    biases: Sequence[Float[Tensor, "E _"]],
    counts: Sequence[int],
) -> Sequence[Float[Tensor, "M _"]]:
    """Output of every layer for rows sorted by expert: h_1 … h_L after their ReLUs, then the last layer's W h_L + b.

    ``counts`` are each expert's rows; only experts that have some are computed. One output cannot be differentiated
    with respect to another: compute layer by layer where that is needed.
    """
    if is_unrecorded():
        return _outputs(rows, weights, biases, counts)
    if torch._C._are_functorch_transforms_active():
        return _composed(rows, weights, biases, counts)
    return _ExpertChain.apply(counts, rows, *weights, *biases)


def is_unrecorded() -> bool:
    """Whether operations are neither recorded for autograd nor transformed by `torch.func`."""
    return not (torch.is_grad_enabled() or torch._C._are_functorch_transforms_active())


class _ExpertChain(torch.autograd.Function):
    """`expert_chain` with its backward pass."""

    @staticmethod
    def forward(ctx: Any, counts: Sequence[int], rows: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        depth = len(parameters) // 2
        outputs = _outputs(rows, parameters[:depth], parameters[depth:], counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, *parameters, *outputs)
        ctx.counts, ctx.depth = counts, depth
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        counts, depth = ctx.counts, ctx.depth
        rows, *saved = ctx.saved_tensors
        weights, biases, outputs = saved[:depth], saved[depth : 2 * depth], saved[2 * depth :]
        top = max((layer for layer, grad in enumerate(grad_outputs, start=1) if grad is not None), default=0)
        if not top:
            return (None,) * (2 + 2 * depth)
        if torch.is_grad_enabled():  # create_graph: the gradient itself must be differentiable
            return None, *_composed_backward(rows, weights, biases, counts, grad_outputs)
        none = rows.new_empty(0)
        given = [none if grad is None else grad for grad in grad_outputs[:top]]
        grad_weights = [expert_gradient(weight, counts) for weight in weights[:top]]
        grad_biases = [torch.zeros_like(bias) for bias in biases[:top]]
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[1] else none
        passed = Backward(given, [rows, *outputs], weights, grad_weights, grad_biases, grad_rows)
        num_lanes = _lanes()
        _backward_blocks(*split_blocks(blocks_of(list(counts)), num_lanes), passed, num_lanes)
        for gradient in grad_weights:
            written(gradient)
        above = [None] * (depth - top)
        return None, grad_rows if ctx.needs_input_grad[1] else None, *grad_weights, *above, *grad_biases, *above


def _lanes() -> int:
    """Lanes for TorchScript, which is what forks."""
    return lanes() if SCRIPTED else 1


def _outputs(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    return chain_outputs(rows, list(weights), list(biases), blocks_of(list(counts)), _lanes())[1:]


@scriptable
def split_blocks(
    blocks: list[tuple[int, int, int]], num_lanes: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Blocks (expert, first row, end row) for this lane and the second."""
    mine, others = split_rows([end - start for _, start, end in blocks], num_lanes)
    return [blocks[position] for position in mine], [blocks[position] for position in others]


class Forward(NamedTuple):
    """What a forward pass reads and fills: outputs[0] are the rows, outputs[l] those of layer l."""

    outputs: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]


class Backward(NamedTuple):
    """What a backward pass reads and fills; given[l]: the gradient of layer l + 1's output, empty where zero."""

    given: list[Tensor]
    outputs: list[Tensor]
    weights: list[Tensor]
    grad_weights: list[Tensor]
    grad_biases: list[Tensor]
    grad_rows: Tensor


@scripted
def forward_some(blocks: list[tuple[int, int, int]], p: Forward) -> int:
    """Fill these blocks (expert, first row, end row): h_l = relu(W_l h_{l−1} + b_l), the last one without ReLU."""
    for expert, start, end in blocks:
        h = p.outputs[0][start:end]
        for layer in range(len(p.weights)):
            out = p.outputs[layer + 1][start:end]
            torch.addmm(p.biases[layer][expert], h, p.weights[layer][expert].t(), out=out)
            if layer < len(p.weights) - 1:
                out.relu_()
            h = out
    return 0


@scripted
def _weights_some(layer: int, block: tuple[int, int, int], grad: Tensor, p: Backward) -> int:
    """Fill the gradients of one expert's weights and bias from that of its layer's linear output."""
    expert, start, end = block
    torch.mm(grad.t(), p.outputs[layer][start:end], out=p.grad_weights[layer][expert])
    torch.sum(grad, [0], False, out=p.grad_biases[layer][expert])
    return 0


@scripted
def backward_some(blocks: list[tuple[int, int, int]], p: Backward, apart: bool = False) -> int:
    """Fill the gradients of these blocks; ``apart``: those of weights on another thread."""
    top = len(p.given)
    others: list[torch.jit.Future[int]] = []
    for expert, start, end in blocks:
        grad = p.given[top - 1][start:end]
        for back in range(top):
            layer = top - 1 - back
            if back > 0 and p.given[layer].numel() > 0:
                grad = grad + p.given[layer][start:end]
            if layer < len(p.weights) - 1:
                grad = torch.ops.aten.threshold_backward(grad, p.outputs[layer + 1][start:end], 0)
            if apart:
                others.append(torch.jit.fork(_weights_some, layer, (expert, start, end), grad, p))  # type: ignore[reportArgumentType]
            else:
                _weights_some(layer, (expert, start, end), grad, p)
            if layer > 0:
                grad = torch.mm(grad, p.weights[layer][expert])
            elif p.grad_rows.numel() > 0:
                torch.mm(grad, p.weights[layer][expert], out=p.grad_rows[start:end])
    for other in others:
        torch.jit.wait(other)
    return 0


@scripted
def forward_blocks(mine: list[tuple[int, int, int]], others: list[tuple[int, int, int]], p: Forward) -> None:
    """Fill all outputs, ``others`` on another thread."""
    if len(others) > 0:
        other = torch.jit.fork(forward_some, others, p)
        forward_some(mine, p)
        torch.jit.wait(other)
    else:
        forward_some(mine, p)


@scripted
def chain_outputs(
    rows: Tensor, weights: list[Tensor], biases: list[Tensor], blocks: list[tuple[int, int, int]], num_lanes: int
) -> list[Tensor]:
    """Rows sorted by expert and the output of each layer."""
    outputs = [rows]
    for bias in biases:
        outputs.append(rows.new_empty(rows.size(0), bias.size(1)))
    mine, others = split_blocks(blocks, num_lanes)
    forward_blocks(mine, others, Forward(outputs, weights, biases))
    return outputs


@scripted
def _backward_blocks(
    mine: list[tuple[int, int, int]], others: list[tuple[int, int, int]], p: Backward, lanes: int
) -> None:
    """Fill all gradients, ``others``, or the weights' of a single expert, on another thread."""
    if len(others) > 0:
        other = torch.jit.fork(backward_some, others, p)
        backward_some(mine, p)
        torch.jit.wait(other)
    else:
        backward_some(mine, p, lanes > 1)


def _composed(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`expert_chain` in operations that differentiate any number of times."""
    h, outputs = rows, []
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        parts = zip(h.split(list(counts)), weight, bias, strict=True)
        h = torch.cat([F.linear(h_e, w_e, b_e) for h_e, w_e, b_e in parts])
        h = h.relu() if layer < len(weights) else h
        outputs.append(h)
    return outputs


def _composed_backward(
    rows: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    counts: Sequence[int],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The backward pass in such operations."""
    outputs = _composed(rows, weights, biases, counts)
    known = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    inputs = [rows, *weights, *biases]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in known], wanted, [grad for _, grad in known], create_graph=True, allow_unused=True
        )
    )
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
