from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from watching import linear_outputs

from sphere_rl.experts.layers import ExpertMLP, GroupedLinear, RoutedFeatures
from sphere_rl.experts.network import make_actor
from sphere_rl.experts.routing import Routing, dense_routing, shared_top_k_routing, single_routing, top_k_routing
from sphere_rl.penalty import Scale, per_expert_penalty, sphere_penalty

torch.set_num_threads(1)
D, HIDDEN, A, E = 5, (8, 6), 3, 4


def mlp(num_experts: int = E, **options) -> ExpertMLP:
    module = ExpertMLP(D, HIDDEN, A, num_experts, generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(1))
    return module.double()


def oracle(module: ExpertMLP, x: torch.Tensor, weights: torch.Tensor):
    """Every expert on every sample, the gate applied at the end: output [N, A] and Φ [N, E·H]."""
    p = dict(module.named_parameters())
    out, phi = torch.zeros(len(x), A, dtype=x.dtype), []
    for e in range(weights.shape[1]):
        h, g = x, weights[:, e : e + 1]
        for i in range(len(module.hidden)):
            h = F.linear(h, p[f"hidden.{i}.weight"][e], p[f"hidden.{i}.bias"][e]).relu()
        phi.append(g * h)
        out = out + g * F.linear(h, p["head.weight"][e], p["head.bias"][e])
    return out, torch.cat(phi, dim=1)


def batch(n: int = 9, experts: int = E):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    logits = torch.randn(n, experts, generator=generator, dtype=torch.float64).requires_grad_()
    return x, logits


def oracle_penalty(phi: torch.Tensor) -> torch.Tensor:
    a = phi.t() @ phi / len(phi)
    m = len(a)
    return (a - a.trace() / m * torch.eye(m, dtype=a.dtype)).square().sum()


ROUTINGS = {
    "top_1": lambda z: top_k_routing(z, 1),
    "top_2": lambda z: top_k_routing(z, 2, temperature=0.7),
    "dense": dense_routing,
    "shared": lambda z: shared_top_k_routing(z[:, 1:], 1, 2),
    "one_expert": lambda z: top_k_routing(z * 0, 1),
    "single": lambda z: single_routing(len(z), dtype=z.dtype),
}


def split(phi: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted features of each expert, and gates that leave them as they are."""
    return phi.unflatten(1, (routing.num_experts, -1)), torch.ones_like(routing.weights)


def check_against_oracle(module: ExpertMLP, x: torch.Tensor, logits: torch.Tensor, routing: Routing, **tolerance):
    """Output, features, penalty and the gradients of both with respect to inputs, logits and all weights."""
    inputs = [x.requires_grad_(), logits, *module.parameters()]
    result = module(x, routing)
    last = result.features[-1]
    out, phi = oracle(module, x, routing.weights)
    torch.testing.assert_close(result.out, out, **tolerance)
    torch.testing.assert_close(last.weighted(), phi, **tolerance)
    torch.testing.assert_close(last.gram(), phi @ phi.t() / len(phi), **tolerance)
    for got, want in (
        (result.out.sin().sum(), out.sin().sum()),
        (last.sphere_penalty(), oracle_penalty(phi)),
        (last.sphere_penalty("free"), sphere_penalty(phi, "free")),
        *(
            (last.sphere_penalty_per_expert(scale), per_expert_penalty(*split(phi, routing), scale))
            for scale in ("literal", "free")
        ),
        (last.gram().sin().sum(), (phi @ phi.t() / len(phi)).sin().sum()),
    ):
        torch.testing.assert_close(got, want, **tolerance)
        gradients = [
            torch.autograd.grad(f, inputs, allow_unused=True, retain_graph=True, materialize_grads=True)
            for f in (got, want)
        ]
        for g, w in zip(*gradients, strict=True):
            torch.testing.assert_close(g, w, **tolerance)


@pytest.mark.parametrize("kind", ROUTINGS)
def test_values_and_gradients_equal_the_dense_computation(kind: str):
    x, logits = batch()
    routing: Routing = ROUTINGS[kind](logits)
    check_against_oracle(mlp(routing.num_experts), x, logits, routing)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.floats(0, 8))
def test_any_routing_equals_the_dense_computation(seed: int, n: int, num_experts: int, k: int, skew: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=generator, dtype=torch.float64)
    favour = skew * torch.randn(num_experts, generator=generator, dtype=torch.float64)
    logits = favour + torch.randn(n, num_experts, generator=generator, dtype=torch.float64).round()
    logits.requires_grad_()
    routing = top_k_routing(logits, min(k, num_experts))
    assert sum(routing.counts) == n * min(k, num_experts) == len(routing.sample)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(n, dtype=torch.float64))
    check_against_oracle(mlp(num_experts), x, logits, routing)


def test_float32_agrees():
    x, logits = batch(40)
    x, logits = x.float(), logits.detach().float().requires_grad_()
    check_against_oracle(mlp().float(), x, logits, top_k_routing(logits, 2), rtol=1e-4, atol=1e-5)


def test_gradcheck_once_and_twice():
    layer = GroupedLinear(D, A, E, generator=torch.Generator().manual_seed(0)).double()
    routing = top_k_routing(torch.tensor([[3.0, 1, 0, 2], [0, 3, 1, 2], [0, 2, 1, 3]], dtype=torch.float64), 2)
    assert routing.counts == (1, 2, 0, 3)
    x = torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def run(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, routing)).sin()

    inputs = (x, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    jacobian = torch.func.jacrev(run, argnums=1)(*inputs)
    direct = torch.autograd.functional.jacobian(lambda w: run(x, w, layer.bias), layer.weight)
    torch.testing.assert_close(jacobian, direct)


@pytest.mark.parametrize("layerwise", [False, True])
def test_all_layers_at_once_differentiate_like_one_after_the_other(layerwise: bool):
    """Output and every layer's features together, once and twice, by autograd and by torch.func."""
    module, (x, logits) = mlp(), batch(4)
    module.layerwise = layerwise
    routing = top_k_routing(logits.detach(), 2)
    names = [name for name, _ in module.named_parameters()]

    def run(x, *parameters):
        result = torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, routing))
        first, second = (f.weighted() for f in result.features)
        return result.out.sin().sum() + first.cos().sum() + (second**3).sum()

    inputs = (x.requires_grad_(), *(p.detach().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    direct = torch.autograd.grad(run(*inputs), inputs)
    for one, other in zip(torch.func.grad(run, argnums=tuple(range(len(inputs))))(*inputs), direct, strict=True):
        torch.testing.assert_close(one, other)


def test_the_penalty_refuses_a_second_derivative_rather_than_giving_a_wrong_one():
    x, logits = batch()
    features = mlp()(x, top_k_routing(logits, 2)).features[-1]
    with pytest.raises(RuntimeError, match="create_graph: use"):
        torch.autograd.grad(features.sphere_penalty(), features.values, create_graph=True)


def test_signals_at_the_last_hidden_layer_are_differentiable():
    """∂out/∂z by autograd equals head weights times gate where the unit is on; its gradient reaches the gate."""
    x, logits = batch()
    module, routing = mlp(), top_k_routing(logits, 2)
    module.layerwise = True
    with linear_outputs(module) as before:
        result = module(x, routing)
    z = before[-1]
    (signal,) = torch.autograd.grad(result.out[:, 0].sum(), z, create_graph=True)
    weight = dict(module.named_parameters())["head.weight"][routing.expert, 0]
    want = routing.gate[:, None] * weight * (z > 0)
    torch.testing.assert_close(signal, want)
    (got,) = torch.autograd.grad(signal.square().sum(), logits, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(want.square().sum(), logits)[0])


def test_dense_features_are_unweighted_and_zero_where_not_routed():
    x, logits = batch()
    routing = top_k_routing(logits, 2)
    features = mlp()(x, routing).features
    assert [f.values.shape for f in features] == [(18, 8), (18, 6)]
    dense = features[-1].dense()
    assert dense.shape == (9, E, 6)
    assert not dense[routing.weights == 0].any()
    for j, (sample, expert) in enumerate(zip(routing.sample, routing.expert, strict=True)):
        assert torch.equal(dense[sample, expert], features[-1].values[j])


COUNTS = [(8, 0), (7, 1), (5, 3), (1, 1)]


def uneven(counts: tuple[int, ...]) -> tuple[RoutedFeatures, torch.Tensor]:
    """Features of eight samples and the gates they hang on, of which experts get so many."""
    n, generator = 8, torch.Generator().manual_seed(4)
    gates = torch.zeros(n, 2, dtype=torch.float64)
    for expert, count in enumerate(counts):
        gates[torch.randperm(n, generator=generator)[:count], expert] = 0.1 + expert
    gates.requires_grad_()
    expert, sample = gates.t().nonzero(as_tuple=True)
    routing = Routing(gates, sample, gates[sample, expert], counts)
    values = torch.randn(len(sample), 3, dtype=torch.float64, generator=generator, requires_grad=True)
    return RoutedFeatures(values, routing), gates


@pytest.mark.parametrize("scale", ["literal", "free"])
@pytest.mark.parametrize("counts", COUNTS)
def test_penalty_however_many_samples_an_expert_sees(counts: tuple[int, ...], scale: Scale):
    """All, most, some: each is computed in its own way."""
    features, gates = uneven(counts)
    values = features.values
    got, want = features.sphere_penalty(scale), sphere_penalty(features.weighted(), scale)
    torch.testing.assert_close(got, want)
    for g, w in zip(
        torch.autograd.grad(2 * got, (values, gates), retain_graph=True),
        torch.autograd.grad(2 * want, (values, gates)),
        strict=True,
    ):
        torch.testing.assert_close(g, w)


def test_experts_without_samples_get_zero_gradient_and_no_computation():
    x, logits = batch()
    logits = logits.detach() + torch.tensor([0.0, 50, 0, 50])
    module, routing = mlp(), top_k_routing(logits, 2)
    assert routing.counts == (0, 9, 0, 9)
    with torch.no_grad():
        for p in module.parameters():
            p[[0, 2]] = torch.nan
    module(x, routing).out.sum().backward()
    for p in module.parameters():
        assert p.grad is not None
        assert not p.grad[[0, 2]].any()
        assert p.grad[[1, 3]].abs().sum() > 0


def test_layer_norm_and_crelu():
    x, logits = batch()
    routing = top_k_routing(logits, 2)
    module = mlp(layer_norm=True)
    with linear_outputs(module) as before:
        norm = module(x, routing).features[0]
    z = before[0]
    normal = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm.values, normal.relu())
    module = mlp(crelu=True)
    with linear_outputs(module) as before:
        crelu = module(x, routing).features[0]
    assert crelu.values.shape == (18, 8)
    assert before[0].shape == (18, 4)
    torch.testing.assert_close(crelu.values, torch.cat((before[0], -before[0]), 1).relu())
    with pytest.raises(ValueError, match=r"hidden = \(7,\): expected even widths with crelu"):
        ExpertMLP(D, (7,), A, E, generator=torch.Generator(), crelu=True)


def test_spectral_norm_converges_to_unit_largest_singular_value():
    x, logits = batch()
    module, routing = mlp(spectral_norm=True), top_k_routing(logits, 2)
    for _ in range(300):
        module(x, routing)
    layer = module.hidden[0]
    assert isinstance(layer, GroupedLinear)
    module.eval()
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    normal = layer.normalized_weight()
    torch.testing.assert_close(torch.linalg.matrix_norm(normal, 2), torch.ones(E, dtype=torch.float64))
    module(x, routing)
    assert all(torch.equal(state[name], buffer) for name, buffer in module.named_buffers())


def test_initial_weights_are_lecun_normal_and_follow_the_generator():
    first, same, other = (GroupedLinear(100, 200, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)
    torch.testing.assert_close(first.weight.std(), torch.tensor(0.1), rtol=0.01, atol=0)
    assert not first.bias.any()


def test_top_k_weights_by_hand():
    routing = top_k_routing(torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), 2)
    a = 1 / (1 + torch.e**-2)
    torch.testing.assert_close(routing.weights, torch.tensor([[0, 1 - a, a], [0.5, 0.5, 0]]))
    assert routing.counts == (1, 2, 1)
    assert routing.sample.tolist() == [1, 0, 1, 0]
    assert routing.expert.tolist() == [0, 1, 1, 2]


def test_shared_experts_have_weight_one():
    routing = shared_top_k_routing(torch.tensor([[0.0, 1.0, 3.0]]), 2, 1)
    assert routing.weights.tolist() == [[1, 1, 0, 0, 1]]
    assert routing.counts == (1, 1, 0, 0, 1)


def test_wrong_k_is_named():
    with pytest.raises(ValueError, match="k = 4: expected 1 to 3"):
        top_k_routing(torch.zeros(2, 3), 4)


@pytest.mark.parametrize("size", [0.0, 1e-18, 1e-6, 1.0, 1e6, 1e18])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_scale_free_penalty_at_every_magnitude(counts: tuple[int, ...], size: float):
    """In float32 beside float64, value and gradients; of nothing both are zero."""
    features, _ = uneven(counts)
    exact, own = (
        (features.values.detach() * size).to(kind).requires_grad_() for kind in (torch.float64, torch.float32)
    )
    gate = features.routing.gate.detach()
    routing = replace(features.routing, gate=gate.float().requires_grad_())
    want = sphere_penalty(RoutedFeatures(exact, replace(features.routing, gate=gate)).weighted(), "free")
    got = RoutedFeatures(own, routing).sphere_penalty("free")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    (wanted,) = torch.autograd.grad(want, exact)
    of_values, of_gate = torch.autograd.grad(got, (own, routing.gate))
    torch.testing.assert_close(of_values.double(), wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())
    assert of_gate.isfinite().all()
    assert of_gate.any() == (size > 0)


def test_the_penalty_of_each_expert_does_not_cancel():
    """Orthogonal features of size 1000: ‖A‖² − (tr A)²/H leaves a residue of about 100 in float32."""
    values = 1000 * torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0]
    features = RoutedFeatures(values, single_routing(64))
    assert 0 <= features.sphere_penalty_per_expert().item() < 0.1


@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "topk_moe", "shared_moe"])
def test_penalties_and_grams_of_half_precision_are_computed_in_float32(kind: str, way: str):
    """As `sphere_rl.sphere_penalty` of Φ is; gradients, too, those of a backward pass under autocast among them."""
    actor = make_actor(kind, 5, 3, width=16, depth=2, num_experts=4)
    layer = actor.trace(torch.randn(64, 5, generator=torch.Generator().manual_seed(1))).features[-1]
    if way == "bfloat16":
        routing = replace(layer.routing, gate=layer.routing.gate.bfloat16())
        layer = RoutedFeatures(layer.values.bfloat16(), routing)
    values, phi = layer.values.detach().double(), layer.weighted().detach().double()
    for scale in ("free", "literal"):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            found = layer.sphere_penalty(scale), layer.sphere_penalty_per_expert(scale), layer.gram()
            for one in found:
                assert one.dtype == torch.float32
            (of_values,) = torch.autograd.grad(found[0], layer.values, retain_graph=True)
        exact = values.clone().requires_grad_()
        gate = layer.routing.gate.detach().double()
        want = sphere_penalty(RoutedFeatures(exact, replace(layer.routing, gate=gate)).weighted(), scale)
        rounding: dict[str, Any] = {"rtol": 1e-5 if way == "autocast" else 1e-2, "atol": 1e-5}
        torch.testing.assert_close(found[0].double(), want, **rounding)
        torch.testing.assert_close(found[2].double(), phi @ phi.T / len(phi), **rounding)
        (wanted,) = torch.autograd.grad(want, exact)
        torch.testing.assert_close(of_values.double(), wanted, **rounding)
