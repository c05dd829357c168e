"""Adam that leaves resting experts alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sphere_rl.gradients import active_experts, written
from sphere_rl.lanes import beside, halves, lanes

REST = 1000
"""Minibatches without a sample after which an expert rests. By then 0.9^1000 < 1e-45 of its first moment is left."""


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
        self._views: dict[Tensor, tuple[list[int], list[tuple[Tensor, ...]]]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that the parameters carry."""
        for group in self.param_groups:
            beta2 = group["betas"][1]
            entries = [entry for p in group["params"] if p.grad is not None for entry in self._entries(p, beta2)]
            if not entries:
                continue
            counters = [self.state[parameter]["step"] for parameter in group["params"] if parameter.grad is not None]
            torch._foreach_add_(counters, 1)  # type: ignore[reportPrivateImportUsage]
            known = [p.grad for p in group["params"] if p.grad is not None and active_experts(p.grad) is not None]
            first, second = halves(entries, lambda entry: entry[0].numel()) if lanes() > 1 else (entries, [])
            other = beside(partial(self._fused, second, group)) if second else None
            self._fused(first, group)
            if other is not None:
                other()
            for gradient in known:
                written(gradient)

    def _fused(self, entries: list[tuple[Tensor, ...]], group: dict[str, Any]) -> None:
        parameters, gradients, first, second, steps = map(list, zip(*entries, strict=True))
        with torch.no_grad():  # a thread's own setting
            torch._fused_adam_(  # type: ignore[reportPrivateImportUsage]
                parameters, gradients, first, second, [], steps,
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=0.0, eps=group["eps"],
                amsgrad=False, maximize=False, grad_scale=self.grad_scale,
            )  # fmt: skip

    def _entries(self, parameter: Tensor, beta2: float) -> list[tuple[Tensor, ...]]:
        """(parameter, gradient, moments, step) of a whole tensor or of each of its experts that does not rest."""
        assert parameter.grad is not None
        state = self._state_of(parameter)
        tensors = (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        active = active_experts(parameter.grad)
        if active is None and "idle" not in state:
            return [(*tensors, state["step"])]
        if "idle" not in state:
            state["idle"] = [0 if state["step"] else REST] * len(parameter)
        idle: list[int] = state["idle"]
        awake = [e for e in range(len(idle)) if self._awake(state, idle, e, beta2, active is None or e in active)]
        if len(awake) == len(idle):
            return [(*tensors, state["step"])]
        parts = self._experts_of(parameter, tensors)
        return [(*parts[e], state["step"]) for e in awake]

    def _experts_of(self, parameter: Tensor, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Each expert's part of these tensors: views, made again only when one of them has moved."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        if parameter not in self._views or self._views[parameter][0] != addresses:
            self._views[parameter] = addresses, list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))
        return self._views[parameter][1]

    @staticmethod
    def _awake(state: dict[str, Any], idle: list[int], expert: int, beta2: float, active: bool) -> bool:
        """Count the expert's steps without gradient, in `idle`; whether this step concerns it."""
        if not active:
            idle[expert] += 1
            if idle[expert] == REST:
                state["exp_avg"][expert].zero_()
            return idle[expert] < REST
        missed = idle[expert] - REST + 1
        if missed > 0:
            state["exp_avg_sq"][expert].mul_(beta2**missed)
        idle[expert] = 0
        return True

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state
