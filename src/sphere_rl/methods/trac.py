"""TRAC: a parameter-free scale on how far training has moved from its start.

θ = θ_ref + max(Σ_j s_j, 0)·Δ, where Δ adds up Adam's steps and s_j, one for each discount β_j, grows while the moves
away from θ_ref keep being good: with h = ⟨g, Δ⟩, v_j ← β_j² v_j + h², σ_j ← β_j σ_j − h and
s_j = s₀ erfi(σ_j/(√(2 v_j) + ε))/erfi(1/√2).
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

    reference: θ_ref, a tensor a parameter.
    """

    def __init__(self, parameters: Sequence[Tensor], tuner: TracConfig, *, lr: float, eps: float) -> None:
        super().__init__(parameters, lr=lr, eps=eps, fused=True)
        self._parameters, self._tuner = list(parameters), tuner
        self.reference = [p.detach().clone() for p in parameters]
        size = len(tuner.betas)
        # The scalars are float64 on the CPU: one number a step comes back from the device.
        self._s, self._variance, self._sigma = np.zeros(size), np.zeros(size), np.full(size, tuner.eps)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take Adam's step from θ, then rescale the whole way from θ_ref."""
        before = [p.clone() for p in self._parameters]
        self._follow_replacements()
        gradients = [p.grad for p in self._parameters if p.grad is not None]  # all have one
        super().step(closure)
        scale = self._s.sum() + self._tuner.eps
        moved = [(b - ref) / scale for b, ref in zip(before, self.reference, strict=True)]
        self._tune(float(torch.stack([(d * g).sum() for d, g in zip(moved, gradients, strict=True)]).sum()))
        scale = max(float(self._s.sum()), 0.0)
        for p, b, d, ref in zip(self._parameters, before, moved, self.reference, strict=True):
            p.copy_(ref + scale * (d + (p - b)))

    def _follow_replacements(self) -> None:
        """A tensor that a method has replaced, so that Adam counts its steps from zero again, is its own new start."""
        if self.state:
            counts = torch.stack([self.state[p]["step"] for p in self._parameters]).tolist()
            for p, reference, count in zip(self._parameters, self.reference, counts, strict=True):
                if count == 0:
                    reference.copy_(p)

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
        return {**super().state_dict(), "tuner": tuner, "reference": self.reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        adam = {key: value for key, value in state_dict.items() if key not in ("tuner", "reference")}
        super().load_state_dict(adam)
        tuner = {key: value.numpy().copy() for key, value in state_dict["tuner"].items()}
        self._s, self._variance, self._sigma = tuner["s"], tuner["variance"], tuner["sigma"]
        for mine, theirs in zip(self.reference, state_dict["reference"], strict=True):
            mine.copy_(theirs)
