"""Shrink: of the literal penalty in mode loss the part that makes features small, without the part that turns them.

    PYTHONPATH=benchmarks sphere sweep --config benchmarks/shrink.toml --jobs 2 --out runs/shrink

In mode ``loss`` the literal penalty P adds ρ·|L_actor| · ∇log P to the gradient, and P is (tr A)² times the scale-free
one, so

    ∇log P = ∇log ‖A/tr A − I/m‖_F² + 2 ∇log tr A.

The first term is scale-free SPHERE in mode ``loss``; this plugin is the second one alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sphere_rl.learner.feature_penalty import share_of_loss
from sphere_rl.methods import ActorStep, Method, MethodConfig


@dataclass(frozen=True)
class ShrinkConfig(MethodConfig):
    """How strong."""

    rho: float = 0.05
    """Share of the actor's loss that the penalty gets."""


class Shrink(Method):
    """The penalty (tr A)², A the Gram of the weighted last hidden features, at ρ·|L_actor| over itself."""

    summary = "make the last hidden features small, as the literal penalty does, without turning them"
    citation = "benchmarks/shrink.py"
    Config = ShrinkConfig

    def actor_penalty(self, step: ActorStep) -> Tensor:
        """λ (tr A)², λ = ρ·|L_actor| / ((tr A)² + 1e-8)."""
        size = step.trace.features[-1].weighted().square().sum(1).mean().square()
        return share_of_loss(self.config.rho, step.loss.detach(), size.detach()) * size
