"""SPHERE: keep the spectrum of the routing-weighted expert features flat.

Adds the penalty ‖A − (tr A/m) I‖_F², A = ΦᵀΦ/N, to the actor's loss in one of three strengths: ``fixed`` λ; ``loss``,
λ = ρ·|L_actor| / (penalty + 1e-8); ``grad``, which adds ρ·‖g_ppo‖ / (‖g_penalty‖ + 1e-8) · g_penalty to the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.experts import RoutedFeatures
from sphere_rl.methods import ActorStep, Method, MethodConfig
from sphere_rl.networks import Trace
from sphere_rl.penalty import gate_penalty, sphere_penalty

EPSILON = 1e-8


@dataclass(frozen=True)
class SphereConfig(MethodConfig):
    """Strength and variants of the penalty."""

    mode: Literal["fixed", "loss", "grad"] = "grad"
    """How the strength is set: fixed λ, a share of the actor's loss, or a share of its gradient norm."""
    rho: float = 0.1
    """Share of the loss (mode loss) or of the gradient norm (mode grad) that the penalty gets."""
    strength: float = 1e-3
    """λ of mode fixed."""
    layers: Literal["last", "all"] = "last"
    """Hidden expert layers that are penalised."""
    grouping: Literal["joint", "per_expert"] = "joint"
    """One Gram over all experts, or the sum of each expert's own."""
    factor: Literal["feature", "gradient"] = "feature"
    """The Gram of weighted features, or that of back-propagated signals at the same layer."""
    gate_coefficient: float = 0.0
    """Weight of the same penalty on the routing matrix, added to the feature penalty."""
    pcgrad: bool = False
    """Mode grad: drop the part of the penalty's gradient that opposes the PPO gradient."""

    def __post_init__(self) -> None:
        for name in ("rho", "strength", "gate_coefficient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"sphere.{name}", getattr(self, name), "a finite number, 0 or more")
        if self.pcgrad and self.mode != "grad":
            raise ConfigError("sphere.pcgrad", self.pcgrad, f"False in mode {self.mode}: it acts on gradients")
        if self.factor == "gradient" and self.grouping == "per_expert":
            raise ConfigError("sphere.grouping", self.grouping, "joint with factor gradient")


class Sphere(Method):
    """The penalty, its strength and its ablations."""

    summary = "Parseval penalty on the Gram of routing-weighted expert features"
    citation = "Luo et al. 2026, SPHERE (ICML), arXiv 2605.04712"
    Config = SphereConfig

    def __init__(self, config: SphereConfig) -> None:
        super().__init__(config)
        self.config: SphereConfig = config
        self._metrics: dict[str, float | Tensor] = {}

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        """λ · penalty in the modes fixed and loss."""
        if self.config.mode == "grad":
            return None
        penalty = self.penalty(step.trace)
        strength = torch.as_tensor(self.config.strength, dtype=penalty.dtype, device=penalty.device)
        if self.config.mode == "loss":
            strength = self.config.rho * step.loss.detach().abs() / (penalty.detach() + EPSILON)
        self._metrics = {"sphere_penalty": penalty.detach(), "sphere_strength": strength}
        return strength * penalty

    @property
    def uses_actor_gradients(self) -> bool:
        """Only mode grad works on gradients."""
        return self.config.mode == "grad"

    def actor_gradients(self, step: ActorStep, gradients: list[Tensor]) -> list[Tensor]:
        """Mode grad: g ← g + ρ·‖g‖ / (‖g_penalty‖ + 1e-8) · g_penalty."""
        penalty = self.penalty(step.trace)
        own = list(torch.autograd.grad(penalty, step.parameters, materialize_grads=True))
        if self.config.pcgrad:
            own = project_conflict(own, gradients)
        scale = self.config.rho * global_norm(gradients) / (global_norm(own) + EPSILON)
        self._metrics = {"sphere_penalty": penalty.detach(), "sphere_strength": scale}
        # In place: both lists are this minibatch's own, and copies of the whole network cost a millisecond.
        return [g.addcmul_(s, scale) for g, s in zip(gradients, own, strict=True)]

    def penalty(self, trace: Trace) -> Tensor:
        """The penalty of one forward pass in the configured variant."""
        config = self.config
        layers = trace.features if config.layers == "all" else trace.features[-1:]
        if config.factor == "gradient":
            terms = [sphere_penalty(backpropagated_signals(trace, layer)) for layer in layers]
        elif config.grouping == "per_expert":
            terms = [layer.sphere_penalty_per_expert() for layer in layers]
        else:
            terms = [layer.sphere_penalty() for layer in layers]
        if config.gate_coefficient:
            terms.append(config.gate_coefficient * gate_penalty(trace.gates))
        return torch.stack(terms).sum()

    def metrics(self) -> dict[str, float | Tensor]:
        """Penalty and strength of the last minibatch."""
        return self._metrics


def backpropagated_signals(trace: Trace, layer: RoutedFeatures) -> Tensor:
    """Compute δ_e = ∂f_c/∂z_e (gate included), a row for each (output, sample), experts side by side: [A·N, E·H]."""
    rows = []
    for output in trace.output.unbind(1):
        (signal,) = torch.autograd.grad(output.sum(), layer.preactivation, create_graph=True)
        rows.append(replace(layer, values=signal).dense().flatten(1))
    return torch.cat(rows)


def global_norm(tensors: list[Tensor]) -> Tensor:
    """‖·‖₂ of all tensors as one vector."""
    return torch.nn.utils.get_total_norm(tensors, foreach=True)


def project_conflict(own: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """PCGrad (Yu et al. 2020): where ⟨own, other⟩ < 0, remove own's component along other."""
    dot = torch.stack([(a * b).sum() for a, b in zip(own, other, strict=True)]).sum()
    share = dot.clamp(max=0) / (global_norm(other).square() + EPSILON)
    return [a - share * b for a, b in zip(own, other, strict=True)]
