"""`measure` on real actors: complete, equal to its parts, and without a trace left behind."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from sphere_rl.experts.layers import GroupedLinear
from sphere_rl.experts.network import KINDS, Actor, make_actor
from sphere_rl.integrations.hooks import track
from sphere_rl.penalty import sphere_penalty
from sphere_rl.spectrum import SPECTRAL_METRICS, block_view, effective_rank, entk, measure, weight_metrics
from sphere_rl.spectrum.kernel import KERNEL_ROWS, kernel_states
from sphere_rl.spectrum.plasticity import churn, dead_ratio, grama_ratio, outside_share, pca_rank
from sphere_rl.spectrum.ranks import participation_ratio

torch.set_num_threads(1)
UPDATE_ONLY = {"grama_ratio", "grad_norm", "weight_change", "churn"}
BOX = [-1.0] * 3, [1.0] * 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def actor(kind: str = "topk_moe", **options: Any) -> Actor:
    return make_actor(kind, 5, 3, width=16, depth=2, num_experts=4, **options)


def observations() -> torch.Tensor:
    return draw(12, 5)


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"crelu": True}, {"spectral_norm": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_measure_gives_every_metric_of_every_actor(kind, options):
    policy = actor(kind, **options)
    gradients = {name: torch.ones_like(p) for name, p in policy.named_parameters()}
    found = measure(policy, observations(), gradients=gradients, previous=dict(policy.named_parameters()), box=BOX)
    assert list(found) == list(SPECTRAL_METRICS)
    load = found.pop("expert_load")
    assert isinstance(load, list)
    assert len(load) == (1 if kind in ("dense", "wide") else 4)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in found.values())
    assert found["weight_change"] == found["churn"] == 0.0
    assert found["grad_norm"] == 1.0


def test_measure_against_its_parts():
    policy = actor()
    found, trace = measure(policy, observations()), policy.trace(observations())
    kernel = entk(policy, observations()).double()
    assert set(SPECTRAL_METRICS) - set(found) == UPDATE_ONLY | {"outside_share"}
    assert found["r_e_K"] == pytest.approx(effective_rank(torch.linalg.eigvalsh(kernel)), rel=1e-9)
    phi = trace.features[-1].weighted().detach().double()
    sigma = torch.linalg.svdvals(phi)
    assert found["r_e_A"] == pytest.approx(effective_rank(sigma.square()), rel=1e-6)
    assert found["effective_rank"] == pytest.approx(effective_rank(sigma), rel=1e-4)
    assert found["participation_ratio"] == pytest.approx(participation_ratio(sigma.square()), rel=1e-6)
    assert found["feature_norm"] == pytest.approx(phi.square().sum(1).mean().sqrt().item(), rel=1e-9)
    assert found["output_size"] == pytest.approx(trace.output.detach().double().square().mean().sqrt().item(), rel=1e-6)
    penalty = sphere_penalty(phi, "free").item()
    assert found["participation_ratio"] == pytest.approx(1 / (penalty + 1 / phi.shape[1]), rel=1e-9)
    assert found["pca_rank"] == pca_rank(sigma)
    weights = [layer.weight for layer in policy.modules() if isinstance(layer, GroupedLinear)]
    ranks = [torch.linalg.matrix_norm(w) ** 2 / torch.linalg.matrix_norm(w, 2) ** 2 for w in weights]
    assert found["stable_rank_W"] == pytest.approx(torch.cat(ranks).mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dead_layer_is_dormant_in_every_precision(dtype: torch.dtype):
    """The guard against a mean of zero is itself zero in float16."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-100.0)
    with track(model.to(dtype), features="1") as t:
        found = t.metrics(draw(12, 5).to(dtype))
    assert found["dormant_ratio"] == found["dead_ratio"] == 1.0
    assert grama_ratio([torch.zeros(1, 8, 5, dtype=dtype)]) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_actor_in_half_precision_is_measured(dtype: torch.dtype):
    policy, states = actor().to(dtype), observations().to(dtype)
    found, expected = measure(policy, states, box=BOX), measure(policy.float(), states.float(), box=BOX)
    assert set(found) == set(expected)
    for name in ("stable_rank_W", "weight_norm", "r_e_K"):
        assert found[name] == pytest.approx(expected[name], rel=0.02), name


def test_autocast_changes_no_number_of_an_actor():
    policy, states = actor(), observations()
    expected = measure(policy, states), block_view(policy, states)
    with torch.autocast("cpu", torch.bfloat16):
        assert (measure(policy, states), block_view(policy, states)) == expected


def test_weight_metrics_leave_a_parametrised_module_as_it_was_and_say_nothing_of_what_is_not_there():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    gradients = {name: torch.ones_like(p) for name, p in layer.named_parameters()}
    assert set(weight_metrics(layer, gradients)) == {"stable_rank_W", "weight_norm", "grad_norm"}
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert set(weight_metrics(nn.Conv1d(1, 1, 1))) == {"weight_norm"}


def test_bounds_of_the_box_do_not_move_with_the_precision_of_the_policy():
    """0.4 is 0.4004 in bfloat16."""
    assert outside_share(torch.tensor([[0.4]], dtype=torch.bfloat16), [-0.4], [0.4]) == 1.0


def test_what_is_outside_the_action_box():
    """Of 6 mean actions the first is below its bound, and two are above theirs; on a bound is inside."""
    output = torch.tensor([[-1.5, 0.0, 9.0], [-1.0, 2.0, 3.0]])
    assert outside_share(output, [-1.0, -1.0, -1.0], [1.0, 1.0, 3.0]) == 3 / 6
    policy = actor()
    with torch.no_grad():
        policy.experts.head.bias[..., 0] += 5
    assert measure(policy, observations(), box=BOX)["outside_share"] == pytest.approx(1 / 3)


def test_measure_sees_an_update():
    policy = actor()
    previous = {name: p.detach().clone() for name, p in policy.named_parameters()}
    before = policy(observations()).detach()
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name == "experts.head.bias":
                p += 0.5
    found = measure(policy, observations(), previous=previous)
    assert found["churn"] == pytest.approx(3 * 0.25, rel=1e-5)  # the gates add to one: every mean moved by 0.5
    assert churn(policy(observations()), before) == pytest.approx(found["churn"], rel=1e-6)
    size = sum(p.numel() for p in policy.parameters())
    assert found["weight_change"] == pytest.approx(0.5 * (12 / size) ** 0.5, rel=1e-6)


def test_without_any_feature_every_rank_is_zero():
    policy = actor()
    with torch.no_grad():
        dict(policy.named_parameters())["experts.hidden.1.bias"].fill_(-1e3)
    found = measure(policy, observations())
    names = ("r_e_A", "participation_ratio", "effective_rank", "srank", "pca_rank", "feature_rank", "feature_norm")
    assert [found[name] for name in names] == [0] * len(names)


def test_gate_units_count():
    policy = actor()
    with torch.no_grad():
        dict(policy.named_parameters())["gate.hidden.0.bias"].fill_(-1e3)
    dead = measure(policy, observations())["dead_ratio"]
    experts = dead_ratio(policy.trace(observations()).features)
    # All 2·16 of the gate: the second layer sees zeros and its biases are zero.
    assert dead == pytest.approx((experts * 2 * 4 * 16 + 2 * 16) / (2 * 4 * 16 + 2 * 16))


def test_training_goes_on_bit_for_bit():
    """Spectral norm in training mode is the hard case: every forward pass iterates its buffers."""

    def train(measured: bool) -> dict[str, torch.Tensor]:
        policy = actor(spectral_norm=True).train()
        optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(policy(torch.randn(8, 5)), torch.randn(8, 3))
            loss.backward()
            if measured:
                gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
                measure(policy, observations(), gradients=gradients, previous=copy.deepcopy(policy.state_dict()))
            optimizer.step()
        return policy.state_dict()

    plain, measured = train(False), train(True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


@pytest.mark.parametrize("outputs", [1, 4, 19])
def test_the_kernel_of_cw10_and_h1_is_that_of_every_probe_state(outputs: int) -> None:
    assert kernel_states(256, outputs, KERNEL_ROWS).tolist() == list(range(256))


@pytest.mark.parametrize(
    ("states", "outputs", "rows", "expected"),
    [
        (9, 100, None, list(range(9))),
        (9, 2, 10, [0, 2, 4, 6, 8]),
        (9, 4, 11, [0, 8]),
        (256, 1100, 1024, [0]),  # more outputs than rows
    ],
)
def test_a_kernel_with_too_many_rows_is_of_an_even_spread(
    states: int, outputs: int, rows: int | None, expected: list[int]
) -> None:
    assert kernel_states(states, outputs, rows).tolist() == expected


def test_a_measurement_bounds_the_kernel_and_nothing_else() -> None:
    policy = actor()
    whole, bounded = measure(policy, observations()), measure(policy, observations(), kernel_rows=9)
    kernel = entk(policy, observations()[[0, 6, 11]])  # 3 states of 3 outputs; 5.5 is rounded to even
    assert bounded.pop("r_e_K") == effective_rank(torch.linalg.eigvalsh(kernel.double())) != whole.pop("r_e_K")
    assert bounded == whole
