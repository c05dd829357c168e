import pytest
import torch
from torch.nn import functional as F

from sphere_rl.experts import (
    ExpertMLP,
    Routing,
    dense_routing,
    shared_top_k_routing,
    single_routing,
    top_k_routing,
)

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


@pytest.mark.parametrize("kind", ROUTINGS)
def test_values_and_gradients_equal_the_dense_computation(kind: str):
    x, logits = batch()
    routing: Routing = ROUTINGS[kind](logits)
    module = mlp(routing.num_experts)
    inputs = [x.requires_grad_(), logits, *module.parameters()]
    result = module(x, routing)
    out, phi = oracle(module, x, routing.weights)
    torch.testing.assert_close(result.out, out)
    torch.testing.assert_close(result.features[-1].weighted(), phi)
    torch.testing.assert_close(result.features[-1].gram(), phi @ phi.t() / len(phi))
    penalty = result.features[-1].sphere_penalty()
    torch.testing.assert_close(penalty, oracle_penalty(phi))
    got = torch.autograd.grad(result.out.sin().sum() + penalty, inputs, allow_unused=True, retain_graph=True)
    want = torch.autograd.grad(out.sin().sum() + oracle_penalty(phi), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g if g is not None else None, w)


def test_top_k_weights_by_hand():
    routing = top_k_routing(torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), 2)
    a = 1 / (1 + torch.e**-2)
    torch.testing.assert_close(routing.weights, torch.tensor([[0, 1 - a, a], [0.5, 0.5, 0]]))
    assert routing.counts == (1, 2, 1)
    assert routing.sample.tolist() == [1, 0, 1, 0]
    assert routing.expert.tolist() == [0, 1, 1, 2]


def test_wrong_k_is_named():
    with pytest.raises(ValueError, match="k = 4: expected 1 to 3"):
        top_k_routing(torch.zeros(2, 3), 4)
