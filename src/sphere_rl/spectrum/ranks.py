"""Effective ranks of matrices: exact from a spectrum, or estimated from matrix-vector products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, frexp, isfinite
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sphere_rl.errors import NotFiniteError

ROUND_OFF = 1e-4
"""Largest size of a negative eigenvalue, relative to the largest one, that is taken for round-off."""


def effective_rank(eigenvalues: Shaped[Any, "n"]) -> float:
    """Return r_e = exp(−Σ p_i log p_i), p_i = λ_i / Σ_j λ_j: the exponential of the spectral entropy.

    ``eigenvalues`` [n]: NumPy, PyTorch or JAX. 1 ≤ r_e ≤ the number of positive ones; 0 for the zero matrix. Negative
    eigenvalues of round-off size count as 0; larger ones raise ValueError, non-finite ones NotFiniteError.

    Source: Roy & Vetterli 2007.
    """
    p = _shares(eigenvalues)
    return _within(float(torch.special.entr(p).sum().exp()), p) if len(p) else 0.0


def participation_ratio(eigenvalues: Shaped[Any, "n"]) -> float:
    """Return (Σ λ_i)² / Σ λ_i² = 1 / Σ p_i²: the Rényi-2 effective rank, at most `effective_rank`.

    Arguments, errors and 0 for the zero matrix as there. Of A it is 1 / (L + 1/m), L the scale-free SPHERE penalty.
    """
    p = _shares(eigenvalues)
    return _within(1 / float(p.square().sum()), p) if len(p) else 0.0


def _within(rank: float, p: Float[Tensor, "k"]) -> float:
    """A rank of shares ``p`` without the round-off that takes it below 1 or above their number."""
    return min(max(rank, 1.0), float(torch.count_nonzero(p)))


def _shares(eigenvalues: Shaped[Any, "n"]) -> Float[Tensor, "k"]:
    """Each eigenvalue over their sum in float64; none for the zero matrix."""
    values = _float64("eigenvalues", eigenvalues)
    if values.ndim != 1:
        raise ValueError(f"eigenvalues: got shape {tuple(values.shape)}, allowed: [n]")
    if not values.isfinite().all():
        raise NotFiniteError("eigenvalues", "a value", "every value finite")
    largest = values.max().item() if len(values) else 0.0
    if len(values) and values.min().item() < -ROUND_OFF * max(largest, 0.0):
        raise ValueError(f"eigenvalues: got {values.min().item():g} beside {largest:g}, allowed: none below zero")
    if largest <= 0:
        return values[:0]
    p = values.clamp(min=0.0) / largest  # by the largest first: the sum of huge values may overflow
    return p / p.sum()


def gram_eigenvalues(phi: Shaped[Any, "N m"]) -> Float[Tensor, "k"]:
    """Return the min(N, m) eigenvalues of A = ΦᵀΦ/N that can differ from zero, ascending, in float64.

    Computed from the smaller of ΦᵀΦ and ΦΦᵀ: relative to the largest they are exact to about 1e-15, so singular values
    of Φ below 1e-8 of the largest one are lost, far under what float32 features resolve.

    Raises ValueError where phi is not [N, m], NotFiniteError where a feature is not finite.
    """
    eigenvalues, power = _unit_gram_eigenvalues(phi)
    return eigenvalues * 2.0**power * 2.0**power


def _unit_gram_eigenvalues(phi: Shaped[Any, "N m"]) -> tuple[Float[Tensor, "k"], int]:
    """`gram_eigenvalues` of Φ/2ᵖ, whose products neither over- nor underflow, and p; bits stay as they are."""
    matrix = _float64("phi", phi)
    if matrix.ndim != 2:
        raise ValueError(f"phi: got shape {tuple(matrix.shape)}, allowed: [N, m]")
    if not matrix.isfinite().all():
        raise NotFiniteError("phi", "a value", "every value finite")
    power = frexp(matrix.abs().max().item())[1] if matrix.numel() else 0
    power = min(max(power, -1000), 1000)  # whose powers of two are numbers themselves
    matrix = matrix * 2.0**-power
    samples, width = matrix.shape
    gram = matrix @ matrix.T if samples < width else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram / samples).clamp(min=0.0), power


def kernel_eigenvalues(kernel: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
    """Return the eigenvalues of a symmetric matrix, ascending, in float64.

    Raises NotFiniteError where an entry is not finite.
    """
    if not kernel.isfinite().all():
        raise NotFiniteError("kernel", "an entry", "finite gradients of finite outputs")
    return torch.linalg.eigvalsh(kernel.double())


def kernel_rank(kernel: Float[Tensor, "n n"]) -> float:
    """Return the `effective_rank` of a symmetric matrix."""
    return effective_rank(kernel_eigenvalues(kernel))


def gram_effective_rank(phi: Shaped[Any, "N m"]) -> float:
    """Return r_e(A), A = ΦᵀΦ/N, for features ``phi`` [N, m], one sample a row; see `effective_rank`."""
    return effective_rank(_unit_gram_eigenvalues(phi)[0])


@dataclass(frozen=True)
class RankEstimate:
    """An effective rank from random probes: the estimate and its standard error over the probes."""

    value: float
    standard_error: float


def estimate_effective_rank(
    product: Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]],
    size: int,
    *,
    generator: torch.Generator,
    probes: int = 24,
    deflated: int = 16,
    steps: int = 24,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> RankEstimate:
    """Estimate r_e of a positive semi-definite matrix K [n, n] from products K·V with V [n, k].

    log r_e = log tr K − tr(K log K) / tr K. Both traces are split over an orthonormal Q [n, deflated] of the leading
    subspace: Σ q_iᵀ f(K) q_i, plus Gaussian probes in the rest, each quadratic form by stochastic Lanczos quadrature
    with ``steps`` steps. Deflation matters: a few eigenvalues hold most of the trace when plasticity is low. The
    standard error is of the ``probes`` by the delta method; the quadrature's own error falls exponentially with
    ``steps``. Draws only from ``generator``, and on its device, so that an estimate does not depend on that of K,
    ``device``, which is the generator's unless given.

    Raises NotFiniteError where K gives what is not finite.

    Sources: Ubaru, Chen, Saad 2017 (quadrature); Meyer, Musco, Musco, Woodruff 2021 (deflation).
    """
    if probes < 2 or deflated < 0 or steps < 1:
        raise ValueError(f"probes, deflated, steps: got {probes}, {deflated}, {steps}, allowed: ≥ 2, ≥ 0, ≥ 1")

    def draw(count: int) -> Tensor:
        return torch.randn(size, count, generator=generator, dtype=dtype, device=generator.device).to(device)

    basis, noise = draw(min(deflated, size)), draw(probes)
    power = min(max(frexp(product(noise).abs().max().item())[1], -120), 120)  # of K: no square over- or underflows

    def unit(vectors: Tensor) -> Tensor:
        return product(vectors) * 2.0**-power

    for _ in range(3 if deflated else 0):  # subspace iteration: the estimate is unbiased whatever the basis
        basis = torch.linalg.qr(unit(basis))[0]
    rest = noise - basis @ (basis.T @ noise)
    forms = _quadratic_forms(unit, torch.cat((basis, rest), dim=1), steps)
    leading, sampled = forms[: basis.shape[1]], forms[basis.shape[1] :]
    trace, entropy = (leading.sum(0) + sampled.mean(0)).tolist()
    if trace <= 0:
        return RankEstimate(0.0, 0.0)
    value = trace * exp(-entropy / trace)
    if not isfinite(value):
        raise NotFiniteError("product", "K V or a scale", "a matrix K of finite numbers")
    slopes = sampled[:, 0] * (1 / trace + entropy / trace / trace) - sampled[:, 1] / trace
    return RankEstimate(value, value * float(slopes.std()) / probes**0.5)


def _quadratic_forms(
    product: Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]], starts: Float[Tensor, "n k"], steps: int
) -> Float[Tensor, "k 2"]:
    """Return vᵀ K v and vᵀ (K log K) v of every column v, by Lanczos with full reorthogonalisation."""
    norms = starts.norm(dim=0)
    floor = norms.max() * 1e-10
    current = torch.where(norms > floor, starts / norms.clamp(min=floor), 0.0)
    basis = [current]
    diagonal, off_diagonal = [], []
    for _ in range(min(steps, len(starts))):
        image = product(current)
        diagonal.append((current * image).sum(0))
        for _ in range(2):  # twice is enough
            for vector in basis:
                image = image - vector * (vector * image).sum(0)
        size = image.norm(dim=0)
        scale = torch.stack(diagonal).abs().amax(0)
        ended = size <= 1e-6 * scale if image.dtype == torch.float32 else size <= 1e-12 * scale
        size = torch.where(ended, 0.0, size)  # an invariant subspace is found: this column's quadrature is exact
        off_diagonal.append(size)
        current = torch.where(ended, 0.0, image / torch.where(ended, 1.0, size))
        basis.append(current)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, dim=1).double())
    if len(diagonal) > 1:
        side = torch.stack(off_diagonal[:-1], dim=1).double()
        tridiagonal = tridiagonal + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    if not tridiagonal.isfinite().all():
        raise NotFiniteError("product", "K V", "a matrix K of finite numbers")
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    weights = vectors[:, 0, :].square() * norms.double().square()[:, None]
    nodes = nodes.clamp(min=0.0)
    return torch.stack(((weights * nodes).sum(1), -(weights * torch.special.entr(nodes)).sum(1)), dim=1)


def _float64(name: str, array: Any) -> Tensor:
    if isinstance(array, Tensor):
        found = array.detach()
    else:
        plain = np.asarray(array)
        found = torch.tensor(plain if plain.dtype.kind == "c" else plain.astype(np.float64))
    if found.is_complex():
        raise ValueError(f"{name}: got dtype {found.dtype}, allowed: real numbers")
    return found.double()
