"""The structured eNTK against per-sample Jacobians of torch.func in float64, for every actor and beyond."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from sphere_rl.experts.layers import GroupedLinear
from sphere_rl.experts.network import KINDS, Actor, make_actor
from sphere_rl.methods.injection import InjectedHead
from sphere_rl.spectrum import kernel as ntk
from sphere_rl.spectrum.jacobian import factorise
from sphere_rl.spectrum.kernel import block_view, entk, entk_jax, estimate_entk_rank
from sphere_rl.spectrum.ranks import effective_rank

torch.set_num_threads(1)
SAMPLES, ACTIONS = 12, 3
CHANGES = [{}, {"layer_norm": True}, {"crelu": True}, {"spectral_norm": True}]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def actor(kind: str, **options: Any) -> Actor:
    """A small float64 actor with biases that are not zero, in evaluation mode."""
    made = make_actor(kind, 5, ACTIONS, width=16, depth=2, num_experts=4, **options).double().eval()
    with torch.no_grad():
        for i, p in enumerate(p for name, p in made.named_parameters() if name.endswith("bias")):
            p.copy_(0.3 * draw(*p.shape, seed=i))
    return made


def jacobian_kernel(policy: nn.Module, observations: torch.Tensor, outputs: str = "full") -> torch.Tensor:
    """J Jᵀ with J formed whole by torch.func.jacrev over all trainable parameters."""
    params = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(policy, p, (observations,)))(params)
    rows = len(observations)
    jacobian = torch.cat([part.detach().flatten(2) for part in parts.values()], dim=2)
    if outputs == "sum":
        return torch.einsum("icp,jcp->ij", jacobian, jacobian)
    flat = jacobian.reshape(rows * jacobian.shape[1], -1)
    return flat @ flat.T


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "".join(c) or "plain")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", ["full", "sum"])
def test_equals_the_jacobian_for_every_actor(kind, change, outputs):
    policy, observations = actor(kind, **change), draw(SAMPLES, 5)
    assert factorise(policy, observations) is not None, "fell back to torch.func"
    found = entk(policy, observations, outputs)
    assert relative(found, jacobian_kernel(policy, observations, outputs)) < 1e-12


@pytest.mark.parametrize("kind", ["ds_moe", "dense_moe"])
def test_respects_the_mode(kind):
    """ds_moe routes to all experts in training and to the top k in evaluation: two different kernels."""
    policy, observations = actor(kind), draw(SAMPLES, 5)
    kernels = []
    for mode in (True, False):
        policy.train(mode)
        kernels.append(entk(policy, observations))
        assert relative(kernels[-1], jacobian_kernel(policy, observations)) < 1e-12
        assert policy.training == mode
    assert (relative(*kernels) < 1e-12) == (kind == "dense_moe")


def test_spectral_norm_in_training_uses_the_iterated_vectors():
    policy, observations = actor("topk_moe", spectral_norm=True).train(), draw(SAMPLES, 5)
    before = copy.deepcopy(policy.state_dict())
    found = entk(policy, observations)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    policy(observations)  # one power iteration; evaluation then holds its vectors
    assert relative(found, jacobian_kernel(policy.eval(), observations)) < 1e-12


def test_ties_dead_units_and_repeated_states():
    policy, observations = actor("topk_moe"), draw(SAMPLES, 5)
    observations[3:6] = observations[0]
    observations[7] = 0.0
    with torch.no_grad():
        for name, p in policy.experts.named_parameters():
            if "hidden" in name:
                p[:, ::2] = 0.0  # units with z = 0 exactly: at the kink of ReLU
        assert policy.gate is not None
        for p in policy.gate.parameters():
            p.zero_()  # all logits equal: ties everywhere
    for outputs in ("full", "sum"):
        found = entk(policy, observations, outputs)
        assert relative(found, jacobian_kernel(policy, observations, outputs)) < 1e-12
    assert effective_rank(torch.linalg.eigvalsh(entk(policy, observations))) < SAMPLES * ACTIONS


def test_dead_network_has_only_its_output_biases():
    hidden = nn.Linear(4, 6)
    policy = nn.Sequential(hidden, nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        hidden.weight.zero_()
        hidden.bias.fill_(-1.0)
    found = entk(policy, draw(3, 4))
    expected = torch.kron(torch.ones(3, 3), torch.eye(2)).double()  # ∂f/∂b = I for every state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_linear_layer_by_hand():
    """f = Wx + b: K[(i,c),(j,d)] = (x_i·x_j + 1)·[c = d]; without the trainable bias the 1 goes."""
    policy, x = nn.Linear(4, 2).double(), draw(3, 4)
    torch.testing.assert_close(entk(policy, x), torch.kron(x @ x.T + 1, torch.eye(2).double()))
    torch.testing.assert_close(entk(policy, x, "sum"), 2 * (x @ x.T + 1))
    policy.bias.requires_grad_(False)
    torch.testing.assert_close(entk(policy, x), torch.kron(x @ x.T, torch.eye(2).double()))


class Twice(nn.Module):
    """The same layer applied twice: its two uses have cross terms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.loop, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, ACTIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.loop(self.loop(self.first(x).tanh()).tanh()))


class Tied(Twice):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Linear(8, 8)
        self.copy.weight = self.loop.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.copy(self.loop(self.first(x).tanh()).tanh()))


class Scaled(nn.Module):
    """An actor with a trainable tensor that belongs to no layer, and one that f does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = actor("topk_moe")
        self.scale, self.unused = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), nn.Parameter(torch.ones(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.actor(x)


class Bypass(Twice):
    """A layer whose weight is used without calling the layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x).tanh() @ self.loop.weight).tanh())


class Coupled(Twice):
    """Rows that depend on one another through a batch mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last((h - h.mean(0)).tanh())


def injected() -> nn.Module:
    """Plasticity injection: an expert layer that adds frozen weights to its own."""
    policy = actor("topk_moe")
    policy.experts.head = InjectedHead(policy.experts.head)
    policy.experts.head.inject(GroupedLinear(16, ACTIONS, 4, generator=torch.Generator().manual_seed(0)).double())
    return policy


class ActionAndValue(nn.Module):
    """What policies of other libraries return."""

    def __init__(self) -> None:
        super().__init__()
        self.action = nn.Linear(4, 2)

    def forward(self, x):
        return self.action(x), x.sum(1)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), *layers, nn.Linear(8, ACTIONS))


FOREIGN = {
    "injected head": (injected, True),
    "in-place relu": (lambda: sequence(nn.ReLU(inplace=True)), True),
    "layer twice": (Twice, True),
    "no bias": (lambda: sequence(nn.Tanh(), nn.Linear(8, 8, bias=False)), True),
    "tied weights": (Tied, False),
    "own tensor": (Scaled, False),
    "bypassed layer": (Bypass, False),
    "batch coupling": (Coupled, False),
    "batch norm": (lambda: sequence(nn.BatchNorm1d(8, affine=False, track_running_stats=False)), False),
    "affine layer norm": (lambda: sequence(nn.LayerNorm(8), nn.ReLU()), False),
    "convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3)),
        False,
    ),
    "parametrised": (lambda: sequence(register_parametrization(nn.Linear(8, 8), "weight", nn.Tanh())), False),
}


@pytest.mark.parametrize("outputs", ["full", "sum"])
@pytest.mark.parametrize("name", FOREIGN)
def test_any_module(name, outputs, monkeypatch):
    """Structure where it holds, Jacobian products where it does not: never a tensor left out."""
    make, structured = FOREIGN[name]
    torch.manual_seed(0)
    policy, observations = make().double(), draw(SAMPLES, 5)
    assert (factorise(policy, observations) is not None) == structured
    size = sum(p.numel() * 8 for p in policy.parameters())
    monkeypatch.setattr(ntk, "CHUNK_BYTES", 7 * size)  # several chunks, the last one not full
    found = entk(policy, observations, outputs)
    assert relative(found, jacobian_kernel(policy, observations, outputs)) < 1e-9


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_in_either_mode(training):
    """In training the batch's own statistics couple its rows; running statistics are neither used nor recorded."""
    torch.manual_seed(0)
    norm, observations = nn.BatchNorm1d(8), draw(SAMPLES, 5)
    policy = nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Linear(8, ACTIONS)).double().train(training)
    norm.load_state_dict(norm.state_dict() | {"running_mean": torch.full((8,), 3.0)})
    before, oracle = copy.deepcopy(policy.state_dict()), copy.deepcopy(policy)
    if training:
        oracle[1] = nn.BatchNorm1d(8, track_running_stats=False, dtype=torch.float64)
    assert relative(entk(policy, observations), jacobian_kernel(oracle, observations)) < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert (norm.track_running_stats, norm.training) == (True, training)


@pytest.mark.parametrize("part", ["gate", "experts", "hidden.1", "bias"])
def test_only_trainable_tensors_count(part):
    policy, observations = actor("topk_moe"), draw(SAMPLES, 5)
    for name, p in policy.named_parameters():
        p.requires_grad_(part in name)
    assert factorise(policy, observations) is not None
    assert relative(entk(policy, observations), jacobian_kernel(policy, observations)) < 1e-12


def test_float32_is_close_to_float64():
    policy, observations = actor("topk_moe"), draw(SAMPLES, 5)
    found = entk(copy.deepcopy(policy).float(), observations.float())
    assert found.dtype == torch.float32
    assert relative(found.double(), entk(policy, observations)) < 1e-5


@pytest.mark.parametrize("make", [lambda: actor("topk_moe", spectral_norm=True).train(), Scaled])
def test_leaves_the_policy_as_it_was(make):
    policy = make().double()
    observations = draw(SAMPLES, 5)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    before, random_state = copy.deepcopy(policy.state_dict()), torch.get_rng_state()
    modes = [m.training for m in policy.modules()]
    if not isinstance(policy, Scaled):  # power iterations cannot run under the transforms of torch.func
        entk(policy, observations)
        estimate_entk_rank(policy, observations)
        block_view(policy, observations)
    else:
        entk(policy, observations)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert all(p.grad is not None and p.requires_grad and bool((p.grad == 1).all()) for p in policy.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in policy.modules()] == modes
    assert not any(m._forward_hooks for m in policy.modules())


def test_works_inside_no_grad():
    policy, observations = actor("dense"), draw(SAMPLES, 5)
    with torch.no_grad():
        found = entk(policy, observations)
    assert not found.requires_grad
    assert relative(found, jacobian_kernel(policy, observations)) < 1e-12


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: "".join(c) or "plain")
@pytest.mark.parametrize("kind", ["dense", "topk_moe", "shared_moe"])
def test_products_without_the_kernel(kind, change):
    policy, observations, v = actor(kind, **change), draw(SAMPLES, 5), draw(SAMPLES * ACTIONS, 4)
    factors = factorise(policy, observations)
    assert factors is not None
    assert relative(factors.product(v), jacobian_kernel(policy, observations) @ v) < 1e-12


@pytest.mark.parametrize("make", [lambda: actor("topk_moe"), Scaled])
def test_estimated_rank_covers_the_exact_one(make):
    policy, observations = make().double(), draw(SAMPLES, 5)
    exact = effective_rank(torch.linalg.eigvalsh(jacobian_kernel(policy, observations)))
    estimates = [
        estimate_entk_rank(policy, observations, seed=seed, deflated=4, probes=12, steps=20) for seed in range(8)
    ]
    z_scores = [(e.value - exact) / e.standard_error for e in estimates]
    assert np.mean(np.square(z_scores)) ** 0.5 < 2.5
    assert max(e.standard_error for e in estimates) < 0.2 * exact


@pytest.mark.parametrize("kind", KINDS)
def test_block_view_partitions_the_trace(kind):
    policy, observations = actor(kind), draw(SAMPLES, 5)
    view = block_view(policy, observations)
    share = {of: sum(b.share for b in view if b.kind == of) for of in ("gate", "layer", "expert")}
    assert share["gate"] + share["layer"] == pytest.approx(1.0, rel=1e-12)
    assert share["gate"] + share["expert"] == pytest.approx(1.0, rel=1e-12)
    assert (share["gate"] > 0) == (policy.gate is not None)


def test_block_view_against_jacobians_of_the_parts():
    policy, observations = actor("topk_moe"), draw(SAMPLES, 5)
    total = jacobian_kernel(policy, observations).trace()
    view = {(b.kind, b.name): b for b in block_view(policy, observations)}
    for key, part in {("gate", "gate"): "gate.", ("layer", "experts.head"): "experts.head."}.items():
        for name, p in policy.named_parameters():
            p.requires_grad_(name.startswith(part))
        kernel = jacobian_kernel(policy, observations)
        assert view[key].share == pytest.approx(float(kernel.trace() / total), rel=1e-9)
        assert view[key].effective_rank == pytest.approx(effective_rank(torch.linalg.eigvalsh(kernel)), rel=1e-7)


def test_gauss_newton_blocks_obey_the_lemma():
    """The block-diagonal part of JᵀJ over layers has r_e = exp(H(α) + Σ α_b log r_e(K_b)), from the block view."""
    policy, observations = actor("dense"), draw(SAMPLES, 5)
    params = {name: p.detach() for name, p in policy.named_parameters() if "head.log_std" not in name}
    parts = torch.func.jacrev(lambda p: torch.func.functional_call(policy, p, (observations,)))(params)
    layers = {name.rsplit(".", 1)[0] for name in params if "log_std" not in name}
    spectra = []
    for layer in layers:
        jacobian = torch.cat([parts[f"{layer}.{t}"].detach().flatten(2) for t in ("weight", "bias")], dim=2)
        flat = jacobian.reshape(SAMPLES * ACTIONS, -1)
        spectra.append(torch.linalg.eigvalsh(flat.T @ flat))
    blocks = [b for b in block_view(policy, observations) if b.kind == "layer"]
    share, ranks = np.array([b.share for b in blocks]), np.array([b.effective_rank for b in blocks])
    expected = np.exp(np.sum(share * (np.log(ranks) - np.log(share))))
    assert effective_rank(torch.cat(spectra)) == pytest.approx(expected, rel=1e-6)


def test_jax_functions():
    policy, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, ACTIONS)).double(), draw(SAMPLES, 5)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(p.detach().numpy()) for name, p in policy.named_parameters()}

        def apply(p, observations):
            hidden = jnp.tanh(observations @ p["0.weight"].T + p["0.bias"])
            return hidden @ p["2.weight"].T + p["2.bias"]

        for outputs in ("full", "sum"):
            found = entk_jax(apply, params, jnp.asarray(x.numpy()), outputs, chunk=5)
            expected = jacobian_kernel(policy, x, outputs)
            assert relative(torch.tensor(np.asarray(found)), expected) < 1e-12


def test_misuse_is_one_clear_line():
    x = draw(3, 4)
    with pytest.raises(ValueError, match="no trainable tensor"):
        entk(nn.Linear(4, 2).double().requires_grad_(False), x)
    with pytest.raises(ValueError, match=r"got outputs of shape \(3, 2, 2\), allowed: \[3, A\]"):
        entk(nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))).double(), x)
    with pytest.raises(
        ValueError, match=r"got a tuple as output, allowed: one tensor \[3, A\], the mean action or logits;"
    ):
        entk(ActionAndValue().double(), x)
    with pytest.raises(ValueError, match="Scaled has no block structure"):
        block_view(Scaled().double(), draw(3, 5))
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match='outputs: got \'trace\', allowed: "full" or "sum"'):
            entk(nn.Linear(4, 2).double(), x, "trace")  # type: ignore[arg-type]
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
