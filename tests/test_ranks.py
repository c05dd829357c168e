"""Effective ranks against hand arithmetic and their laws; the estimate against the exact value."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_rl.errors import NotFiniteError
from sphere_rl.spectrum.ranks import (
    effective_rank,
    estimate_effective_rank,
    gram_effective_rank,
    gram_eigenvalues,
    participation_ratio,
)

torch.set_num_threads(1)
SPECTRA = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12).map(np.array)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(size: int, rank: int, seed: int = 0) -> torch.Tensor:
    root = draw(size, rank, seed=seed)
    return root @ root.T


def exact_rank(kernel: torch.Tensor) -> float:
    return effective_rank(torch.linalg.eigvalsh(kernel))


def test_hand_arithmetic():
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0, rel=1e-12)
    assert effective_rank(np.array([5.0])) == pytest.approx(1.0, rel=1e-12)
    # p = (1/2, 1/4, 1/4): entropy 1/2·ln 2 + 2·1/4·ln 4 = 1.5·ln 2, so r_e = 2^1.5.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5, rel=1e-12)
    assert effective_rank(np.zeros(3)) == 0.0
    assert participation_ratio(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0, rel=1e-12)
    assert participation_ratio(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(16 / 6, rel=1e-12)
    assert participation_ratio(np.zeros(3)) == 0.0
    with pytest.raises(NotFiniteError, match="every value finite"):
        participation_ratio(np.array([1.0, np.inf]))


@pytest.mark.usefixtures("unchecked_shapes")
def test_any_array_of_the_right_axes():
    assert effective_rank([1, 1, 0]) == pytest.approx(2.0, rel=1e-12)
    assert gram_effective_rank(jnp.eye(3, dtype=jnp.bfloat16)) == pytest.approx(3.0, rel=1e-12)
    with pytest.raises(ValueError, match=r"^phi: got shape \(2, 3, 4\), allowed: \[N, m\]$"):
        gram_effective_rank(torch.ones(2, 3, 4))
    for complex_ones in (np.array([1j, 1.0]), torch.tensor([1j, 1.0])):
        with pytest.raises(ValueError, match=r"^eigenvalues: got dtype torch\.complex\d+, allowed: real numbers$"):
            effective_rank(complex_ones)


def test_round_off_below_zero_counts_as_zero_and_more_is_an_error():
    assert effective_rank(np.array([1.0, 1.0, -1e-7])) == pytest.approx(2.0, rel=1e-12)
    with pytest.raises(ValueError, match=r"eigenvalues: got -0\.5 beside 1"):
        effective_rank(np.array([1.0, -0.5]))
    with pytest.raises(NotFiniteError, match="every value finite"):
        effective_rank(np.array([1.0, np.nan]))


@settings(max_examples=60, deadline=None)
@given(SPECTRA, st.floats(1e-3, 1e3))
def test_bounds_and_invariance(spectrum, scale):
    rank = effective_rank(spectrum)
    assert 1 - 1e-12 <= rank <= len(spectrum) * (1 + 1e-12)
    assert effective_rank(spectrum[::-1] * scale) == pytest.approx(rank, rel=1e-9)
    ratio = participation_ratio(spectrum)
    assert ratio == pytest.approx(spectrum.sum() ** 2 / np.sum(spectrum**2), rel=1e-9)
    assert 1 - 1e-12 <= ratio <= rank * (1 + 1e-12), "Rényi entropies fall with their order"
    assert participation_ratio(spectrum[::-1] * scale) == pytest.approx(ratio, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(SPECTRA, min_size=1, max_size=4))
def test_block_diagonal_lemma(blocks):
    """r_e(⊕ M_b) = exp(H(α) + Σ α_b log r_e(M_b)), α_b the blocks' shares of the trace."""
    mass = np.array([block.sum() for block in blocks])
    share = mass / mass.sum()
    expected = np.exp(np.sum(share * (np.log([effective_rank(b) for b in blocks]) - np.log(share))))
    assert effective_rank(np.concatenate(blocks)) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16))
def test_kronecker_law(one, other, seed):
    """r_e(A ⊗ G) = r_e(A)·r_e(G), on the matrices themselves."""
    a, g = psd(4, one, seed), psd(5, other, seed + 1)
    assert exact_rank(torch.kron(a, g)) == pytest.approx(exact_rank(a) * exact_rank(g), rel=1e-8)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 6)])
def test_gram_from_either_side(shape):
    phi = draw(*shape)
    expected = torch.linalg.eigvalsh(phi.T @ phi / shape[0])[-min(shape) :]
    torch.testing.assert_close(gram_eigenvalues(phi), expected, rtol=1e-9, atol=1e-12)
    for features in (phi, phi.numpy(), jnp.asarray(phi.numpy(), dtype=jnp.float32)):
        assert gram_effective_rank(features) == pytest.approx(effective_rank(expected), rel=1e-6)


@pytest.mark.parametrize("size", [1e-310, 1e-170, 1e160, 1e307])
def test_a_gram_whose_entries_are_no_numbers_has_its_rank(size):
    """Φ is float64, and so must ΦᵀΦ be no longer."""
    phi = draw(12, 5) / 4
    assert gram_effective_rank(phi * size) == pytest.approx(gram_effective_rank(phi), rel=1e-4)
    assert torch.equal(gram_eigenvalues(phi * 2.0**40), gram_eigenvalues(phi) * 2.0**80)


def test_planted_rank():
    assert gram_effective_rank(draw(40, 1) @ draw(1, 30)) == pytest.approx(1.0, abs=1e-9)
    assert gram_effective_rank(torch.linalg.qr(draw(40, 7))[0] @ torch.linalg.qr(draw(7, 7))[0]) == pytest.approx(
        7.0, abs=1e-9
    )


def spectrum_matrix(values: torch.Tensor, seed: int) -> torch.Tensor:
    basis = torch.linalg.qr(draw(len(values), len(values), seed=seed))[0]
    return basis * values @ basis.T


def estimate(kernel: torch.Tensor, seed: int, **options: Any):
    generator = torch.Generator().manual_seed(seed)
    return estimate_effective_rank(
        lambda v: kernel.to(v.dtype) @ v, len(kernel), generator=generator, dtype=kernel.dtype, **options
    )


DECAYS = {
    "power law": torch.arange(1, 151).double() ** -1.5,
    "a few large": torch.cat((torch.tensor([50.0, 20.0, 5.0]).double(), torch.full((147,), 1e-2).double())),
    "flat": 1 + torch.linspace(0, 1, 150).double(),
    "low rank": torch.cat((torch.arange(1, 21).double(), torch.zeros(130).double())),
}


@pytest.mark.parametrize("name", DECAYS)
def test_estimate_covers_the_exact_value(name):
    """Over 30 seeds the estimates' mean is unbiased and the standard error is the spread that is really seen."""
    kernel = spectrum_matrix(DECAYS[name], seed=3)
    exact = effective_rank(DECAYS[name])
    estimates = [estimate(kernel, seed) for seed in range(30)]
    values = np.array([e.value for e in estimates])
    errors = np.array([e.standard_error for e in estimates])
    assert abs(values.mean() - exact) < 4 * values.std() / 30**0.5 + 1e-4 * exact
    assert values.std() < 0.05 * exact
    if errors.mean() > 1e-6 * exact:
        assert 0.6 < values.std() / np.sqrt(np.mean(errors**2)) < 1.6


def test_estimate_converges_with_probes_and_is_repeatable():
    kernel = spectrum_matrix(DECAYS["power law"], seed=4)
    exact = effective_rank(DECAYS["power law"])
    few, many = (
        np.sqrt(np.mean([(estimate(kernel, s, probes=p, deflated=8).value - exact) ** 2 for s in range(16)]))
        for p in (4, 144)
    )
    assert many < few / 3  # 1/√36 = 1/6 but for the noise of 16 repeats
    assert estimate(kernel, 0) == estimate(kernel, 0)
    assert estimate(kernel, 0) != estimate(kernel, 1)


def test_estimate_of_trivial_kernels():
    zero = estimate(torch.zeros(6, 6).double(), 0)
    assert (zero.value, zero.standard_error) == (0.0, 0.0)
    identity = estimate(torch.eye(50).double(), 0)
    assert identity.value == pytest.approx(50, rel=0.05)
    # As many deflated directions as dimensions leave nothing to chance.
    whole = estimate(psd(8, 8), 0, deflated=8, steps=8)
    assert whole.value == pytest.approx(exact_rank(psd(8, 8)), rel=1e-9)
    with pytest.raises(ValueError, match="probes, deflated, steps: got 1, 16, 24"):
        estimate(torch.eye(3).double(), 0, probes=1)


def test_estimate_in_float32():
    kernel = spectrum_matrix(DECAYS["power law"], seed=5).float()
    result = estimate(kernel, 0)
    assert result.value == pytest.approx(effective_rank(DECAYS["power law"]), abs=4 * result.standard_error + 1e-2)


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1e24, 1e34])
def test_estimate_in_float32_at_every_magnitude(size: float):
    """Squares of such numbers are beyond float32."""
    kernel = spectrum_matrix(DECAYS["power law"], seed=5).float()
    assert estimate(kernel * size, 0).value == pytest.approx(estimate(kernel, 0).value, rel=1e-4)
