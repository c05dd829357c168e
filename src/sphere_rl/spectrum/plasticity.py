"""Plasticity metrics as pure functions of singular values, features, routing weights and parameters.

Units are those of hidden layers. A unit of an expert that no state was routed to is dormant and dead: on this batch
nothing reaches it, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from sphere_rl.experts.layers import RoutedFeatures
from sphere_rl.kernels.precision import at_least_float32

ENERGY = 0.99
"""Share that the leading part of a spectrum must hold, for `srank`, `pca_rank` and `expert_overlap`."""


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
    mean = features.dense().abs().mean(0, dtype=torch.float64)
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
    scores = [gradient.abs().mean(2, dtype=torch.float64) for gradient in weight_gradients]
    return _share(score / (score.mean(1, keepdim=True) + 1e-9) <= threshold for score in scores)


def stable_rank(weight: Float[Tensor, "*b out in"]) -> Float[Tensor, "*b"]:
    """(‖W‖_F/‖W‖₂)² of each matrix, 0 for a zero matrix; 1 ≤ stable rank ≤ rank; in float32 at least."""
    matrix = at_least_float32(weight.detach())
    with torch.autocast(matrix.device.type, enabled=False):
        gram = matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix
    largest = torch.linalg.eigvalsh(gram)[..., -1]
    return torch.where(largest > 0, matrix.square().sum((-2, -1)) / largest, 0.0)


def outside_share(output: Float[Tensor, "N A"], low: Sequence[float], high: Sequence[float]) -> float:
    """Share of mean actions outside a box of A lower and upper bounds, where the environment clips them."""
    lower, upper = (torch.as_tensor(bounds, dtype=torch.float64, device=output.device) for bounds in (low, high))
    mean = output.double()  # in fewer digits bounds would move
    return ((mean < lower) | (mean > upper)).double().mean().item()


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
    """Mean over states of −Σ_e p_e log p_e, p the sizes of the state's routing weights divided by their sum; nats.

    A state that no expert is selected for counts as 0.
    """
    size = gates.detach().double().abs()
    total = size.sum(1, keepdim=True)
    return float(torch.special.entr(size / torch.where(total > 0, total, 1.0)).sum(1).mean())


def expert_load(features: RoutedFeatures) -> list[float]:
    """Share of the N states that each of E experts is selected for: all 1 for dense routing, top-k loads add to k."""
    return [count / features.routing.num_samples for count in features.routing.counts]


def expert_overlap(features: Float[Tensor, "N E H"]) -> float:
    """Mean over pairs of experts of ⟨P_e, P_f⟩/(‖P_e‖‖P_f‖), P_e the projector on the span of expert e's features.

    The span is that of the fewest left singular vectors of features[:, e] (a subspace of R^N) with 99 % of its
    energy: 1 for equal features (or rotated ones), 0 for experts that share no state. Experts without features are
    left out; 0 for fewer than two.
    """
    bases = [basis for expert in features.detach().double().unbind(1) if (basis := _span(expert)).shape[1]]
    cosines = [
        float((one.T @ other).square().sum()) / (one.shape[1] * other.shape[1]) ** 0.5
        for one, other in combinations(bases, 2)
    ]
    return sum(cosines) / len(cosines) if cosines else 0.0


def _span(features: Float[Tensor, "N H"]) -> Float[Tensor, "N k"]:
    """The fewest left singular vectors that hold `ENERGY`, from the smaller Gram; none of zeros."""
    many = features.shape[0] > features.shape[1]
    values, vectors = torch.linalg.eigh(features.T @ features if many else features @ features.T)
    count = _leading(values.clamp(min=0.0)) if values[-1] > 0 else 0
    leading = vectors.flip(1)[:, :count]
    return features @ leading / values.flip(0)[:count].sqrt() if many else leading


def _leading(values: Float[Tensor, "k"]) -> int:
    """Fewest values whose sum reaches ENERGY of the total, 0 if that is 0."""
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
