"""Adam that leaves resting experts alone."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from sphere_rl.kernels.adam import REST, Entry, adam_step, count_step, idle_experts, start_adam_step, step_of
from sphere_rl.kernels.gradients import active_experts, written
from sphere_rl.kernels.threads import begin, lanes

Made = TypeVar("Made")


class ExpertAdam(torch.optim.Adam):
    """Adam (Kingma & Ba 2015) with the arithmetic of `torch.optim.Adam`, over expert tensors [E, out, in].

    An expert whose gradient has been exactly zero for `REST` steps, or always, has no first moment left: Adam would not
    move it. It is passed over, and when it has samples again its second moment is first multiplied by β₂ for each step
    that was passed over, so that it goes on where Adam would.

    Views of parameters and moments are kept with the addresses that they were made of. They hold that memory
    themselves, so that no other tensor can come to these addresses while they are compared.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, eps: float) -> None:
        super().__init__(parameters, lr=lr, eps=eps, fused=True)
        self._views: dict[Tensor, tuple[list[int], list[Entry]]] = {}
        self._kept: tuple[list[int], Any] | None = None

    @torch.no_grad()
    def step(self, closure: None = None, *, grad_scale: Tensor | None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients that the parameters carry, which are first divided by ``grad_scale``."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            known = [p.grad for p in parameters if active_experts(p.grad) is not None]
            entries = [entry for p in parameters for entry in self._entries(p, group["betas"][1])]
            count_step([self.state[p]["step"] for p in parameters])
            mine, *others = step_of(entries, *self.numbers(group)).share(lanes())
            waits = [begin(adam_step, start_adam_step, p, grad_scale) for p in others]
            adam_step(mine, grad_scale)
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
        idle = idle_experts([self.idle_steps(parameter)], counts, first, second, beta2)
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
