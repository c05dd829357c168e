"""The identity whose backward pass adds the penalty's gradient, against that gradient by hand in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sphere_rl as sp
from sphere_rl.penalty import Scale, sphere_penalty, weighted_features

torch.set_num_threads(1)
N, E, H = 6, 3, 4


def routed(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features [6, 3, 4] and top-2 gates [6, 3]."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(N, E, generator=generator, dtype=torch.float64)
    gates = gates.scatter(1, gates.argmin(1, keepdim=True), 0.0)
    features = torch.randn(N, E, H, generator=generator, dtype=torch.float64)
    return features.to(dtype), (gates / gates.sum(1, keepdim=True)).to(dtype)


def inputs(form: str, seed: int = 0) -> tuple[Tensor, ...]:
    features, gates = routed(seed)
    return (features, gates) if form == "routed" else (weighted_features(features, gates),)


def loss(*arrays: Any) -> Any:
    """A loss of what `regularize` returns, in the arrays' own library."""
    if len(arrays) == 1:
        return (arrays[0] ** 3).sum()
    features, gates = arrays
    return ((features * gates[:, :, None]).sum((1, 2)) ** 2).sum() + (gates**2).sum()


def regularized(*arrays: Any, **options: Any) -> Any:
    found = sp.regularize(*arrays, **options)
    return loss(*found) if isinstance(found, tuple) else loss(found)


def by_hand(tensors: tuple[Tensor, ...], scale: Any, rho: float | None, strength: float | None) -> list[Tensor]:
    """g + rho · ‖g‖/‖∇L‖ · ∇L, or g + strength · ∇L, as it is written."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    incoming = torch.autograd.grad(loss(*leaves), leaves)
    phi = weighted_features(*leaves) if len(leaves) == 2 else leaves[0]
    own = torch.autograd.grad(sphere_penalty(phi, scale), leaves)
    if rho is not None:
        norms = [torch.cat([part.flatten() for part in parts]).norm() for parts in (incoming, own)]
        strength = float(rho * norms[0] / norms[1])
    assert strength is not None
    return [g + strength * p for g, p in zip(incoming, own, strict=True)]


@pytest.mark.parametrize("amount", [{"rho": 0.3}, {"strength": 2.0}, {}])
@pytest.mark.parametrize("scale", ["literal", "free"])
@pytest.mark.parametrize("form", ["routed", "phi"])
def test_gradients_of_both_libraries_are_the_ones_by_hand(form, scale, amount):
    tensors = inputs(form)
    expected = by_hand(tensors, scale, amount.get("rho", None if "strength" in amount else 0.1), amount.get("strength"))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = regularized(*leaves, scale=scale, **amount)
    assert torch.equal(value, loss(*tensors))
    for found, wanted in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(tensor.numpy()) for tensor in tensors]
        function = jax.value_and_grad(
            lambda *a: regularized(*a, scale=scale, **amount), argnums=tuple(range(len(arrays)))
        )
        jax_value, gradients = jax.jit(function)(*arrays)
    np.testing.assert_allclose(jax_value, value.detach(), rtol=1e-14)
    for array, wanted in zip(gradients, expected, strict=True):
        assert array.dtype == np.float64
        np.testing.assert_allclose(array, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("amount", [{"rho": 0.3}, {"strength": 2.0}])
def test_nothing_to_add_adds_nothing(amount):
    """No features: ∇L = 0. An even spectrum: ∇L = 0. A loss without gradient: nothing to take a share of."""
    zero, even = torch.zeros(5, 3), 2 * torch.eye(4)
    for phi in (zero, even):
        for scale in get_args(Scale):
            leaf = phi.clone().requires_grad_()
            (found,) = torch.autograd.grad((sp.regularize(leaf, scale=scale, **amount) * 3).sum(), leaf)
            torch.testing.assert_close(found, torch.full_like(phi, 3.0), rtol=1e-6, atol=0)
            array = jax.grad(lambda x, scale=scale: (sp.regularize(x, scale=scale, **amount) * 3).sum())(
                phi.numpy() + jnp.zeros(())
            )
            np.testing.assert_allclose(array, 3.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("samples", [1, 300])
def test_round_off_gets_no_share(samples, dtype):
    """All samples alike: A has one eigenvalue, tr A, and the penalty of A/tr A is 1 − 1/m wherever they are."""
    for seed in range(8):
        features, gates = (tensor[:1].expand(samples, *tensor.shape[1:]) for tensor in routed(seed, dtype))
        for given in ((features, gates), (weighted_features(features, gates),)):
            leaves = [tensor.clone().requires_grad_() for tensor in given]
            outputs = sp.regularize(*leaves, rho=1.0)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            for found in torch.autograd.grad(sum((3 * one.sum() for one in outputs), torch.zeros(())), leaves):
                assert (found == 3).all()
            arrays = [jnp.asarray(tensor.float().numpy()) for tensor in given]
            found = jax.vjp(lambda *a: sp.regularize(*a, rho=1.0), *arrays)[1]
            threes = tuple(jnp.full_like(array, 3.0) for array in arrays)
            assert all((one == 3).all() for one in found(threes if len(threes) == 2 else threes[0]))


def test_little_is_not_nothing():
    """A spectrum that is even but for a millionth has a direction, in float64."""
    phi = torch.linalg.qr(inputs("phi")[0].T)[0].T * (1 + 1e-6 * torch.arange(N, dtype=torch.float64))[:, None]
    expected = by_hand((phi,), "free", 0.3, None)
    leaf = phi.clone().requires_grad_()
    (found,) = torch.autograd.grad(regularized(leaf, rho=0.3), leaf)
    torch.testing.assert_close(found, expected[0], rtol=1e-6, atol=1e-6)


def test_no_incoming_gradient_gets_no_share_but_the_strength():
    features, gates = (tensor.requires_grad_() for tensor in routed())
    for found in torch.autograd.grad((sp.regularize(features, gates)[0] * 0).sum(), (features, gates)):
        assert not found.any()
    value = (sp.regularize(features, gates, strength=1.0)[1] * 0).sum()  # the features are used nowhere else
    wanted = torch.autograd.grad(sphere_penalty(weighted_features(features, gates), "free"), (features, gates))
    torch.testing.assert_close(torch.autograd.grad(value, (features, gates)), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exponent", [-30, -12, 12])
@pytest.mark.parametrize("scale", ["literal", "free"])
def test_the_share_is_exact_for_float32_features_of_any_size(scale, exponent):
    """∇ of the literal penalty goes with the cube: 1e-90 and 1e36 · 1e3 are no float32 numbers."""
    phi = inputs("phi")[0]
    leaf = (phi * 10.0**exponent).float().requires_grad_()
    (found,) = torch.autograd.grad((sp.regularize(leaf, rho=0.5, scale=scale) * phi.float()).sum(), leaf)
    own = torch.autograd.grad(sphere_penalty(phi.requires_grad_(), scale), phi)[0]
    wanted = (phi + 0.5 * phi.norm() / own.norm() * own).detach().float()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_broken_features_stay_visible():
    phi = torch.ones(3, 4)
    phi[1, 2] = torch.nan
    leaf = phi.requires_grad_()
    assert torch.autograd.grad(sp.regularize(leaf).sum(), leaf)[0].isnan().any()


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2]
)
def test_each_keeps_its_dtype(dtypes):
    tensors = routed()
    wanted = by_hand(tensors, "literal", 0.5, None)
    leaves = [t.to(dtype).requires_grad_() for t, dtype in zip(tensors, dtypes, strict=True)]
    outputs = sp.regularize(*leaves, rho=0.5, scale="literal")
    assert [output.dtype for output in outputs] == list(dtypes)
    gradients = torch.autograd.grad(loss(*(output.float() for output in outputs)), leaves)
    assert [gradient.dtype for gradient in gradients] == list(dtypes)
    for found, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05)
    array = jax.grad(lambda x: sp.regularize(x).sum())(jnp.ones((2, 3), jnp.bfloat16))
    assert array.dtype == jnp.bfloat16


def test_a_layer_behind_may_work_in_place_and_evaluation_costs_nothing():
    phi = inputs("phi")[0].requires_grad_()
    wanted = torch.autograd.grad(sp.regularize(phi).relu().sum(), phi)[0]
    assert torch.equal(torch.autograd.grad(sp.regularize(phi).relu_().sum(), phi)[0], wanted)
    with torch.no_grad():
        assert sp.regularize(phi) is phi


@pytest.mark.parametrize("form", ["routed", "phi"])
def test_torch_func_and_vmap_treat_every_slice_as_a_batch_of_its_own(form):
    first, second = inputs(form), inputs(form, seed=1)
    positions = tuple(range(len(first)))
    expected = [by_hand(tensors, "free", 0.1, None) for tensors in (first, second)]
    stacked = [torch.stack(pair) for pair in zip(first, second, strict=True)]
    pull = torch.func.vjp(regularized, *first)[1]
    by_vmap = torch.func.vmap(torch.func.grad(regularized, argnums=positions))(*stacked)
    leaves = [tensor.requires_grad_() for tensor in stacked]
    backward = torch.autograd.grad(torch.func.vmap(regularized)(*leaves).sum(), leaves)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(tensor.detach().numpy()) for tensor in stacked]
        by_jax = jax.vmap(jax.grad(regularized, argnums=positions))(*arrays)
        scanned = jax.grad(lambda a: jax.lax.scan(lambda c, x: (c + regularized(*x), None), 0.0, a)[0])(tuple(arrays))
    for i, alone in enumerate(pull(torch.ones((), dtype=torch.float64))):
        wanted = torch.stack([expected[0][i], expected[1][i]])
        torch.testing.assert_close(alone, wanted[0], rtol=1e-12, atol=1e-14)
        for found in (by_vmap[i], backward[i]):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-12, atol=1e-14)
        for array in (by_jax[i], scanned[i]):
            np.testing.assert_allclose(array, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_and_accumulated_gradients(reentrant):
    phi = inputs("phi")[0].requires_grad_()
    (wanted,) = by_hand((phi,), "free", 0.1, None)
    for _ in range(2):
        value = checkpoint(regularized, phi, use_reentrant=reentrant)
        assert isinstance(value, Tensor)
        (value / 2).backward()
    assert phi.grad is not None
    torch.testing.assert_close(phi.grad, wanted, rtol=1e-12, atol=1e-14)


def test_autocast_changes_nothing_of_what_is_added():
    """Under bf16 autocast around forward and backward, the penalty's products are still float32's."""
    phi = inputs("phi")[0].float().requires_grad_()
    wanted = by_hand((phi.double(),), "literal", 0.5, None)[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        value = regularized(phi, rho=0.5, scale="literal")
        (found,) = torch.autograd.grad(value, phi)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # features in bf16 beside routing weights in float32, as softmax gives
        layer = torch.nn.Linear(5, E * H)
        features = layer(torch.ones(N, 5)).reshape(N, E, H)
        output, gates = sp.regularize(features, torch.softmax(features.float().sum(2), 1))
    assert (output.dtype, gates.dtype) == (torch.bfloat16, torch.float32)
    (output.float().sum() + gates.square().sum()).backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


def test_a_scaled_loss_scales_the_share():
    """What a GradScaler multiplies it divides out again; an overflow it must see stays one."""
    phi = inputs("phi")[0].requires_grad_()
    (once,) = torch.autograd.grad(regularized(phi), phi)
    (scaled,) = torch.autograd.grad(65536 * regularized(phi), phi)
    torch.testing.assert_close(scaled / 65536, once, rtol=1e-12, atol=1e-14)
    (overflown,) = torch.autograd.grad(torch.inf * regularized(phi), phi)
    assert not overflown.isfinite().any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own, for jvp
def test_second_derivatives_and_forward_mode_are_refused_in_one_line():
    phi = inputs("phi")[0].requires_grad_()
    (gradient,) = torch.autograd.grad(regularized(phi), phi, create_graph=True)
    calls = [
        lambda: gradient.sum().backward(),
        lambda: torch.func.grad(lambda x: torch.func.grad(regularized)(x).sum())(phi.detach()),
        lambda: jax.grad(lambda x: jax.grad(regularized)(x).sum())(jnp.ones((2, 3))),
        lambda: torch.func.jvp(regularized, (phi.detach(),), (phi.detach(),)),
        lambda: jax.jvp(regularized, (jnp.ones((2, 3)),), (jnp.ones((2, 3)),)),
    ]
    for call, message in zip(calls, ["second derivative"] * 3 + ["forward mode", "forward-mode"], strict=True):
        with pytest.raises((NotImplementedError, TypeError), match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


COMPILED = """
import warnings
import torch, sphere_rl as sp
warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
def loss(features, gates):
    features, gates = sp.regularize(features, gates, rho=0.5)
    phi = sp.regularize(features[:, 0] * gates[:, :1], strength=2.0, scale="literal")
    return (features.sin() * gates[:, :, None]).sum() + phi.cos().sum()
torch.manual_seed(0)
given = torch.randn(6, 3, 4, requires_grad=True), torch.rand(6, 3, requires_grad=True)
wanted = torch.autograd.grad(loss(*given), given)
for backend in ("eager", "aot_eager"):
    found = torch.autograd.grad(torch.compile(loss, backend=backend, fullgraph=True)(*given), given)
    torch.testing.assert_close(found, wanted)
"""


def test_torch_compile_takes_it_into_one_graph():
    """In a process of its own: the tests' shape checker is no part of what users compile."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


DISTRIBUTED = """
import tempfile, torch, sphere_rl as sp
from torch import distributed, nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(5, 8), nn.Linear(8, 2)
    def forward(self, x):
        return self.out(sp.regularize(self.hidden(x).relu(), rho=0.5))
with tempfile.TemporaryDirectory() as folder:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    net, x = Net(), torch.randn(16, 5)
    wanted = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    nn.parallel.DistributedDataParallel(net)(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], list(wanted))
    distributed.destroy_process_group()
"""


def test_distributed_data_parallel():
    subprocess.run([sys.executable, "-c", DISTRIBUTED], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


PHI = torch.ones(2, 3)
BAD: dict[str, Any] = {"scale": "trace"}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sp.regularize(np.ones((2, 3))), "features: got numpy.ndarray, allowed: arrays that have gradients"),
        (lambda: sp.regularize(torch.ones(2, 3, 4), jnp.ones((2, 3))), "features, gates: got torch.Tensor, jax"),
        (lambda: sp.regularize([[1.0]]), "features: got builtins.list"),
        (lambda: sp.regularize(torch.ones(2, 3, 4)), r"features: got shape \(2, 3, 4\), allowed: \[N, m\]"),
        (lambda: sp.regularize(PHI, torch.ones(2, 3)), r"features: got shape \(2, 3\), allowed: \[N, E, H\]"),
        (lambda: sp.regularize(torch.ones(2, 3, 4), torch.ones(2, 4)), r"gates: got shape \(2, 4\), allowed: \(2, 3\)"),
        (lambda: sp.regularize(torch.ones(0, 4)), r"features: got shape \(0, 4\)"),
        (lambda: sp.regularize(PHI.long()), "features: got dtype torch.int64, allowed: a real floating dtype"),
        (lambda: sp.regularize(jnp.ones((2, 3), jnp.int32)), "features: got dtype int32"),
        (lambda: sp.regularize(PHI, rho=-0.1), "rho: got -0.1, allowed: a finite number ≥ 0"),
        (lambda: sp.regularize(PHI, rho=float("nan")), "rho: got nan"),
        (lambda: sp.regularize(PHI, strength=float("inf")), "strength: got inf"),
        (lambda: sp.regularize(PHI, rho=True), "rho: got True"),
        (lambda: sp.regularize(PHI, rho=0.1, strength=1.0), "strength: got 1.0 beside rho 0.1, allowed: one"),
        (lambda: sp.regularize(PHI, **BAD), "scale: got 'trace', allowed: literal, free"),
    ],
)  # fmt: skip
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
