"""The eNTK of modules and observations as other libraries have them, against Jacobians in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_ntk import ACTIONS, SAMPLES, Scaled, actor, draw, jacobian_kernel, relative, sequence
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sphere_rl.errors import NotFiniteError
from sphere_rl.integrations.hooks import track
from sphere_rl.integrations.regularizer import regularize
from sphere_rl.spectrum.jacobian import factorise
from sphere_rl.spectrum.kernel import entk, entk_jax, estimate_entk_rank
from sphere_rl.spectrum.ranks import effective_rank

torch.set_num_threads(1)


def test_dropout_takes_nothing_from_the_random_state():
    """Neither the mask of a policy in training, nor that of the hooks' own pass."""
    policy, observations = sequence(nn.Dropout(0.5)).double(), draw(SAMPLES, 5)
    random_state = torch.get_rng_state()
    entk(policy, observations)
    with track(policy, features="1") as tracker:
        tracker.metrics(observations)
    assert torch.equal(torch.get_rng_state(), random_state)


class Attention(nn.Module):
    """What PyTorch computes by fused kernels, which have first derivatives only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Linear(4, ACTIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x.view(-1, 5, 4)).mean(1))


@pytest.mark.parametrize("training", [True, False])
def test_attention(training):
    torch.manual_seed(0)
    policy, observations = Attention().double().train(training), draw(SAMPLES, 20)
    found = entk(policy, observations)
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(found, jacobian_kernel(policy, observations)) < 1e-9


class Parts(nn.Module):
    """A policy of several observations."""

    def __init__(self, structured: bool) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(3, 8), nn.Linear(2, 8), nn.Linear(8, ACTIONS)
        self.scale = nn.Parameter(torch.ones(ACTIONS), requires_grad=not structured)

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.scale * self.last((self.a(given["a"]) + self.b(given["b"])).tanh())


@pytest.mark.parametrize("structured", [True, False])
def test_observations_in_a_dict(structured):
    """Two parts of seven states each: 7 is N, and 2 is not."""
    torch.manual_seed(0)
    policy, flat = Parts(structured).double(), draw(7, 5)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = policy

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts({"a": x[:, :3], "b": x[:, 3:]})

    expected = jacobian_kernel(Flat(), flat)
    given = {"a": flat[:, :3], "b": flat[:, 3:]}
    assert relative(entk(policy, given), expected) < 1e-9
    with track(policy, features="last") as tracker:
        rank = tracker.metrics(given)["r_e_K"]
    assert rank == pytest.approx(effective_rank(torch.linalg.eigvalsh(expected)))


def test_works_inside_inference_mode_and_on_what_was_made_there():
    policy = actor("dense")
    with torch.inference_mode():
        observations = draw(SAMPLES, 5) + 0
        found = [entk(policy, observations)]
    found += [entk(policy, observations), entk(Scaled().double(), observations)]
    expected = [jacobian_kernel(one, observations.clone()) for one in (policy, policy, Scaled().double())]
    for one, wanted in zip(found, expected, strict=True):
        assert relative(one, wanted) < 1e-9


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((3, 4)), "ndarray of ndarray"),
        ({"a": torch.zeros(3, 4), "b": torch.zeros(2, 4)}, "dict of 2, 3"),
        (torch.tensor(1.0), "Tensor of Tensor"),
        ({}, "dict of nothing"),
    ],
)
def test_observations_that_are_none_are_refused_in_one_line(given, got):
    with pytest.raises(
        ValueError, match=rf"^observations: got {got}, allowed: a tensor \[N, …\], or several in a dict"
    ):
        entk(nn.Linear(4, 2), given)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_function_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^policy: got function, allowed: a torch\.nn\.Module$"):
        entk(lambda x: x, draw(3, 4))  # type: ignore[arg-type]


class OldFunction(torch.autograd.Function):
    """Of the kind that `torch.func` does not take."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(OldFunction.apply(self.first(x))))


class New(Old):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x).tanh()))


def test_what_torch_func_does_not_take_goes_by_plain_backward_passes():
    torch.manual_seed(0)
    old, new, x = Old().double(), New().double(), torch.randn(5, 4, dtype=torch.float64)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(entk(old, x), entk(new, x), rtol=1e-10, atol=1e-12)
    estimates = [estimate_entk_rank(policy, x, probes=4, deflated=4) for policy in (old, new)]
    assert estimates[0].value == pytest.approx(estimates[1].value, rel=1e-8)


class Moving(nn.Module):
    """A policy that is another after each pass, as power iterations make it, and draws a mask."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy, self.mask = policy, nn.Dropout(0.5)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.passes * self.mask(self.policy(x))


@pytest.mark.parametrize("kind", [lambda: nn.Linear(4, 2), New, Old])
def test_every_way_measures_the_policy_in_its_next_pass(kind: Any):
    torch.manual_seed(0)
    policy, x = Moving(kind().double()), torch.randn(5, 4, dtype=torch.float64)
    torch.manual_seed(3)
    kept = nn.Dropout(0.5)(torch.ones(5, 2, dtype=torch.float64)).flatten()
    torch.manual_seed(3)
    expected = entk(policy.policy, x) * kept * kept[:, None]
    torch.testing.assert_close(entk(policy, x), expected, rtol=1e-10, atol=1e-12)
    estimate = estimate_entk_rank(policy, x, probes=8, deflated=10).value
    assert estimate == pytest.approx(effective_rank(torch.linalg.eigvalsh(expected)), rel=1e-6)


@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
def test_half_precision_is_measured_in_float32(way: str):
    """In bfloat16 K is not positive: eigenvalues below zero by far more than round-off."""
    torch.manual_seed(4)
    policy = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(64, 8) + 2
    exact = effective_rank(torch.linalg.eigvalsh(entk(policy, x).double()))
    if way == "autocast":
        with torch.autocast("cpu"):
            kernel = entk(policy, x)
    else:
        policy.to(dtype := getattr(torch, way))
        before = [p.clone() for p in policy.parameters()]
        kernel = entk(policy, x.to(dtype))
        assert all(p.dtype == dtype and torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))
    assert kernel.dtype == torch.float32
    assert effective_rank(torch.linalg.eigvalsh(kernel.double())) == pytest.approx(exact, rel=0.02)


def test_a_tensor_with_a_small_part_is_not_left_out():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))
            self.small = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x) + 1e-3 * self.small

    torch.manual_seed(0)
    policy, x = Added(), torch.randn(6, 4)
    assert factorise(policy, x) is None
    assert factorise(policy.net, x) is not None


def test_an_output_that_no_trainable_tensor_moves_has_a_kernel_of_zeros():
    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.critic = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.actor(x)

    policy, x = Critic(), torch.randn(4, 3)
    assert torch.equal(entk(policy, x), torch.zeros(8, 8))
    assert estimate_entk_rank(policy, x).value == 0.0
    with track(policy, features="actor") as t:
        assert t.metrics(x)["r_e_K"] == 0.0


def test_a_kernel_that_is_not_finite_is_said_in_one_line():
    policy = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        policy.get_parameter("2.weight")[0, 0] = torch.nan
    with track(policy, features="1") as t, pytest.raises(NotFiniteError, match="kernel: got an entry that is not"):
        t.metrics(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("apply", "params", "message"),
    [
        (lambda p, x: (x @ p)[:, 0], jnp.ones((3, 2)), r"apply: got outputs of shape \(4,\), allowed: \[N, A\]"),
        (lambda p, x: x @ p[0], (jnp.ones((3, 2)), jnp.arange(2)), "params: got arrays of int32, allowed: floating"),
        (lambda p, x: regularize(x @ p), jnp.ones((3, 2)), "apply: has a gradient that is not linear in what comes"),
    ],
)
def test_jax_misuse_is_one_clear_line(apply: Any, params: Any, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        entk_jax(apply, params, jnp.ones((4, 3)))
    assert "\n" not in str(caught.value)


def test_jax_measures_the_function_with_a_regulariser_of_nothing():
    params, x = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.ones((4, 3))
    kernels = [entk_jax(apply, params, x) for apply in (lambda p, x: regularize(x @ p, rho=0.0), lambda p, x: x @ p)]
    assert jnp.array_equal(*kernels)


def test_jax_measures_operations_with_a_gradient_of_their_own():
    @jax.custom_vjp
    def tanh(x: Any) -> Any:
        return jnp.tanh(x)

    tanh.defvjp(lambda x: (jnp.tanh(x), x), lambda x, grad: (grad * (1 - jnp.tanh(x) ** 2),))
    params, x = jnp.linspace(-1, 1, 6).reshape(3, 2), jnp.ones((4, 3))
    kernels = [entk_jax(lambda p, x, f=f: f(x @ p), params, x) for f in (tanh, jnp.tanh)]
    assert jnp.allclose(*kernels, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_jax_measures_half_precision_in_float32(dtype: Any):
    """In bfloat16 K is not positive."""
    x = jnp.asarray(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).numpy(), dtype)
    params = {"w": jnp.linspace(-1, 1, 8, dtype=dtype).reshape(4, 2)}
    kernel = entk_jax(lambda p, x: jnp.tanh(x @ p["w"]), params, x)
    wide = entk_jax(lambda p, x: jnp.tanh(x @ p), params["w"].astype(jnp.float32), x.astype(jnp.float32))
    assert kernel.dtype == jnp.float32
    assert jnp.array_equal(kernel, wide)
    assert effective_rank(jnp.linalg.eigvalsh(kernel)) > 1
