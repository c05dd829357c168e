"""Adam that leaves resting experts alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphere_rl.chain import begin, scripted
from sphere_rl.gradients import active_experts, written
from sphere_rl.lanes import halves, lanes

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

    def share(self, lanes: int) -> list[AdamStep]:
        """As many steps, about equal in work."""
        if lanes == 1:
            return [self]
        shares = halves(zip(*self[:5], strict=True), lambda entry: entry[0].numel())
        return [_adam_step(entries, *self[5:]) for entries in shares if entries]


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
        self._zeros: dict[torch.Size, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that the parameters carry."""
        known = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        known = [gradient for gradient in known if active_experts(gradient) is not None]
        for due in self.due():
            mine, *others = due.share(lanes())
            waits = [begin(adam_step, _start, p, self.grad_scale) for p in others]
            adam_step(mine, self.grad_scale)
            for wait in waits:
                wait()
        for gradient in known:
            written(gradient)

    def due(self, elsewhere: Mapping[Tensor, Collection[int]] | None = None) -> list[AdamStep]:
        """Count a step, and say what `adam_step` must do for it: an entry for each group of parameters.

        ``elsewhere``: of these weights, the only experts whose gradient is not zero; the caller moves them.
        """
        steps = []
        for group in self.param_groups:
            entries, counters = [], []
            for parameter in group["params"]:
                if elsewhere is not None and parameter in elsewhere:
                    entries += self._without(parameter, elsewhere[parameter], group["betas"][1])
                elif parameter.grad is not None:
                    entries += self._entries(parameter, group["betas"][1])
                else:
                    continue
                counters.append(self.state[parameter]["step"])
            if counters:
                torch._foreach_add_(counters, 1)  # type: ignore[reportPrivateImportUsage]
                steps.append(_adam_step(entries, group["lr"], *group["betas"], group["eps"]))
        return steps

    def _entries(self, parameter: Tensor, beta2: float) -> list[Entry]:
        """(parameter, gradient, moments, step) of a whole tensor or of each of its experts that does not rest."""
        assert parameter.grad is not None
        state = self.state_of(parameter)
        tensors = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        active = active_experts(parameter.grad)
        if active is None and "idle" not in state:
            return [(*tensors, state["step"])]
        awake = self._awake(state, range(len(parameter)) if active is None else active, beta2)
        if len(awake) == len(parameter):
            return [(*tensors, state["step"])]
        parts, gradients = self.experts_of(parameter), parameter.grad.unbind(0)
        return [(parts[e][0], gradients[e], *parts[e][1:], state["step"]) for e in awake]

    def _without(self, parameter: Tensor, active: Collection[int], beta2: float) -> list[Entry]:
        """The entries of the other experts that do not rest; their gradients are zero."""
        state = self.state_of(parameter)
        idle = [e for e in self._awake(state, active, beta2) if e not in active]
        if not idle:
            return []
        shape, parts = parameter.shape[1:], self.experts_of(parameter)
        if shape not in self._zeros:
            with torch.inference_mode(False):
                self._zeros[shape] = parameter.new_zeros(shape)
        return [(parts[e][0], self._zeros[shape], *parts[e][1:], state["step"]) for e in idle]

    def experts_of(self, parameter: Tensor) -> list[Entry]:
        """(parameter, first moment, second moment) of each expert: views, made again when one of them has moved."""
        state = self.state_of(parameter)
        tensors = parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
        addresses = [tensor.data_ptr() for tensor in tensors]
        if parameter not in self._views or self._views[parameter][0] != addresses:
            self._views[parameter] = addresses, list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))
        return self._views[parameter][1]

    @staticmethod
    def _awake(state: dict[str, Any], active: Collection[int], beta2: float) -> list[int]:
        """Count each expert's steps without gradient, in `idle`; the experts that this step concerns."""
        if "idle" not in state:
            state["idle"] = [0 if state["step"] else REST] * len(state["exp_avg"])
        idle: list[int] = state["idle"]
        for expert, steps in enumerate(idle):
            if expert not in active:
                idle[expert] += 1
                if idle[expert] == REST:
                    state["exp_avg"][expert].zero_()
            elif steps:
                if steps >= REST:
                    state["exp_avg_sq"][expert].mul_(beta2 ** (steps - REST + 1))
                idle[expert] = 0
        return [expert for expert, steps in enumerate(idle) if steps < REST]

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """Adam's moments and step count of a parameter, made where there are none."""
        state = self.state[parameter]
        if not state:
            with torch.inference_mode(False), torch.no_grad():
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
