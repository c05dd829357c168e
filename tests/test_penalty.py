"""The penalty against its literal formula, finite differences, its laws, and itself on three libraries."""

import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sphere_rl.penalty import (
    gate_penalty,
    layers_penalty,
    per_expert_penalty,
    sphere_penalty,
    weighted_features,
)

torch.set_num_threads(1)
SHAPES = [(7, 4), (4, 7), (5, 5), (1, 6), (6, 1)]


def literal(phi: np.ndarray) -> float:
    """‖A − (tr A/m) I‖_F² as it is written, always with the m×m Gram."""
    samples, m = phi.shape
    gram = phi.T @ phi / samples
    return float(np.linalg.norm(gram - np.trace(gram) / m * np.eye(m), "fro") ** 2)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def routed(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [6, 3, 4] and top-2 gates [6, 3]."""
    gates = np.abs(draw(6, 3, seed=seed + 1))
    gates[np.arange(6), gates.argmin(axis=1)] = 0.0
    return draw(6, 3, 4, seed=seed), gates / gates.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_literal_formula(shape):
    phi = draw(*shape)
    np.testing.assert_allclose(sphere_penalty(phi), literal(phi), rtol=1e-12, atol=1e-14)


def test_hand_arithmetic():
    # A = diag(1, 4)·1/2 -> eigenvalues 0.5, 2, mean 1.25: (0.75)² + (0.75)² = 1.125.
    assert float(sphere_penalty(np.array([[1.0, 0.0], [0.0, 2.0]]))) == 1.125
    # One sample of three features: A has eigenvalues 9, 0, 0 and mean 3: 36 + 9 + 9.
    assert float(sphere_penalty(np.array([[1.0, 2.0, 2.0]]))) == pytest.approx(54.0, abs=1e-12)


def test_isotropic_features_cost_nothing_even_in_float32():
    orthogonal = np.linalg.qr(draw(64, 16))[0].astype(np.float32) * 1000
    # ‖A‖² − tr²/m would leave a residue near 1e-7·‖A‖² ≈ 400 here.
    assert 0 <= float(sphere_penalty(orthogonal)) < 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 10.0), st.integers(0, 2**16))
def test_scale_law_and_rotation_invariance(samples, m, scale, seed):
    phi = draw(samples, m, seed=seed)
    value = float(sphere_penalty(phi))
    rotation = np.linalg.qr(draw(m, m, seed=seed + 1))[0]
    assert value == pytest.approx(literal(phi), rel=1e-9, abs=1e-12)
    assert float(sphere_penalty(scale * phi)) == pytest.approx(scale**4 * value, rel=1e-9, abs=1e-9)
    assert float(sphere_penalty(phi @ rotation)) == pytest.approx(value, rel=1e-9, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.floats(0.01, 0.9), st.integers(0, 2**16))
def test_one_gradient_step_on_the_gram_contracts_eigenvalues_to_their_mean(m, beta, seed):
    """A = ΦᵀΦ/N with Φ = √m·A^½ makes the penalty a function of A; a step shrinks each λ_i − λ̄ by 1 − β."""
    root = draw(m, m, seed=seed)
    gram = torch.from_numpy(root @ root.T).requires_grad_()
    phi = torch.linalg.cholesky(gram) * m**0.5  # [m, m] = L √m, so ΦΦᵀ/m = A: the same spectrum as ΦᵀΦ/m
    (gradient,) = torch.autograd.grad(sphere_penalty(phi), gram)
    gradient = (gradient + gradient.T) / 2
    before = torch.linalg.eigvalsh(gram.detach())
    after = torch.linalg.eigvalsh(gram.detach() - beta / 2 * gradient)
    expected = (1 - beta) * before + beta * before.mean()
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_by_finite_differences(shape):
    phi = torch.from_numpy(draw(*shape)).requires_grad_()
    assert torch.autograd.gradcheck(sphere_penalty, phi)
    assert torch.autograd.gradgradcheck(sphere_penalty, phi)


def test_variants_pass_gradients_to_features_and_gates():
    features, gates = (torch.from_numpy(a).requires_grad_() for a in routed())
    assert torch.autograd.gradcheck(per_expert_penalty, (features, gates))
    assert torch.autograd.gradcheck(lambda f, g: sphere_penalty(weighted_features(f, g)), (features, gates))
    assert torch.autograd.gradcheck(gate_penalty, gates)


def test_weighted_features_scales_and_concatenates():
    features = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    gates = np.array([[0.5, 0.0], [0.25, 0.75]])
    expected = [[0.5, 1.0, 0.0, 0.0], [1.25, 1.5, 5.25, 6.0]]
    np.testing.assert_array_equal(weighted_features(features, gates), expected)


def test_variants_against_literal_sums():
    features, gates = routed()
    blocks = [features[:, e] * gates[:, e, None] for e in range(3)]
    assert float(per_expert_penalty(features, gates)) == pytest.approx(sum(map(literal, blocks)), rel=1e-12)
    assert float(layers_penalty(blocks)) == pytest.approx(sum(map(literal, blocks)), rel=1e-12)
    assert float(layers_penalty([gates, blocks[0]])) == pytest.approx(literal(gates) + literal(blocks[0]), rel=1e-12)
    gram = gates.T @ gates / len(gates)
    by_hand = (np.linalg.norm(gram, "fro") ** 2 - np.trace(gram) ** 2 / 3) / 3
    assert float(gate_penalty(gates)) == pytest.approx(by_hand, rel=1e-12)


def test_joint_penalty_holds_the_cross_expert_terms():
    """Joint = per-expert Grams + 2·Σ_{e<f}‖Φ_eᵀΦ_f/N‖² + the spread of the experts' traces."""
    features, gates = routed()
    blocks = [features[:, e] * gates[:, e, None] for e in range(3)]
    cross = sum(2 * np.linalg.norm(blocks[e].T @ blocks[f] / 6, "fro") ** 2 for e in range(3) for f in range(e + 1, 3))
    traces = np.array([np.sum(b * b) / 6 for b in blocks])
    spread = np.sum(traces**2) / 4 - traces.sum() ** 2 / 12
    joint = float(sphere_penalty(weighted_features(features, gates)))
    assert joint == pytest.approx(float(per_expert_penalty(features, gates)) + cross + spread, rel=1e-12)


FUNCTIONS = {
    "sphere": lambda f, g, scale: sphere_penalty(weighted_features(f, g), scale),
    "layers": lambda f, g, scale: layers_penalty([f[:, 0], f[:, 1]], scale) + 0 * g.sum(),
    "per_expert": per_expert_penalty,
    "gate": lambda f, g, scale: gate_penalty(g, scale) + 0 * f.sum(),
}


@pytest.mark.parametrize("scale", ["literal", "free"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numpy_torch_and_jax_agree_in_value_and_gradient(name, scale):
    function = partial(FUNCTIONS[name], scale=scale)
    arrays = routed()
    tensors = [torch.from_numpy(a).requires_grad_() for a in arrays]
    value = function(*tensors)
    gradients = torch.autograd.grad(value, tensors)
    functional = torch.func.grad(function, argnums=(0, 1))(*tensors)
    with jax.enable_x64(True):
        jax_arrays = [jnp.asarray(a) for a in arrays]
        jax_value, jax_gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(*jax_arrays)
    assert isinstance(value, torch.Tensor)
    assert isinstance(jax_value, jax.Array)
    np.testing.assert_allclose(value.detach(), function(*arrays), rtol=1e-12)
    np.testing.assert_allclose(jax_value, function(*arrays), rtol=1e-12)
    for torch_gradient, func_gradient, jax_gradient in zip(gradients, functional, jax_gradients, strict=True):
        np.testing.assert_allclose(torch_gradient, np.asarray(jax_gradient), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(func_gradient.detach(), torch_gradient, rtol=1e-12, atol=1e-14)


def by_eigenvalues(phi: np.ndarray) -> float:
    """Σ_i (p_i − 1/m)², p the m eigenvalues of A over their sum."""
    values = np.linalg.eigvalsh(phi.T @ phi / len(phi))
    return float(np.sum((values / values.sum() - 1 / len(values)) ** 2))


def free_gradient(phi: np.ndarray) -> np.ndarray:
    """4/(N t²) (S − (‖S‖²/t) I) Φ with S = ΦΦᵀ/N and t = tr S, as it is written."""
    gram = phi @ phi.T / len(phi)
    trace = np.trace(gram)
    return 4 / (len(phi) * trace**2) * (gram - np.sum(gram**2) / trace * np.eye(len(phi))) @ phi


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(-18, 18), st.integers(0, 2**16))
def test_scale_free_is_the_spectrums_shape_alone(samples, m, exponent, seed):
    phi = draw(samples, m, seed=seed)
    value = float(sphere_penalty(phi, "free"))
    assert value == pytest.approx(by_eigenvalues(phi), rel=1e-9, abs=1e-12)
    assert float(sphere_penalty(10**exponent * phi, "free")) == pytest.approx(value, rel=1e-9, abs=1e-14)
    gram = phi.T @ phi
    assert 1 / (value + 1 / m) == pytest.approx(np.trace(gram) ** 2 / np.sum(gram**2), rel=1e-9)
    assert max(0, 1 / samples - 1 / m) - 1e-12 <= value <= 1 - 1 / m + 1e-12
    rotation = np.linalg.qr(draw(m, m, seed=seed + 1))[0]
    assert float(sphere_penalty(phi @ rotation, "free")) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_scale_free_hand_arithmetic():
    # Eigenvalues 0.5 and 2 of the sum 2.5: shares 0.2 and 0.8, each 0.3 off 1/2.
    assert float(sphere_penalty(np.array([[1.0, 0.0], [0.0, 2.0]]), "free")) == pytest.approx(0.18, abs=1e-15)
    # One sample of three features: shares 1, 0, 0: 4/9 + 1/9 + 1/9.
    assert float(sphere_penalty(np.array([[1.0, 2.0, 2.0]]), "free")) == pytest.approx(2 / 3, abs=1e-15)
    # Experts [1, 0] and [0, 0] on one state: shares 1, 0 of the first, nothing of the second.
    features, gates = np.array([[[2.0, 0.0], [5.0, 5.0]]]), np.array([[1.0, 0.0]])
    assert float(per_expert_penalty(features, gates, "free")) == pytest.approx(0.5, abs=1e-15)
    assert float(gate_penalty(gates, "free")) == pytest.approx(0.25, abs=1e-15)
    assert float(layers_penalty([gates, features[:, 0]], "free")) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_scale_free_gradients_turn_and_do_not_shrink(shape):
    """∇ is the formula's, ⟨∇, Φ⟩ = 0, and finite differences agree; the literal ⟨∇, Φ⟩ is 4 times the penalty."""
    phi = torch.from_numpy(draw(*shape)).requires_grad_()
    free = partial(sphere_penalty, scale="free")
    (gradient,) = torch.autograd.grad(free(phi), phi)
    np.testing.assert_allclose(gradient, free_gradient(phi.detach().numpy()), rtol=1e-10, atol=1e-14)
    assert abs((gradient * phi).sum().item()) < 1e-14
    assert torch.autograd.gradcheck(free, phi)
    assert torch.autograd.gradgradcheck(free, phi)
    value = sphere_penalty(phi)
    (gradient,) = torch.autograd.grad(value, phi)
    assert (gradient * phi).sum().item() == pytest.approx(4 * value.item())


def test_scale_free_variants_by_finite_differences():
    features, gates = (torch.from_numpy(a).requires_grad_() for a in routed())
    assert torch.autograd.gradcheck(partial(per_expert_penalty, scale="free"), (features, gates))
    assert torch.autograd.gradcheck(partial(gate_penalty, scale="free"), gates)
    blocks = [(features[:, e] * gates[:, e, None]).detach().numpy() for e in range(3)]
    assert per_expert_penalty(features, gates, "free").item() == pytest.approx(sum(map(by_eigenvalues, blocks)))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (64, 64)])
@pytest.mark.parametrize("exponent", [-18, -9, 0, 9, 18])
def test_scale_free_in_float32_at_every_magnitude(shape, exponent):
    phi = (draw(*shape) * 10.0**exponent).astype(np.float32)
    exact, gradient = by_eigenvalues(phi.astype(float)), free_gradient(phi.astype(float))
    assert sphere_penalty(phi, "free") == pytest.approx(exact, rel=1e-5)
    tensor = torch.from_numpy(phi).requires_grad_()
    value = sphere_penalty(tensor, "free")
    (torch_gradient,) = torch.autograd.grad(value, tensor)
    assert value.item() == pytest.approx(exact, rel=1e-5)
    jax_value, jax_gradient = jax.jit(jax.value_and_grad(partial(sphere_penalty, scale="free")))(jnp.asarray(phi))
    assert float(jax_value) == pytest.approx(exact, rel=1e-5)
    for found in (torch_gradient, jax_gradient):
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-5 * np.abs(gradient).max())


def test_scale_free_of_isotropic_features_does_not_cancel():
    orthogonal = np.linalg.qr(draw(64, 16))[0].astype(np.float32) * 1000
    assert 0 <= float(sphere_penalty(orthogonal, "free")) < 1e-13  # ‖A‖²/tr² − 1/m leaves 1e-9


ZEROS = {
    "sphere": lambda f, g: sphere_penalty(weighted_features(f, g), "free"),
    "wide": lambda f, g: sphere_penalty(f.reshape(-1, 4) + 0 * g.sum(), "free"),
    "per_expert": lambda f, g: per_expert_penalty(f, g, "free"),
    "gate": lambda f, g: gate_penalty(0 * g, "free") + 0 * f.sum(),
}


@pytest.mark.parametrize("name", ZEROS)
def test_scale_free_of_nothing_is_nothing(name):
    function, (features, gates) = ZEROS[name], (np.zeros((6, 3, 4)), routed()[1])
    assert float(function(features, gates)) == 0.0
    tensors = [torch.from_numpy(a).requires_grad_() for a in (features, gates)]
    value = function(*tensors)
    found = [
        *torch.autograd.grad(value, tensors),
        *(gradient.detach() for gradient in torch.func.grad(function, argnums=(0, 1))(*tensors)),
        *jax.jit(jax.grad(function, argnums=(0, 1)))(jnp.asarray(features), jnp.asarray(gates)),
    ]
    assert value.item() == 0.0
    for gradient in found:
        assert not np.asarray(gradient).any()


def test_scale_free_per_expert_leaves_out_the_dead_one():
    features, gates = routed()
    features[:, 1] = 0
    blocks = [features[:, e] * gates[:, e, None] for e in (0, 2)]
    tensors = [torch.from_numpy(a).requires_grad_() for a in (features, gates)]
    value = per_expert_penalty(*tensors, scale="free")
    assert value.item() == pytest.approx(sum(map(by_eigenvalues, blocks)), rel=1e-12)
    of_features, _ = torch.autograd.grad(value, tensors)
    assert not of_features[:, 1].any()
    assert of_features.isfinite().all()
    assert of_features[:, 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scale_free_hides_no_broken_feature(bad):
    phi = torch.ones(3, 4)
    phi[1, 2] = bad
    assert sphere_penalty(phi, "free").isnan()


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_every_float_dtype_gives_float32_at_least(shape):
    phi = draw(*shape)
    exact = literal(phi)
    for dtype, wide, tolerance in [
        (np.float16, np.float32, 1e-3), (np.float32, np.float32, 1e-5), (np.float64, np.float64, 1e-12),
    ]:  # fmt: skip
        value = sphere_penalty(phi.astype(dtype))
        assert value.dtype == wide
        assert float(value) == pytest.approx(exact, rel=tolerance)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        value = sphere_penalty(torch.from_numpy(phi).to(dtype))
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(exact, rel=5e-2)
    value = sphere_penalty(jnp.asarray(phi, dtype=jnp.bfloat16))
    assert value.dtype == jnp.float32
    assert float(value) == pytest.approx(exact, rel=5e-2)


@pytest.mark.parametrize("size", [0.01, 4.0])
def test_a_share_of_the_loss_in_half_precision(size):
    """The penalty of small features is below float16's smallest number, and of large ones above its largest."""
    phi = (size * torch.from_numpy(draw(64, 256))).half().requires_grad_()
    penalty = sphere_penalty(phi)
    assert penalty.item() == pytest.approx(float(literal(phi.detach().double().numpy())), rel=1e-4)
    (0.05 / (penalty.detach() + 1e-12) * penalty).backward()
    exact = phi.detach().double().requires_grad_()
    (0.05 * sphere_penalty(exact).log()).backward()
    assert phi.grad is not None
    torch.testing.assert_close(phi.grad.double(), exact.grad, rtol=0.05, atol=1e-6)


BAD: dict[str, Any] = {"text": "trace", "empty": "", "none": None}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sphere_penalty(np.ones((2, 3), dtype=np.int64)), "phi: got dtype int64"),
        (lambda: sphere_penalty([[1.0]]), "phi: got list, allowed: an array of NumPy, PyTorch or JAX"),
        (lambda: sphere_penalty(np.ones(3)), r"phi: got shape \(3,\), allowed: \[N, m\]"),
        (lambda: sphere_penalty(torch.ones(2, 3, 4)), r"phi: got shape \(2, 3, 4\), allowed: \[N, m\]"),
        (lambda: sphere_penalty(torch.ones(0, 3)), r"phi: got shape \(0, 3\)"),
        (lambda: gate_penalty(jnp.ones((2, 3), dtype=jnp.int32)), "gates: got dtype int32"),
        (lambda: weighted_features(np.ones((2, 3)), np.ones((2, 3))), r"features: got shape \(2, 3\)"),
        (lambda: per_expert_penalty(np.ones((2, 3, 4)), np.ones((2, 4))), r"gates: got shape \(2, 4\)"),
        (lambda: layers_penalty([]), "phis: got list, allowed: a list of at least one array"),
        (lambda: sphere_penalty(np.ones((2, 3)), BAD["text"]), "scale: got 'trace', allowed: literal, free"),
        (lambda: per_expert_penalty(*routed(), scale=BAD["empty"]), "scale: got '', allowed: literal, free"),
        (lambda: gate_penalty(jnp.ones((2, 3)), BAD["none"]), "scale: got None, allowed: literal, free"),
    ],
)
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_gram_formed_is_the_smaller_one():
    """64 samples of 2 560 features: the m×m Gram would be 26 MB in float32, the N×N one is 16 kB."""
    sizes = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    phi = torch.randn(64, 2560, generator=torch.Generator().manual_seed(0))
    with Recorder():
        sphere_penalty(phi)
    assert max(sizes) == phi.numel()


def test_importing_loads_neither_torch_nor_jax():
    code = "import sys, sphere_rl.penalty; assert not {'torch', 'jax'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
