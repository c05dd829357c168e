"""Plasticity metrics: pure functions of matrices, features and weights, and `measure`, which computes all of an actor.

Units are those of hidden layers, gate included. A unit of an expert that no state was routed to is dormant and dead: on
this batch nothing reaches it, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.entk import entk, untouched
from sphere_rl.experts import GroupedLinear, RoutedFeatures
from sphere_rl.networks import MoENetwork, Trace
from sphere_rl.spectrum import effective_rank, gram_eigenvalues

ENERGY = 0.99
"""Share that the leading part of a spectrum must hold, for `srank`, `pca_rank` and `expert_overlap`."""

SPECTRAL_METRICS: dict[str, str] = {
    "r_e_K": "effective rank of the empirical NTK K = JJᵀ of the outputs: exp entropy of its eigenvalues",
    "r_e_A": "effective rank of the feature Gram A = ΦᵀΦ/N: exp entropy of σ², Φ the weighted last hidden features",
    "effective_rank": "exp entropy of σ/Σσ (Roy & Vetterli 2007)",
    "srank": "least k with Σ_{i≤k} σ ≥ 0.99 Σσ (Kumar et al. 2021)",
    "pca_rank": "least k with Σ_{i≤k} σ² ≥ 0.99 Σσ²",
    "feature_rank": "number of σ/√N > 0.01 (Lyle et al. 2022)",
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


def srank(singular_values: Float[Tensor, "k"]) -> int:
    """Least k with Σ_{i≤k} σ_i ≥ 0.99 Σσ, σ descending; 0 for no features. Source: Kumar et al. 2021."""
    return _leading(singular_values)


def pca_rank(singular_values: Float[Tensor, "k"]) -> int:
    """Least k with Σ_{i≤k} σ_i² ≥ 0.99 Σσ²: principal components (uncentred) that hold 99 % of the energy."""
    return _leading(singular_values.double().square())


def feature_rank(singular_values: Float[Tensor, "k"], samples: int) -> int:
    """Return the number of σ_i/√N > 0.01, N = ``samples``. Depends on the features' scale. Source: Lyle et al. 2022."""
    return int((singular_values / samples**0.5 > 0.01).sum())


def unit_scores(features: RoutedFeatures) -> Float[Tensor, "E H"]:
    """Mean |h_i| of each unit divided by the mean over its expert's layer + 1e-9. Source: Sokar et al. 2023."""
    mean = features.dense().abs().mean(0)
    return mean / (mean.mean(1, keepdim=True) + 1e-9)


def dormant_ratio(layers: Sequence[RoutedFeatures], threshold: float = 0.025) -> float:
    """Share of units with score (`unit_scores`) ≤ ``threshold``, in [0, 1]."""
    return _share(unit_scores(layer) <= threshold for layer in layers)


def dead_ratio(layers: Sequence[RoutedFeatures]) -> float:
    """Share of units that are exactly zero on every state, in [0, 1]."""
    return _share((layer.dense() == 0).all(0) for layer in layers)


def active_fraction(layers: Sequence[RoutedFeatures]) -> float:
    """1 − mean(h = 0) over the activations of routed (state, expert) pairs, in [0, 1]."""
    return _share(layer.values != 0 for layer in layers)


def grama_ratio(weight_gradients: Sequence[Float[Tensor, "_ _ _"]], threshold: float = 0.01) -> float:
    """Share of units i with mean |∂L/∂W_i| ≤ ``threshold`` of the mean over their expert's layer.

    One gradient [E, out, in] for each hidden layer. Source: Liu et al. 2025.
    """
    scores = [gradient.abs().mean(2) for gradient in weight_gradients]
    return _share(score / (score.mean(1, keepdim=True) + 1e-9) <= threshold for score in scores)


def stable_rank(weight: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b"]:
    """(‖W‖_F/‖W‖₂)² of each matrix, 0 for a zero matrix; 1 ≤ stable rank ≤ rank."""
    matrix = weight.detach()
    gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    largest = torch.linalg.eigvalsh(gram)[..., -1]
    return torch.where(largest > 0, matrix.square().sum((-2, -1)) / largest, 0.0)


def root_mean_square(tensors: Iterable[Tensor]) -> float:
    """√(Σ θ² / P) over all P entries of all tensors."""
    squares, size = 0.0, 0
    for tensor in tensors:
        squares += float(tensor.detach().double().square().sum())
        size += tensor.numel()
    return (squares / size) ** 0.5 if size else 0.0


def churn(after: Float[Tensor, "N A"], before: Float[Tensor, "N A"]) -> float:
    """Mean over states of ‖μ_after − μ_before‖², in squared action units."""
    return float((after - before).detach().double().square().sum(1).mean())


def gate_entropy(gates: Float[Tensor, "N E"]) -> float:
    """Mean over states of −Σ_e p_e log p_e, p the state's routing weights divided by their sum; nats."""
    p = gates.detach().double()
    return float(torch.special.entr(p / p.sum(1, keepdim=True)).sum(1).mean())


def expert_load(features: RoutedFeatures) -> list[float]:
    """Share of the N states that each of E experts is selected for: all 1 for dense routing, top-k loads add to k."""
    return [count / features.routing.num_samples for count in features.routing.counts]


def expert_overlap(features: Float[Tensor, "N E H"]) -> float:
    """Mean over pairs of experts of ⟨P_e, P_f⟩/(‖P_e‖‖P_f‖), P_e the projector on the span of expert e's features.

    The span is that of the fewest left singular vectors of features[:, e] (a subspace of R^N) with 99 % of its
    energy: 1 for equal features (or rotated ones), 0 for experts that share no state. Experts without features are
    left out; 0 for fewer than two.
    """
    bases = []
    for expert in features.detach().double().unbind(1):
        values, vectors = torch.linalg.eigh(expert @ expert.T)
        if values[-1] > 0:
            bases.append(vectors.flip(1)[:, : _leading(values.clamp(min=0.0))])
    cosines = [
        float((one.T @ other).square().sum()) / (one.shape[1] * other.shape[1]) ** 0.5
        for one, other in combinations(bases, 2)
    ]
    return sum(cosines) / len(cosines) if cosines else 0.0


def feature_metrics(trace: Trace) -> dict[str, float | list[float]]:
    """Every metric that a forward pass holds: the spectrum of Φ, the state of the units, the health of the routing."""
    last, layers = trace.features[-1], (*trace.features, *trace.gate_features)
    samples = last.routing.num_samples
    eigenvalues = gram_eigenvalues(last.weighted())
    sigma = (eigenvalues * samples).sqrt()
    return {
        "r_e_A": effective_rank(eigenvalues),
        "effective_rank": effective_rank(sigma),
        "srank": srank(sigma),
        "pca_rank": pca_rank(sigma),
        "feature_rank": feature_rank(sigma, samples),
        "dormant_ratio": dormant_ratio(layers),
        "dead_ratio": dead_ratio(layers),
        "active_fraction": active_fraction(layers),
        "gate_entropy": gate_entropy(trace.gates),
        "expert_load": expert_load(last),
        "expert_overlap": expert_overlap(last.dense()),
    }


def weight_metrics(
    actor: nn.Module, gradients: Mapping[str, Tensor] | None = None, previous: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Metrics of the parameters alone: stable rank and norm; with ``gradients`` and ``previous`` those of an update.

    ``gradients`` and ``previous`` (the parameters before the update) go by the names of ``actor.named_parameters()``.
    """
    layers = {name: m for name, m in actor.named_modules() if isinstance(m, GroupedLinear)}
    ranks = torch.cat([stable_rank(layer.weight) for layer in layers.values()])
    metrics = {
        "stable_rank_W": float(ranks.mean()),
        "weight_norm": root_mean_square(actor.parameters()),
    }
    if gradients is not None:
        hidden = [
            gradients[f"{name}.weight"] for name in layers if f"{name}.weight" in gradients and ".hidden." in name
        ]
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
) -> dict[str, float | list[float]]:
    """Return every metric of `SPECTRAL_METRICS` for ``actor`` on a batch of states, in its order.

    ``gradients`` of the last loss add grama_ratio and grad_norm; ``previous``, the parameters before the last update,
    adds weight_change and churn. The actor's mode is respected and nothing of it changes: parameters, gradients,
    buffers and the global random state stay bit for bit.
    """
    found: dict[str, float | list[float]] = {
        "r_e_K": effective_rank(torch.linalg.eigvalsh(entk(actor, observations).double()))
    }
    with untouched(actor), torch.no_grad():
        trace = actor.trace(observations)
        found |= feature_metrics(trace)
    found |= weight_metrics(actor, gradients, previous)
    if previous is not None:
        with untouched(actor), torch.no_grad():
            before = {name: previous[name] for name, _ in actor.named_parameters()}
            found["churn"] = churn(trace.output, torch.func.functional_call(actor, before, (observations,)))
    return {name: found[name] for name in SPECTRAL_METRICS if name in found}


def _leading(values: Float[Tensor, "k"]) -> int:
    """Fewest values whose sum reaches ENERGY of the total."""
    descending = values.double().sort(descending=True).values
    total = descending.sum()
    if total <= 0:
        return 0
    return int((descending.cumsum(0) < ENERGY * total).sum()) + 1


def _share(masks: Iterable[Tensor]) -> float:
    hits, size = 0, 0
    for mask in masks:
        hits += int(mask.sum())
        size += mask.numel()
    return hits / size if size else 0.0
