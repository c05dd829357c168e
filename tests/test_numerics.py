"""Float32 against float64 over scales from 1e-18 to 1e18, degenerate shapes, and numbers that are not finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conformance.agents import make_config
from test_direct import NETWORK, A, D, N, by_autograd, directly, minibatch
from test_direct import pytestmark as needs_script
from torch import Tensor

from sphere_rl.experts.network import make_actor
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.penalty import gate_penalty, layers_penalty, per_expert_penalty, sphere_penalty
from sphere_rl.spectrum import effective_rank, entk, gram_effective_rank, measure
from sphere_rl.spectrum.ranks import estimate_effective_rank, gram_eigenvalues, participation_ratio
from sphere_rl.training.agent import Agent

SCALES = [10.0**e for e in range(-18, 19, 3)]
FLOAT32 = torch.finfo(torch.float32)
Penalty = Callable[[Tensor, Any], Tensor]
GATES = torch.rand(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PENALTIES: dict[str, Penalty] = {
    "joint": lambda x, scale: sphere_penalty(x, scale),
    "layers": lambda x, scale: layers_penalty([x, x[:, :3]], scale),
    "per expert": lambda x, scale: per_expert_penalty(x.reshape(12, 4, 2), GATES.to(x.dtype), scale),
    "gate": lambda x, scale: gate_penalty(x, scale),
}


def features() -> Tensor:
    return torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SCALES)
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_in_float32_are_those_in_float64(name: str, size: float) -> None:
    penalty, x = PENALTIES[name], features() * size
    for scale in ("literal", "free"):
        pair = [x.float().requires_grad_(), x.clone().requires_grad_()]
        values = [penalty(one, scale) for one in pair]
        for value in values:
            value.backward()
        single, double = (float(value.detach()) for value in values)
        if scale == "literal" and not 1e-30 < double < 0.01 * FLOAT32.max:  # grows as the fourth power of features
            assert single == 0.0 or single > 1e30 or single == pytest.approx(double, rel=1e-2)  # and never NaN
            continue
        assert single == pytest.approx(double, rel=1e-5)
        gradients = [one.grad for one in pair]
        assert gradients[0] is not None
        assert gradients[1] is not None
        error = (gradients[0].double() - gradients[1]).norm() / gradients[1].norm()
        assert float(error) < 1e-5


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_that_overflow_are_infinite(name: str) -> None:
    for size in (1e10, 1e19, 1e30):
        assert float(PENALTIES[name](features().float() * size, "literal")) == float("inf")
        assert float(PENALTIES[name](features().float() * size, "free")) < 4
    assert torch.isnan(PENALTIES[name](features() * float("nan"), "literal"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_half_precision_are_computed_in_single(name: str, dtype: torch.dtype) -> None:
    """A product of features is what float16 cannot hold: a few hundred squared are beyond 65,504."""
    x = (features() * 400).to(dtype)
    value, exact = PENALTIES[name](x, "free"), PENALTIES[name](x.double(), "free")
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=2 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype):
        mixed = PENALTIES[name](x.float(), "literal")
    assert float(mixed) == pytest.approx(float(PENALTIES[name](x.double(), "literal")), rel=1e-5)


@pytest.mark.parametrize("size", SCALES)
def test_ranks_do_not_depend_on_scale_or_precision(size: float) -> None:
    x = features()
    expected = effective_rank(torch.linalg.svdvals(x).square())
    for phi in (x * size, (x * size).float()):
        assert gram_effective_rank(phi) == pytest.approx(expected, rel=1e-6)
    kernel = x @ x.T * size
    found = estimate_effective_rank(lambda v: kernel @ v, 12, generator=torch.Generator().manual_seed(0))
    assert found.value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0] * 7, 7.0), ([1e308] * 5, 5.0), ([1e-320] * 5, 5.0), ([3.0], 1.0), ([1.0, 5e-324], 1.0), ([0.0] * 4, 0.0),
        ([1.0] + [1e-300] * 50, 1.0), ([1 / 3] * 3, 3.0), ([0.1] * 10, 10.0), ([1.0, -1e-9, 0.0], 1.0),
    ],
)  # fmt: skip
def test_a_rank_is_between_one_and_the_number_of_eigenvalues(values: list[float], rank: float) -> None:
    spectrum = torch.tensor(values, dtype=torch.float64)
    for of in (effective_rank, participation_ratio):
        assert of(spectrum) == pytest.approx(rank, rel=1e-9)
        assert of(spectrum) == 0.0 or 1.0 <= of(spectrum) <= (spectrum > 0).sum()


def test_ranks_of_random_spectra_keep_their_bounds() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        n = int(torch.randint(1, 40, (), generator=generator))
        flat = torch.ones(n, dtype=torch.float64) * (
            1 + 1e-15 * torch.randn(n, dtype=torch.float64, generator=generator)
        )
        steep = torch.exp(30 * torch.randn(n, dtype=torch.float64, generator=generator))
        for spectrum in (flat, steep):
            assert 1.0 <= participation_ratio(spectrum) <= n
            assert 1.0 <= effective_rank(spectrum) <= n


ACTORS = [
    ("topk_moe", 3, 2),
    ("topk_moe", 3, 3),
    ("topk_moe", 1, 1),
    ("dense", 1, 1),
    ("dense_moe", 3, 1),
    ("ds_moe", 3, 1),
]


@pytest.mark.parametrize(("kind", "experts", "top_k"), ACTORS)
def test_the_kernel_in_float32_is_that_in_float64(kind: str, experts: int, top_k: int) -> None:
    actor = make_actor(kind, 3, 2, width=8, depth=2, num_experts=experts, top_k=top_k)
    double: Any = copy.deepcopy(actor).double()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    for size in SCALES:
        ours, exact = entk(actor, x * size).double(), entk(double, (x * size).double())
        assert float((ours - exact).norm() / exact.norm()) < 1e-5
        ranks = [effective_rank(torch.linalg.eigvalsh(kernel)) for kernel in (ours, exact)]
        assert ranks[0] == pytest.approx(ranks[1], rel=1e-3)
        assert 1.0 <= ranks[0] <= 12.0


@pytest.mark.parametrize(("kind", "experts", "top_k"), ACTORS)
def test_one_state_and_states_of_zeros_are_measured(kind: str, experts: int, top_k: int) -> None:
    actor = make_actor(kind, 3, 2, width=8, depth=2, num_experts=experts, top_k=top_k)
    for x in (torch.randn(1, 3), torch.zeros(1, 3), torch.zeros(5, 3)):
        for name, value in measure(actor, x).items():
            assert bool(torch.tensor(value).isfinite().all()), name
        assert measure(actor, x)["r_e_A"] in (0.0, pytest.approx(1.0))
    for of in PENALTIES.values():
        for scale in ("literal", "free"):
            value = of(torch.zeros(12, 8, requires_grad=True), scale)
            value.backward()
            assert float(value.detach()) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_gives_an_error_and_no_number(bad: float) -> None:
    x = features()
    x[1, 2] = bad
    spectrum = torch.tensor([1.0, bad])
    for call in (
        lambda: gram_eigenvalues(x), lambda: gram_effective_rank(x), lambda: effective_rank(spectrum),
        lambda: participation_ratio(spectrum),
        lambda: estimate_effective_rank(lambda v: x[:8] @ v, 8, generator=torch.Generator()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="finite"):
            call()
    actor = make_actor("topk_moe", 3, 2, width=8, depth=2, num_experts=3)
    states = torch.randn(6, 3)
    states[0, 0] = bad
    with pytest.raises((ValueError, RuntimeError)):
        measure(actor, states)
    for of in PENALTIES.values():  # a loss is NaN or infinite then, never a number, and the update stops at it
        for scale in ("literal", "free"):
            assert not of(x, scale).isfinite()


@needs_script
@pytest.mark.parametrize("step", [directly, by_autograd])
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("kind", ["topk_moe", "dense"])
def test_round_off_of_a_penalty_without_gradient_gets_no_share_of_the_losses(
    kind: str, layers: str, step: Callable[[Agent, Minibatch], list[Tensor]]
) -> None:
    """Equal states have features of one direction, which the scale-free penalty has nothing to turn by."""
    samples = Minibatch(**{name: tensor.float() for name, tensor in vars(minibatch(2)).items()})
    samples = replace(samples, observation=samples.observation[:1].repeat(N, 1))
    found = []
    for method in ("none", "sphere"):
        options = {"rho": 1.0, "layers": layers, "schedule": "constant"}
        agent = Agent(make_config(method, actor=kind, network=NETWORK, sphere=options), Spaces(D, A, False), seed=4)
        step(agent, samples)
        found.append([p.grad for p in agent.actor_parameters])
    for plain, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, plain, rtol=1e-5, atol=1e-7)
