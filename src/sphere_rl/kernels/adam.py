"""Adam's arithmetic on lists of tensors, and which experts rest."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.script import scriptable, scripted
from sphere_rl.kernels.threads import halves

REST = 1000
"""Minibatches without a sample after which an expert rests. By then 0.9^1000 < 1e-45 of its first moment is left."""

Entry = tuple[Tensor, ...]
"""(parameter, gradient, first moment, second moment, step) of a tensor or of one expert of it."""


class AdamStep(NamedTuple):
    """One step of tensors and experts that do not rest."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]
    rate: float
    beta1: float
    beta2: float
    eps: float

    def share(self, lanes: int) -> "list[AdamStep]":
        """As many steps, about equal in work."""
        if lanes == 1:
            return [self]
        entries = list(zip(*self[:5], strict=True))
        shares = halves([parameter.numel() for parameter in self.parameters])
        return [step_of([entries[position] for position in share], *self[5:]) for share in shares if share]


def step_of(entries: Sequence[Entry], *numbers: float) -> AdamStep:
    """One step of these entries, with learning rate, β₁, β₂ and ε."""
    parameters, gradients, first, second, steps = map(list, zip(*entries, strict=True))
    return AdamStep(parameters, gradients, first, second, steps, *numbers)


@scripted
def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """What to divide gradients of this norm by so that none is longer than ``max_norm``."""
    return ((norm + 1e-6) / max_norm).clamp(min=1.0)


@scripted
def adam_step(p: AdamStep, grad_scale: Tensor | None) -> None:
    """Adam's arithmetic; gradients are divided by ``grad_scale`` in place."""
    torch._fused_adam_(  # type: ignore[reportPrivateImportUsage]
        p.parameters, p.gradients, p.first, p.second, [], p.steps,
        lr=p.rate, beta1=p.beta1, beta2=p.beta2, weight_decay=0.0, eps=p.eps,
        amsgrad=False, maximize=False, grad_scale=grad_scale,
    )  # fmt: skip


@scripted
def count_step(counters: list[Tensor]) -> None:
    """Add one to Adam's step counts."""
    torch._foreach_add_(counters, torch.ones_like(counters[0]), alpha=1.0)  # type: ignore[reportPrivateImportUsage]


@scriptable
def idle_experts(
    idle: list[list[int]],
    counts: list[int],
    first: list[list[Tensor]],
    second: list[list[Tensor]],
    beta2: float,
    rest: int = REST,
) -> list[int]:
    """Experts without rows that do not rest: Adam still moves them.

    ``idle[layer][expert]`` are the steps without rows that were before this one; they are brought up to date, and so
    are the moments ``[expert][layer]`` of who goes to rest or wakes up. Layers of an expert rest together.
    """
    found: list[int] = []
    for expert, count in enumerate(counts):
        awake = False
        for layer, own in enumerate(idle):
            steps = own[expert]
            awake = awake or steps + 1 < rest
            if count > 0 and steps >= rest:
                second[expert][layer].mul_(beta2 ** (steps - rest + 1))
        for layer, own in enumerate(idle):
            if count > 0:
                own[expert] = 0
            elif awake:
                own[expert] = max(own[expert], min(own[expert] + 1, rest - 1))
            else:
                own[expert] += 1
                if own[expert] == rest:
                    first[expert][layer].zero_()
        if awake and count == 0:
            found.append(expert)
    return found


@scripted
def start_adam_step(p: AdamStep, grad_scale: Tensor | None) -> torch.jit.Future[None]:
    """Begin `adam_step` on another thread."""
    return torch.jit.fork(adam_step, p, grad_scale)  # type: ignore[reportReturnType]
