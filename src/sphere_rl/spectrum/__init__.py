"""What is known of an actor's plasticity on a batch of states: its eNTK, effective ranks and every other metric.

`measure` computes all of them; `SPECTRAL_METRICS` says what each one is. The parts live beside this module: `ranks`
(spectra of matrices), `kernel` (the eNTK), `plasticity` (the rest).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.experts.layers import GroupedLinear, RoutedFeatures
from sphere_rl.experts.network import MoENetwork, Trace
from sphere_rl.experts.routing import weighted_routing
from sphere_rl.spectrum.jacobian import Observations, states_in
from sphere_rl.spectrum.kernel import block_view, entk, entk_jax, estimate_entk_rank, kernel_states, untouched
from sphere_rl.spectrum.plasticity import (
    active_fraction,
    churn,
    dead_ratio,
    dormant_ratio,
    expert_load,
    expert_overlap,
    feature_rank,
    gate_entropy,
    grama_ratio,
    outside_share,
    pca_rank,
    root_mean_square,
    srank,
    stable_rank,
)
from sphere_rl.spectrum.ranks import (
    effective_rank,
    gram_effective_rank,
    gram_eigenvalues,
    kernel_rank,
    participation_ratio,
)

__all__ = [
    "SPECTRAL_METRICS",
    "block_view",
    "effective_rank",
    "entk",
    "entk_jax",
    "estimate_entk_rank",
    "feature_metrics",
    "gram_effective_rank",
    "measure",
    "participation_ratio",
    "weight_metrics",
]

SPECTRAL_METRICS: dict[str, str] = {
    "r_e_K": "effective rank of the empirical NTK K = JJᵀ of the outputs: exp entropy of its eigenvalues",
    "r_e_A": "effective rank of the feature Gram A = ΦᵀΦ/N: exp entropy of σ², Φ the weighted last hidden features",
    "participation_ratio": "(tr A)²/‖A‖_F²: another effective rank of A, the one that the scale-free penalty raises",
    "effective_rank": "exp entropy of σ/Σσ (Roy & Vetterli 2007)",
    "srank": "least k with Σ_{i≤k} σ ≥ 0.99 Σσ (Kumar et al. 2021)",
    "pca_rank": "least k with Σ_{i≤k} σ² ≥ 0.99 Σσ²",
    "feature_rank": "number of σ/√N > 0.01 (Lyle et al. 2022)",
    "feature_norm": "root mean square over states of ‖φ(x)‖, φ(x) the rows of Φ: √tr A",
    "output_size": "root mean square of the outputs: mean actions, or logits",
    "outside_share": "share of mean actions outside the action box, where the environment clips them",
    "dormant_ratio": "share of hidden units whose mean |h| is at most 0.025 of their layer's mean (Sokar et al. 2023)",
    "dead_ratio": "share of hidden units that are zero on all states",
    "active_fraction": "share of hidden activations that are not zero, on the states routed to them",
    "grama_ratio": "share of hidden units whose mean |∂L/∂W_i| is at most 0.01 of their layer's mean (Liu et al. 2025)",
    "stable_rank_W": "(‖W‖_F/‖W‖₂)², mean over weight matrices",
    "weight_norm": "root mean square of the parameters",
    "weight_change": "root mean square of the parameters' change in one update",
    "grad_norm": "root mean square of the parameters' gradients",
    "churn": "mean ‖μ_after − μ_before‖² of one update",
    "gate_entropy": "mean entropy of a state's routing weights, in nats",
    "expert_load": "share of the states that each expert is selected for",
    "expert_overlap": "mean cosine between the subspaces of state space that pairs of experts' features span",
}
"""Every metric with its definition. σ: singular values of Φ [N, m]."""


def feature_metrics(trace: Trace) -> dict[str, float | list[float]]:
    """Every metric that a forward pass holds: the spectrum of Φ, the state of the units, the health of the routing.

    And the size of the outputs.
    """
    last, layers = trace.features[-1], (*trace.features, *trace.gate_features)
    return {
        **_feature_spectrum(last.weighted()),
        **_unit_states(layers),
        "output_size": root_mean_square([trace.output]),
        "gate_entropy": gate_entropy(trace.gates),
        "expert_load": expert_load(last),
        "expert_overlap": expert_overlap(last.dense()),
    }


def _feature_spectrum(phi: Float[Tensor, "N m"]) -> dict[str, float | list[float]]:
    samples, eigenvalues = len(phi), gram_eigenvalues(phi)
    sigma = (eigenvalues * samples).sqrt()
    return {
        "r_e_A": effective_rank(eigenvalues),
        "participation_ratio": participation_ratio(eigenvalues),
        "effective_rank": effective_rank(sigma),
        "srank": srank(sigma),
        "pca_rank": pca_rank(sigma),
        "feature_rank": feature_rank(sigma, samples),
        "feature_norm": float(eigenvalues.sum().sqrt()),
    }


def _unit_states(layers: Sequence[RoutedFeatures]) -> dict[str, float | list[float]]:
    return {
        "dormant_ratio": dormant_ratio(layers),
        "dead_ratio": dead_ratio(layers),
        "active_fraction": active_fraction(layers),
    }


def captured_metrics(
    module: nn.Module,
    observations: Observations,
    output: Any,
    features: Float[Tensor, "N E H"],
    gates: Float[Tensor, "N E"] | None,
) -> dict[str, float | list[float]]:
    """The metrics that apply to any ``module`` with ``output`` = module(observations) and the features of that pass.

    Without ``gates`` every state goes to each of E experts with weight 1. output_size, and r_e_K if something is
    trainable: where the output is [N, A]. With ``gates`` those of the routing; gate_entropy where weights are ≥ 0 and
    no row is zero.
    """
    layer = _routed(features, features.new_ones(features.shape[:2]) if gates is None else gates)
    found = {**_feature_spectrum(layer.weighted()), **_unit_states([layer])}
    if gates is not None:
        found |= {"expert_load": expert_load(layer), "expert_overlap": expert_overlap(layer.dense())}
        if bool((gates >= 0).all() and (gates.sum(1) > 0).all()):
            found["gate_entropy"] = gate_entropy(gates)
    trainable = any(parameter.requires_grad for parameter in module.parameters())
    if isinstance(output, Tensor) and output.ndim == 2 and len(output) == states_in(observations):
        found["output_size"] = root_mean_square([output])
        if trainable:
            found["r_e_K"] = kernel_rank(entk(module, observations))
    return {name: found[name] for name in SPECTRAL_METRICS if name in found}


def _routed(features: Float[Tensor, "N E H"], weights: Float[Tensor, "N E"]) -> RoutedFeatures:
    """Features of the (state, expert) pairs whose weight is not zero."""
    routing = weighted_routing(weights)
    return RoutedFeatures(features[routing.sample, routing.expert], routing)


def weight_metrics(
    actor: nn.Module, gradients: Mapping[str, Tensor] | None = None, previous: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Metrics of the parameters alone: stable rank and norm; with ``gradients`` and ``previous`` those of an update.

    ``gradients`` and ``previous`` (the parameters before the update) go by the names of ``actor.named_parameters()``.
    Without linear layers there is no stable_rank_W, without gradients of hidden ones no grama_ratio.
    """
    layers = {name: m for name, m in actor.named_modules() if isinstance(m, GroupedLinear | nn.Linear)}
    with untouched(actor):  # of a parametrised layer to read the weight is to compute it
        ranks = [stable_rank(layer.weight).reshape(-1) for layer in layers.values()]
    metrics = {"stable_rank_W": float(torch.cat(ranks).mean())} if ranks else {}
    metrics["weight_norm"] = root_mean_square(actor.parameters())
    if gradients is not None:
        hidden = [
            gradients[f"{name}.weight"].reshape(-1, *layers[name].weight.shape[-2:])
            for name in layers
            if f"{name}.weight" in gradients and "hidden" in name.split(".")
        ]
        if hidden:
            metrics["grama_ratio"] = grama_ratio(hidden)
        metrics["grad_norm"] = root_mean_square(gradients.values())
    if previous is not None:
        changes = (p.detach() - previous[name] for name, p in actor.named_parameters())
        metrics["weight_change"] = root_mean_square(changes)
    return metrics


def measure(
    actor: MoENetwork,
    observations: Float[Tensor, "N D"],
    *,
    gradients: Mapping[str, Tensor] | None = None,
    previous: Mapping[str, Tensor] | None = None,
    kernel_rows: int | None = None,
    box: tuple[Sequence[float], Sequence[float]] | None = None,
) -> dict[str, float | list[float]]:
    """Return every metric of `SPECTRAL_METRICS` for ``actor`` on a batch of states, in its order.

    ``gradients`` of the last loss add grama_ratio and grad_norm; ``previous``, the parameters before the last update,
    adds weight_change and churn. ``kernel_rows``: the most that K may have, by `kernel_states`; by default it is of
    all states. ``box``, the lower and the upper bounds of actions, adds outside_share. The actor's mode is respected
    and nothing of it changes: parameters, gradients, buffers and the global random state stay bit for bit.

    Raises:
        ValueError: the actor is none of this package, or it cannot read the states, or there are none.
    """
    if not isinstance(actor, MoENetwork):
        raise ValueError(f"actor: got {type(actor).__name__}, allowed: a MoENetwork, as make_actor makes them")
    if not len(observations):
        raise ValueError("observations: got no state, allowed: at least one")
    found: dict[str, float | list[float]] = {}
    with untouched(actor), torch.no_grad():
        trace = actor.trace(observations)
        found |= feature_metrics(trace)
    if box is not None:
        found["outside_share"] = outside_share(trace.output, *box)
    chosen = observations[kernel_states(len(observations), trace.output.shape[1], kernel_rows)]
    found["r_e_K"] = kernel_rank(entk(actor, chosen))
    found |= weight_metrics(actor, gradients, previous)
    if previous is not None:
        with untouched(actor), torch.no_grad():
            before = {name: previous[name] for name, _ in actor.named_parameters()}
            found["churn"] = churn(trace.output, torch.func.functional_call(actor, before, (observations,)))
    return {name: found[name] for name in SPECTRAL_METRICS if name in found}
