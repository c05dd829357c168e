"""Modules watched from outside: Φ by hand, gradients against a loss by hand, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sphere_rl as sp
from sphere_rl.penalty import Scale, sphere_penalty, weighted_features

torch.set_num_threads(1)
E, H = 11, 4  # more than ten experts: experts.10 comes after experts.9


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.act, self.out = nn.Linear(5, H), nn.Tanh(), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.lin(x)))


class Mixture(nn.Module):
    """Softmax routing over experts in separate modules."""

    def __init__(self, remat: bool = False) -> None:
        super().__init__()
        self.remat, self.experts = remat, nn.ModuleList(Expert() for _ in range(E))
        self.router = nn.Sequential(nn.Linear(5, E), nn.Softmax(-1))

    def forward(self, x: Tensor) -> Tensor:
        run: Callable[..., Any] = (
            (lambda f, x: checkpoint(f, x, use_reentrant=False)) if self.remat else lambda f, x: f(x)
        )
        gates = self.router(x)
        return sum((gates[..., e, None] * run(expert, x) for e, expert in enumerate(self.experts)), torch.zeros(()))


def mlp(last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), last or nn.Tanh(), nn.Linear(6, 2))


def made(make: Callable[[], nn.Module] = Mixture, seed: int = 0) -> tuple[Any, Tensor]:
    torch.manual_seed(seed)
    return make().double(), torch.randn(7, 5, dtype=torch.float64)


def parts(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
    return [expert.act(expert.lin(x)) for expert in model.experts], model.router(x)


def by_hand(model: Any, x: Tensor, scale: Scale, rho: float | None, strength: float) -> list[Tensor]:
    """Parameter gradients of loss + λ · penalty, λ from the gradients at all captured outputs together."""
    features, gates = parts(model, x)
    output = sum(
        (gates[:, e, None] * expert.out(features[e]) for e, expert in enumerate(model.experts)), torch.zeros(())
    )
    loss = output.square().sum()
    penalty = sphere_penalty(weighted_features(torch.stack(features, 1), gates), scale)
    if rho is not None:
        at = [*features, gates]
        norms = [
            torch.cat([g.flatten() for g in torch.autograd.grad(value, at, retain_graph=True)]).norm()
            for value in (loss, penalty)
        ]
        strength = rho * float(norms[0] / norms[1])
    return list(torch.autograd.grad(loss + strength * penalty, list(model.parameters())))


def test_phi_is_the_one_by_hand_in_natural_order():
    model, x = made()
    features, gates = parts(model, x)
    expected = torch.cat([gates[:, e, None] * features[e] for e in range(E)], dim=1)
    with sp.track(model, features="experts.*.act", gates="router") as t:
        output = model(x)
        torch.testing.assert_close(t.phi(), expected)
        model(x.reshape(1, 7, 5))  # leading axes are rows
        torch.testing.assert_close(t.phi(), expected)
    assert torch.equal(model(2 * x), model(2 * x))
    torch.testing.assert_close(t.phi(), expected)  # no hook has seen 2x
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.equal(output, model(x))


def test_phi_of_a_dense_network_and_of_experts_without_gates():
    model, x = made(mlp)
    with sp.track(model, features="3") as t:
        model(x.reshape(7, 1, 5))
        torch.testing.assert_close(t.phi(), model[:4](x))
    mixture, x = made()
    with sp.track(mixture, features="experts.*.act") as t:
        mixture(x)
        torch.testing.assert_close(t.phi(), torch.cat(parts(mixture, x)[0], 1))


class Both(nn.Module):
    """A block that returns its output beside features [E, N, H] and logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = torch.stack([x.sin(), x.cos()])
        return x, features, x[:, :2]


def test_select_takes_what_is_meant_out_of_any_output():
    model, x = nn.Sequential(Both()), torch.randn(6, 3)

    def select(name: str, output: Any) -> Any:
        assert name == "0"
        return output[1].transpose(0, 1), output[2].softmax(1)

    with sp.track(model, features="0", gates="0", select=select) as t:
        model(x)
        gates = x[:, :2].softmax(1)
        torch.testing.assert_close(t.phi(), torch.cat([gates[:, :1] * x.sin(), gates[:, 1:] * x.cos()], 1))


@pytest.mark.parametrize("amount", [{"rho": 0.5}, {"strength": 2.0}])
@pytest.mark.parametrize("scale", ["literal", "free"])
def test_experts_and_router_in_separate_modules_get_the_joint_gradient(scale, amount):
    model, x = made()
    expected = by_hand(model, x, scale, amount.get("rho"), amount.get("strength", 0.0))
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with sp.track(model, features="experts.*.act", gates="router") as t:
        t.regularize(scale=scale, **amount)
        found = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for _ in range(2):  # accumulated, and through .backward()
            (model(x).square().sum() / 2).backward()
        accumulated = [parameter.grad for parameter in model.parameters()]
        t.regularize(rho=0.0)
        off = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(list(found), expected, rtol=1e-10, atol=1e-12)
    if "rho" in amount:
        torch.testing.assert_close(accumulated, expected, rtol=1e-10, atol=1e-12)
    assert all(map(torch.equal, off, plain))
    assert not torch.allclose(found[0], plain[0], rtol=1e-3)


@pytest.mark.parametrize("of", ["parameters", "input"])
def test_second_derivatives_are_refused_whatever_they_are_taken_of(of):
    """A gradient penalty, say: autograd visits only the way to what it is asked for."""
    model, x = made()
    x.requires_grad_()
    leaves = [x] if of == "input" else list(model.parameters())
    with sp.track(model, features="experts.*.act", gates="router") as t:
        t.regularize(rho=0.5)
        first = torch.autograd.grad(model(x).square().sum(), leaves, create_graph=True)
        plain = torch.autograd.grad(model(x).square().sum(), leaves)
        torch.testing.assert_close(list(first), list(plain), rtol=1e-12, atol=1e-14)
        with pytest.raises(NotImplementedError, match="regularize: got a second derivative, allowed: first ones"):
            torch.autograd.grad(sum((one.square().sum() for one in first), torch.zeros(())), leaves)


def test_one_dense_module_gets_what_the_line_in_its_place_gives():
    model, x = made(mlp)
    names = list(model.parameters())
    expected = torch.autograd.grad(model[4](sp.regularize(model[:4](x), rho=0.5)).square().sum(), names)
    with sp.track(model, features="3") as t:
        t.regularize(rho=0.5)
        found = torch.autograd.grad(model(x).square().sum(), names)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("where", ["part", "whole", "whole, reentrant"])
def test_checkpoints(where):
    model, x = made()
    expected = by_hand(model, x, "free", 0.1, 0.0)
    model.remat = where == "part"
    x = x.requires_grad_()
    with sp.track(model, features="experts.*.act", gates="router") as t:
        t.regularize()
        output: Any = model(x) if model.remat else checkpoint(model, x, use_reentrant="reentrant" in where)
        output.square().sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_autocast_and_rollouts():
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(7, 5)
    with sp.track(model, features="experts.*.act", gates="router") as t:
        t.regularize()
        with torch.no_grad():
            assert not model(x).requires_grad
            assert t.phi().shape == (7, E * H)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.square().sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters()
    )


def test_metrics_against_the_functions_that_they_are():
    model, x = made()
    features, gates = parts(model, x)
    phi = weighted_features(torch.stack(features, 1), gates)
    with sp.track(model, features="experts.*.act", gates="router") as t:
        t.regularize()
        model(x[:3])
        state = torch.random.get_rng_state()
        found = t.metrics(x)
        assert torch.equal(state, torch.random.get_rng_state())
        assert len(t.phi()) == 3
        assert model(x).grad_fn.name() == "_JointBackward"  # still on
    assert found["r_e_A"] == pytest.approx(sp.gram_effective_rank(phi))
    assert found["r_e_K"] == pytest.approx(sp.effective_rank(torch.linalg.eigvalsh(sp.entk(model, x))))
    assert found["feature_norm"] == pytest.approx(phi.square().sum(1).mean().sqrt().item())
    assert found["participation_ratio"] == pytest.approx(1 / (sphere_penalty(phi, "free").item() + 1 / (E * H)))
    assert found["output_size"] == pytest.approx(model(x).square().mean().sqrt().item())
    assert found["expert_load"] == [1.0] * E
    assert found["gate_entropy"] == pytest.approx(torch.special.entr(gates).sum(1).mean().item())
    assert found["dead_ratio"] == 0.0


def test_metrics_of_a_dense_network_count_dead_units_and_leave_out_routing():
    model, x = made(lambda: mlp(nn.ReLU()))
    with torch.no_grad():
        model[2].bias[:2] = -100
    with sp.track(model, features="3") as t:
        found = t.metrics(x)
    alive = int((model[:4](x) > 0).any(0).sum())
    assert found["dead_ratio"] == pytest.approx(1 - alive / 6)
    assert alive <= 4
    assert {"r_e_A", "r_e_K", "dormant_ratio", "srank", "feature_rank"} <= set(found)
    assert not {"gate_entropy", "expert_load", "expert_overlap"} & set(found)


DISTRIBUTED = """
import tempfile, torch, sphere_rl as sp
from torch import distributed, nn
with tempfile.TemporaryDirectory() as folder:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(16, 5)
    wanted = torch.autograd.grad(net[2](sp.regularize(net[:2](x), rho=0.5)).square().sum(), list(net.parameters()))
    with sp.track(net, features="1") as t:
        t.regularize(rho=0.5)
        nn.parallel.DistributedDataParallel(net)(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], list(wanted))
    distributed.destroy_process_group()
"""


def test_distributed_data_parallel():
    subprocess.run([sys.executable, "-c", DISTRIBUTED], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def after(features: str, gates: str | None, module: nn.Module, x: Tensor, **options: Any) -> Any:
    """Φ of a pass."""
    with sp.track(module, features, gates, **options) as t:
        module(x)
        return t.phi()


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 4), nn.Linear(5, 3)]), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x).sum() + self.experts[1](x).sum() + self.router(x).sum()


def under_torch_func() -> Any:
    model, x = made(mlp)
    with sp.track(model, features="3") as t:
        t.regularize()
        torch.func.grad(lambda x: model(x).sum())(x)


def twice_differentiated() -> Any:
    model, x = made(mlp)
    with sp.track(model, features="3") as t:
        t.regularize()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
        gradient.sum().backward()


X = torch.ones(7, 5)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sp.track(mlp(), "act"), "features: got 'act', which matches no module, allowed: 0, 1, 2, 3, 4"),
        (lambda: sp.track(mlp(), "3", "[01]"), r"gates: got '\[01\]', which matches 0, 1, allowed: one module"),
        (lambda: sp.track("mlp", "3"), "module: got str, allowed: a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: sp.track(mlp(), ["1", "3"]), r"features: got \['1', '3'\], allowed: one pattern of names"),  # type: ignore[arg-type]
        (lambda: sp.track(mlp(), "3").phi(), "module: has not run yet"),
        (lambda: after("experts.[01]", None, Uneven(), X), r"got shapes \(7, 3\) of 'experts.0' and \(7, 4\) of"),
        (lambda: after("experts.*", None, Uneven(), X), "features: 'experts.2' did not run in the last forward pass"),
        (lambda: after("experts.0", "router", Uneven(), X), r"'experts.0' gave shape \(7, 3\), allowed: \[..., 2, H\]"),
        (lambda: after("3", None, mlp(), X[0]), r"features: '3' gave shape \(6,\) without rows"),
        (lambda: after("3", None, mlp(), X[:0]), r"features: got shape \(0, 6\), allowed: \[N, m\], no axis empty"),
        (lambda: after("0", None, nn.Sequential(Both()), X), r"features: '0' gave tuple, allowed: a tensor \(select="),
        (lambda: after("0", None, nn.Sequential(nn.Linear(5, 3), nn.ReLU(True)), X), "'0' was changed in place"),
        (under_torch_func, "regularize: got a pass under torch.func, allowed: autograd"),
        (twice_differentiated, "regularize: got a second derivative, allowed: first ones"),
        (lambda: sp.track(mlp(), "3").regularize(-1), "rho: got -1, allowed: a finite number"),
        (lambda: sp.track(mlp(), "3").regularize(0.1, strength=1.0), "strength: got 1.0 beside rho 0.1"),
    ],
)  # fmt: skip
def test_misuse_is_one_clear_line(call, message):
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_copies_are_not_watched():
    """A target network is a copy; an exponential average too."""
    model, x = made()
    expected = by_hand(model, x, "free", 0.5, 0.0)
    with sp.track(model, features="experts.*.act", gates="router") as t:
        t.regularize(rho=0.5)
        loss = model(x).square().sum()
        phi, twin = t.phi(), copy.deepcopy(model)
        twin(2 * x).square().sum().backward()
        assert torch.equal(t.phi(), phi)
        loss.backward()
        replica = model._replicate_for_data_parallel()
        with pytest.raises(ValueError, match="module: runs as a replica of DataParallel, allowed: Distributed"):
            replica(x)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-10, atol=1e-12)
    model.zero_grad()
    model(2 * x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_compiled_modules_are_refused():
    inside = nn.Sequential(mlp())
    inside[0].compile(backend="eager")
    whole: Any = torch.compile(mlp(), backend="eager")
    for module in (whole, inside):
        with pytest.raises(ValueError, match="compiled, past hooks, allowed: the module before"):
            sp.track(module, "*3")


def test_a_pass_without_gradients_inside_of_one_with_them_is_refused():
    class Frozen(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self[0](input)
            return self[1](hidden)

    model = Frozen(nn.Linear(5, 4), nn.Linear(4, 2))
    with sp.track(model, features="0") as t:
        t.regularize()
        with pytest.raises(ValueError, match="'0' ran without gradients in a pass with gradients"):
            model(X)
