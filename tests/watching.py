"""What hidden layers compute before their activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from sphere_rl.experts.layers import ExpertMLP


@contextmanager
def linear_outputs(*stacks: ExpertMLP) -> Iterator[list[Tensor]]:
    """After one forward pass inside: the output of each hidden layer of each stack, in this order."""
    layers = [layer for stack in stacks for layer in stack.hidden]
    outputs: dict[int, Tensor] = {}
    ordered: list[Tensor] = []

    def record(index: int, _layer: nn.Module, _args: object, output: Tensor) -> None:
        outputs[index] = output

    handles = [layer.register_forward_hook(partial(record, i)) for i, layer in enumerate(layers)]
    try:
        yield ordered
    finally:
        ordered += [outputs[i] for i in range(len(layers))]
        for handle in handles:
            handle.remove()
