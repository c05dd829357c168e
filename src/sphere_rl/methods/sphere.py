"""SPHERE: keep the spectrum of the routing-weighted expert features flat.

Adds the scale-free penalty ‖A/tr A − I/m‖_F², A = ΦᵀΦ/N, or the paper's own ‖A − (tr A/m) I‖_F² (``scale`` free or
literal; see `sphere_rl.sphere_penalty`), to the actor's loss in one of three strengths: ``fixed`` λ; ``loss``,
λ = ρ·|L_actor| / (penalty + 1e-8); ``grad``, which adds ρ·‖g_ppo‖ / (‖g_penalty‖ + 1e-8) · g_penalty to the gradient.
The default, free at ρ = 0.03 in mode grad, is what the pilot's rule chose (``docs/results``). At ρ = 0.1 the literal
form made the features of fresh CW10 agents vanish; the free one raises ranks more than at 0.03, but where a task gives
no signal it is all that moves the policy, and moved it out of the range of actions. To replicate the paper, ask for
the literal form.

A schedule multiplies the strength (λ or ρ) by a factor that changes once an iteration: ``constant`` 1; ``linear`` from
1/n in the first of a task's n iterations to 1 in the last, so that early learning is free and the spectrum is flat when
the next task comes; ``entropy`` 1 until r_e(A) of the last layer falls below a share of its value at the task's start,
from then on growing in every iteration that finds it there and shrinking back to 1 in every one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.experts.layers import RoutedFeatures, dense_penalty
from sphere_rl.experts.network import Actor, Trace
from sphere_rl.kernels.gradients import GradientStore, add_scaled_, total_norm
from sphere_rl.kernels.threads import beside
from sphere_rl.learner.actor_critic import ActorCritic
from sphere_rl.learner.feature_penalty import FeaturePenalty, conflict, share_of_loss, share_of_norm
from sphere_rl.learner.policy_step import StepResults
from sphere_rl.learner.rollout import Rollout
from sphere_rl.methods import ActorStep, Method, MethodConfig, check_range
from sphere_rl.penalty import Scale
from sphere_rl.spectrum.ranks import kernel_rank

STRENGTH: dict[Scale, float] = {"literal": 1e-3, "free": 0.1}
"""Default λ of mode fixed."""


@dataclass(frozen=True)
class SphereConfig(MethodConfig):
    """Strength and variants of the penalty."""

    mode: Literal["fixed", "loss", "grad"] = "grad"
    """How the strength is set: fixed λ, a share of the actor's loss, or a share of its gradient norm."""
    scale: Scale = "free"
    """free: the penalty of A/tr A, which only turns features. literal: the paper's, which also shrinks them."""
    rho: float = 0.03
    """Share of the loss (mode loss) or of the gradient norm (mode grad) that the penalty gets."""
    strength: float | None = None
    """λ of mode fixed; when not given 0.1 for the free penalty, 1e-3 for the literal one."""
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
    schedule: Literal["constant", "linear", "entropy"] = "constant"
    """How the strength changes within a task: not, rising linearly, or raised where the effective rank falls."""
    entropy_share: float = 0.8
    """Schedule entropy: share of r_e(A) at the task's start below which the strength is raised."""
    entropy_growth: float = 1.25
    """Schedule entropy: factor of the strength from one iteration to the next."""
    entropy_limit: float = 100.0
    """Schedule entropy: the strength is raised up to this multiple."""

    def __post_init__(self) -> None:
        check_range("sphere", self, "rho gate_coefficient")
        if self.strength is not None:
            check_range("sphere", self, "strength")
        check_range("sphere", self, "entropy_share", high=1)
        check_range("sphere", self, "entropy_growth entropy_limit", low=1)
        if self.pcgrad and self.mode != "grad":
            raise ConfigError("sphere.pcgrad", self.pcgrad, f"False in mode {self.mode}: it acts on gradients")
        if self.factor == "gradient" and self.grouping == "per_expert":
            raise ConfigError("sphere.grouping", self.grouping, "joint with factor gradient")

    @classmethod
    def updated(cls, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """Before there was a scale the penalty was the literal one, and its default strength was saved as a number."""
        if "scale" in saved:
            return saved
        strength = saved.get("strength")
        return {**saved, "scale": "literal", "strength": None if strength == STRENGTH["literal"] else strength}

    @property
    def fixed_strength(self) -> float:
        """λ of mode fixed: as given, or the scale's own."""
        return STRENGTH[self.scale] if self.strength is None else self.strength


class Sphere(Method):
    """The penalty, its strength and its ablations."""

    summary = "Parseval penalty on the Gram of routing-weighted expert features"
    citation = "Luo et al. 2026, SPHERE (ICML), arXiv 2605.04712"
    Config = SphereConfig

    def __init__(self, config: SphereConfig) -> None:
        super().__init__(config)
        self.config: SphereConfig = config
        self._metrics: dict[str, float | Tensor] = {}
        self._schedule = Schedule(config)
        self._gradients = GradientStore()
        self._begun: Callable[[], tuple[Tensor, list[Tensor], Tensor]] | None = None

    def start(self, agent: ActorCritic) -> None:
        """Signals are derivatives with respect to features."""
        agent.actor.experts.layerwise = self.config.factor == "gradient"

    def on_task_start(self, agent: ActorCritic, task_index: int) -> None:
        """The schedule starts again."""
        self._schedule.start_task(agent.config.iterations_per_task)

    def after_iteration(self, agent: ActorCritic, rollout: Rollout) -> None:
        """The schedule goes on."""
        self._schedule.advance()

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        """λ · penalty in the modes fixed and loss."""
        factor = self._schedule.observe(lambda: step.trace)
        if self.config.mode == "grad":
            self._begun = beside(partial(self._differentiate, step))  # while the loss is differentiated
            return None
        penalty = self.penalty(step.trace)
        strength: float | Tensor = factor * self.config.fixed_strength
        if self.config.mode == "loss":
            strength = share_of_loss(factor * self.config.rho, step.loss.detach(), penalty.detach())
        self._metrics = {"sphere_penalty": penalty.detach(), "sphere_strength": strength}
        return strength * penalty

    def actor_gradients(self, step: ActorStep, gradients: list[Tensor]) -> list[Tensor]:
        """Mode grad: g ← g + ρ·‖g‖ / (‖g_penalty‖ + 1e-8) · g_penalty."""
        if self.config.mode != "grad":
            return gradients
        begun, self._begun = self._begun, None
        norm = total_norm(gradients)
        penalty, own, own_norm = begun() if begun else self._differentiate(step)
        if self.config.pcgrad:
            own = project_conflict(own, gradients)
            own_norm = total_norm(own)
        scale = share_of_norm(self._schedule.factor * self.config.rho, norm, own_norm)
        self._metrics = {"sphere_penalty": penalty, "sphere_strength": scale}
        # In place: both lists are this minibatch's own, and copies of the whole network cost a millisecond.
        add_scaled_(gradients, own, scale)
        return gradients

    def feature_penalty(self, actor: Actor, observation: Tensor) -> FeaturePenalty | None:
        """The penalty and its strength, as the hooks have it; of the ablations there is no such form."""
        config, depth = self.config, actor.options.depth
        if config.factor != "feature" or config.grouping != "joint" or config.gate_coefficient:
            return None
        layers = [config.layers == "all" or layer == depth - 1 for layer in range(depth)]
        share = config.fixed_strength if config.mode == "fixed" else config.rho
        factor = self._schedule.observe(partial(actor.trace, observation))
        return FeaturePenalty(layers, config.mode, factor * share, config.pcgrad, config.scale == "free")

    def penalised(self, results: StepResults) -> None:
        """Keep the numbers for `metrics`."""
        self._metrics = {"sphere_penalty": results.penalty, "sphere_strength": results.strength}

    def _differentiate(self, step: ActorStep) -> tuple[Tensor, list[Tensor], Tensor]:
        penalty = self.penalty(step.trace)
        gradients = self._gradients.differentiate(penalty, step.parameters, retain_graph=True)
        return penalty.detach(), gradients, total_norm(gradients)

    def penalty(self, trace: Trace) -> Tensor:
        """The penalty of one forward pass in the configured variant."""
        config = self.config
        layers = trace.features if config.layers == "all" else trace.features[-1:]
        if config.factor == "gradient":
            terms = [dense_penalty(backpropagated_signals(trace, layer), config.scale) for layer in layers]
        elif config.grouping == "per_expert":
            terms = [layer.sphere_penalty_per_expert(config.scale) for layer in layers]
        else:
            terms = [layer.sphere_penalty(config.scale) for layer in layers]
        if config.gate_coefficient:
            evenness = dense_penalty(trace.gates, config.scale) / trace.gates.shape[1]  # `sphere_rl.gate_penalty`
            terms.append(config.gate_coefficient * evenness)
        return torch.stack(terms).sum()

    def metrics(self) -> dict[str, float | Tensor]:
        """Penalty and strength of the last minibatch, and what the schedule entropy sees."""
        return self._metrics | self._schedule.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._schedule.load_state_dict(state)


class Schedule:
    """The factor on the strength, constant within an iteration."""

    def __init__(self, config: SphereConfig) -> None:
        self._config = config
        self._length, self._iteration, self._factor = 1, 0, 1.0
        self._initial_rank = self._rank = 0.0
        self._due = True

    @property
    def factor(self) -> float:
        """What λ or ρ is multiplied by in this iteration."""
        if self._config.schedule == "linear":
            return min(1.0, (self._iteration + 1) / self._length)
        return self._factor

    def start_task(self, length: int) -> None:
        """A task of so many iterations begins."""
        self._length, self._iteration, self._factor = length, 0, 1.0
        self._initial_rank, self._due = 0.0, True

    def advance(self) -> None:
        """An iteration is over."""
        self._iteration, self._due = self._iteration + 1, True

    def observe(self, trace: Callable[[], Trace]) -> float:
        """In an iteration's first minibatch, before its step, measure r_e(A) if the schedule needs it."""
        if self._due and self._config.schedule == "entropy":
            with torch.no_grad():
                self._rank = kernel_rank(trace().features[-1].gram())
            self._initial_rank = self._initial_rank or self._rank
            config = self._config
            low = self._rank < config.entropy_share * self._initial_rank
            factor = self._factor * config.entropy_growth if low else self._factor / config.entropy_growth
            self._factor = min(max(factor, 1.0), config.entropy_limit)
        self._due = False
        return self.factor

    def metrics(self) -> dict[str, float | Tensor]:
        """Factor and rank, of the schedule entropy alone."""
        if self._config.schedule != "entropy":
            return {}
        return {"sphere_factor": self._factor, "sphere_rank": self._rank}

    def state_dict(self) -> dict[str, Any]:
        """All that `observe` and `factor` depend on at the end of an iteration."""
        return {key.removeprefix("_"): value for key, value in vars(self).items() if key != "_config"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        for key, value in state.items():
            setattr(self, f"_{key}", value)


def backpropagated_signals(trace: Trace, layer: RoutedFeatures) -> Tensor:
    """Compute δ_e = ∂f_c/∂h_e ⊙ 1[h_e > 0], what reaches the units before their ReLU, gate included.

    A row for each (output, sample), experts side by side: [A·N, E·H].
    """
    rows, on = [], layer.values > 0
    for output in trace.output.unbind(1):
        (signal,) = torch.autograd.grad(output.sum(), layer.values, create_graph=True)
        rows.append(replace(layer, values=signal * on).dense().flatten(1))
    return torch.cat(rows)


def project_conflict(own: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """PCGrad (Yu et al. 2020): where ⟨own, other⟩ < 0, remove own's component along other."""
    dot = torch.stack([(a * b).sum() for a, b in zip(own, other, strict=True)]).sum()
    share = conflict(dot, total_norm(other).square())
    return [a - share * b for a, b in zip(own, other, strict=True)]
