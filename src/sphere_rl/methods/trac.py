"""TRAC: a parameter-free scale on how far training has moved from its start.

θ = θ_ref + max(Σ_j s_j, 0)·Δ, where Δ adds up Adam's steps and s_j, one for each discount β_j, grows while the moves
away from θ_ref keep being good: with h = ⟨g, Δ⟩, v_j ← β_j² v_j + h², σ_j ← β_j σ_j − h and
s_j = s₀ erfi(σ_j/(√(2 v_j) + ε))/erfi(1/√2).

Δ is kept. Its authors' package divides it out of θ, where it is lost to round-off while the scale is tiny and for good
once Σ_j s_j is not above 0: there h stays 0, and a policy whose first h was positive never leaves its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.learner.actor_critic import Settings
from sphere_rl.methods import Method, MethodConfig


@dataclass(frozen=True)
class TracConfig(MethodConfig):
    """The tuner's constants; none needs tuning."""

    betas: tuple[float, ...] = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)
    """Discounts β_j."""
    s0: float = 1e-8
    """s₀, the initial scale."""
    eps: float = 1e-8
    """ε, against division by zero; also the initial σ."""

    def __post_init__(self) -> None:
        if not self.betas or not all(0 <= beta <= 1 for beta in self.betas):
            raise ConfigError("trac.betas", self.betas, "one or more numbers from 0 to 1")
        for name in ("s0", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"trac.{name}", getattr(self, name), "a finite number above 0")


class Trac(Method):
    """Adam within the tuner, for actor and critic each on its own; the learning-rate schedule acts on Adam."""

    summary = "Adam within a parameter-free tuner of the distance from the initial parameters"
    citation = "Muppidi et al. 2024, Fast TRAC: A Parameter-Free Optimizer for Lifelong RL (NeurIPS)"
    Config = TracConfig

    def make_optimizer(self, parameters: Sequence[Tensor], config: Settings) -> torch.optim.Optimizer:
        """Adam's settings, within the tuner."""
        return TracAdam(parameters, self.config, lr=config.learning_rate, eps=config.adam_eps)


class TracAdam(torch.optim.Adam):
    """Adam whose steps are added up to Δ and scaled; all its parameters share one scale.

    reference: θ_ref, a tensor a parameter. moved: Δ, likewise.
    """

    def __init__(self, parameters: Sequence[Tensor], tuner: TracConfig, *, lr: float, eps: float) -> None:
        super().__init__(parameters, lr=lr, eps=eps, fused=True)
        self._parameters, self._tuner = list(parameters), tuner
        self.reference = [p.detach().clone() for p in parameters]
        self.moved = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        size = len(tuner.betas)
        # The scalars are float64 on the CPU: one number a step comes back from the device.
        self._s, self._variance, self._sigma = np.zeros(size), np.zeros(size), np.full(size, tuner.eps)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take Adam's step from θ, then rescale the whole way from θ_ref."""
        self._follow_changes()
        before = [p.clone() for p in self._parameters]
        gradients = [p.grad for p in self._parameters if p.grad is not None]  # all have one
        super().step(closure)
        self._tune(float(torch.stack([(d * g).sum() for d, g in zip(self.moved, gradients, strict=True)]).sum()))
        for p, b, moved in zip(self._parameters, before, self.moved, strict=True):
            moved.add_(p - b)
        for p, place in zip(self._parameters, self._places(), strict=True):
            p.copy_(place)

    def _places(self) -> list[Tensor]:
        """Where the tuner has put the parameters: θ_ref + max(Σs, 0)·Δ."""
        scale = max(float(self._s.sum()), 0.0)
        return [reference + scale * moved for reference, moved in zip(self.reference, self.moved, strict=True)]

    def _follow_changes(self) -> None:
        """What others have changed since the last step is no move of Adam's: θ_ref moves along, and Δ stays.

        A tensor that a method has replaced, so that Adam counts its steps from zero again, is its own new start.
        """
        if not self.state:
            return
        counts = torch.stack([self.state[p]["step"] for p in self._parameters]).tolist()
        kept = zip(self._parameters, self.reference, self.moved, self._places(), counts, strict=True)
        for p, reference, moved, place, count in kept:
            if count == 0:
                reference.copy_(p)
                moved.zero_()
            else:
                reference.add_(p - place)

    def _tune(self, h: float) -> None:
        from scipy.special import erfi  # takes a tenth of a second to import

        betas, tuner = np.array(self._tuner.betas), self._tuner
        self._variance = betas**2 * self._variance + h**2
        self._sigma = betas * self._sigma - h
        ratio = self._sigma / (np.sqrt(2 * self._variance) + tuner.eps)
        self._s = tuner.s0 * erfi(ratio) / erfi(2**-0.5)

    def state_dict(self) -> dict[str, Any]:
        """Adam's state and the tuner's."""
        scalars = {"s": self._s, "variance": self._variance, "sigma": self._sigma}
        tuner = {key: torch.from_numpy(value.copy()) for key, value in scalars.items()}
        return {**super().state_dict(), "tuner": tuner, "reference": self.reference, "moved": self.moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        adam = {key: value for key, value in state_dict.items() if key not in ("tuner", "reference", "moved")}
        super().load_state_dict(adam)
        tuner = {key: value.numpy().copy() for key, value in state_dict["tuner"].items()}
        self._s, self._variance, self._sigma = tuner["s"], tuner["variance"], tuner["sigma"]
        scale = max(float(self._s.sum()), 0.0) + self._tuner.eps
        for i, p in enumerate(self._parameters):
            self.reference[i].copy_(state_dict["reference"][i])
            if "moved" in state_dict:
                self.moved[i].copy_(state_dict["moved"][i])
            else:  # of an earlier version, which had it from θ alone
                self.moved[i].copy_((p.detach() - self.reference[i]) / scale)
