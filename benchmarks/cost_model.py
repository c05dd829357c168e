"""The least time that one learner minibatch can take here: its arithmetic and its bytes at measured rates.

Arithmetic: every sample passes the gate and the critic, every assignment one expert; a backward pass is twice the
forward pass but for the first layer's input gradient. Bytes: for each parameter a gradient is written (4 B), read for
the norm (4 B), scaled (8 B) and Adam reads four numbers and writes three (28 B), selected or not.
"""

from __future__ import annotations

import torch
from measure import interleaved

BYTES_PER_PARAMETER = 4 + 4 + 8 + 28


def mlp_parameters(inputs: int, width: int, outputs: int, depth: int = 3) -> int:
    """Weights of one MLP; biases are left out of the model."""
    return inputs * width + (depth - 1) * width**2 + width * outputs


def minibatch_work(
    batch: int, observations: int, actions: int, width: int, experts: int, top_k: int
) -> tuple[float, float]:
    """FLOPs and bytes of one minibatch; experts = 0 is a plain MLP."""
    actor = mlp_parameters(observations, width, actions)
    gate = mlp_parameters(observations, width, experts) if experts else 0
    critic = mlp_parameters(observations, width, 1)
    rows = [(gate, batch), (actor, batch * top_k if experts else batch), (critic, batch)]
    flops = sum(n * (6 * weights - 2 * observations * width) for weights, n in rows if weights)
    return flops, BYTES_PER_PARAMETER * (gate + max(experts, 1) * actor + critic)


def rates(clock: str = "wall") -> tuple[float, float]:
    """FLOP/s of a 256×256×256 product and bytes/s of a copy of 8 MB."""
    a, b, out = (torch.randn(256, 256) for _ in range(3))
    source, target = torch.randn(2_000_000), torch.randn(2_000_000)

    def product() -> None:
        torch.mm(a, b, out=out)

    def copy() -> None:
        target.copy_(source)

    times = interleaved({"product": product, "copy": copy}, 15, 20, clock)
    return 2 * 256**3 / times["product"] * 1e3, 2 * 4 * len(source) / times["copy"] * 1e3


def floor_milliseconds(work: tuple[float, float], rate: tuple[float, float]) -> float:
    """Arithmetic and bytes one after the other."""
    return (work[0] / rate[0] + work[1] / rate[1]) * 1e3
