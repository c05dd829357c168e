"""Adam that leaves resting experts alone."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sphere_rl.chain import begin
from sphere_rl.gradients import active_experts, written
from sphere_rl.lanes import halves, lanes
from sphere_rl.scripting import scriptable, scripted

Made = TypeVar("Made")

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
        return [_adam_step([entries[position] for position in share], *self[5:]) for share in shares if share]


def _adam_step(entries: Sequence[Entry], *numbers: float) -> AdamStep:
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
    rest: int,
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
def _start(p: AdamStep, grad_scale: Tensor | None) -> torch.jit.Future[None]:
    return torch.jit.fork(adam_step, p, grad_scale)  # type: ignore[reportReturnType]


class ExpertAdam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015) with the arithmetic of `torch.optim.Adam`, over expert tensors [E, out, in].

    An expert whose gradient has been exactly zero for `REST` steps, or always, has no first moment left: Adam would not
    move it. It is passed over, and when it has samples again its second moment is first multiplied by β₂ for each step
    that was passed over, so that it goes on where Adam would.
    """

    grad_scale: Tensor | None = None
    """Gradients are divided by it in `step`, in place, as PyTorch's fused optimisers do for their loss scaling."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, eps: float) -> None:
        super().__init__(parameters, lr=lr, eps=eps, fused=True)
        self._views: dict[Tensor, tuple[list[int], list[Entry]]] = {}
        self._kept: tuple[list[int], Any] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that the parameters carry."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            known = [p.grad for p in parameters if active_experts(p.grad) is not None]
            entries = [entry for p in parameters for entry in self._entries(p, group["betas"][1])]
            count_step([self.state[p]["step"] for p in parameters])
            mine, *others = _adam_step(entries, *self.numbers(group)).share(lanes())
            waits = [begin(adam_step, _start, p, self.grad_scale) for p in others]
            adam_step(mine, self.grad_scale)
            for wait in waits:
                wait()
            for gradient in known:
                written(gradient)

    @staticmethod
    def numbers(group: dict[str, Any]) -> tuple[float, float, float, float]:
        """Learning rate, β₁, β₂ and ε of a group of parameters."""
        return group["lr"], *group["betas"], group["eps"]

    def _entries(self, parameter: Tensor, beta2: float) -> list[Entry]:
        """(parameter, gradient, moments, step) of a whole tensor or of each of its experts that does not rest."""
        assert parameter.grad is not None
        state = self.state_of(parameter)
        whole = [(parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"])]
        active = active_experts(parameter.grad)
        if active is None and "idle" not in state:
            return whole
        parts, experts = self.experts_of(parameter), range(len(parameter))
        counts = [int(active is None or expert in active) for expert in experts]
        first, second = ([[part[moment]] for part in parts] for moment in (1, 2))
        idle = idle_experts([self.idle_steps(parameter)], counts, first, second, beta2, REST)
        awake = [expert for expert in experts if counts[expert] or expert in idle]
        if len(awake) == len(parameter):
            return whole
        gradients = parameter.grad.unbind(0)
        return [(parts[e][0], gradients[e], *parts[e][1:], state["step"]) for e in awake]

    def experts_of(self, parameter: Tensor) -> list[Entry]:
        """(parameter, first moment, second moment) of each expert: views, made again when one of them has moved."""
        state = self.state_of(parameter)
        tensors = parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if parameter not in self._views or self._views[parameter][0] != addresses:
            self._views[parameter] = addresses, list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))
        return self._views[parameter][1]

    def idle_steps(self, parameter: Tensor) -> list[int]:
        """Each expert's steps without gradient, at least `REST` where it never had one."""
        state = self.state_of(parameter)
        return state.setdefault("idle", [0 if state["step"] else REST] * len(parameter))

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Adam's moments and step count of a parameter, made where there are none."""
        state = self.state[parameter]
        if not state:
            with torch.inference_mode(False), torch.no_grad():
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def kept(self, make: Callable[[], Made]) -> Made:
        """What ``make`` made of parameters and state; it is made again when one of them is no longer where it was."""
        if self._kept is None or self._kept[0] != self._whereabouts():
            made = make()
            self._kept = self._whereabouts(), made
        return self._kept[1]

    def _whereabouts(self) -> list[int]:
        parameters = [p.data_ptr() for group in self.param_groups for p in group["params"]]
        values = [value for state in self.state.values() for value in state.values()]
        return parameters + [v.data_ptr() if isinstance(v, Tensor) else id(v) for v in values]
