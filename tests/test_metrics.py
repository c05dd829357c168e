"""Each metric on a hand-made case, and `measure` on real actors: complete, finite and without a trace left behind."""

import copy
import math

import pytest
import torch
from torch import nn

from sphere_rl import metrics as m
from sphere_rl.entk import entk
from sphere_rl.experts import GroupedLinear, RoutedFeatures, dense_routing, single_routing, top_k_routing
from sphere_rl.networks import KINDS, Actor, make_actor
from sphere_rl.spectrum import effective_rank, gram_effective_rank

torch.set_num_threads(1)
UPDATE_ONLY = {"grama_ratio", "grad_norm", "weight_change", "churn"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, samples: int = 40, width: int = 30) -> torch.Tensor:
    """[N, m] with ``rank`` singular values √N, the rest zero: A is a projector."""
    left, right = torch.linalg.qr(draw(samples, rank))[0], torch.linalg.qr(draw(width, rank, seed=1))[0]
    return left @ right.T * samples**0.5


def features(values: torch.Tensor) -> RoutedFeatures:
    """Activations [N, H] of a layer without experts."""
    return RoutedFeatures(values, values, single_routing(len(values), dtype=values.dtype))


def actor(kind: str = "topk_moe", **options: bool) -> Actor:
    return make_actor(kind, 5, 3, width=16, depth=2, num_experts=4, **options)


def observations(samples: int = 12) -> torch.Tensor:
    return draw(samples, 5).float()


@pytest.mark.parametrize("rank", [1, 7, 30])
def test_ranks_of_a_matrix_of_known_rank(rank):
    sigma = torch.linalg.svdvals(of_rank(rank))
    assert (m.srank(sigma), m.pca_rank(sigma), m.feature_rank(sigma, 40)) == (rank, rank, rank)
    assert effective_rank(sigma) == pytest.approx(rank, rel=1e-7)
    assert gram_effective_rank(of_rank(rank)) == pytest.approx(rank, rel=1e-7)


def test_ranks_by_hand():
    sigma = torch.tensor([1.0, 90.0, 9.0])  # any order: 90, 99, 100 of 100
    assert m.srank(sigma) == 2
    # σ²: 8100, 81, 1 of 8182: 8100 is 98.998 %, 8181 is more than 99 %.
    assert m.pca_rank(sigma) == 2
    assert m.pca_rank(torch.tensor([91.0, 9.0, 1.0])) == 1  # 8281 of 8363 is 99.02 %
    # N = 100: σ/10 > 0.01 where σ > 0.1.
    assert m.feature_rank(torch.tensor([5.0, 0.2, 0.05]), 100) == 2
    assert m.srank(torch.zeros(4)) == m.pca_rank(torch.zeros(4)) == m.feature_rank(torch.zeros(4), 3) == 0


def test_planted_dormant_and_dead_units():
    values = torch.ones(10, 8, dtype=torch.float64)
    values[:, 0] = 0.0  # dead
    values[:, 1] = 0.0
    values[3, 1] = 0.1  # dormant: mean 0.01 beside a layer mean of 6.01/8, but not dead
    assert m.unit_scores(features(values))[0, 1].item() == pytest.approx(0.01 / (6.01 / 8), rel=1e-6)
    layer = features(values)
    assert m.dormant_ratio([layer]) == 2 / 8
    assert m.dead_ratio([layer]) == 1 / 8
    assert m.active_fraction([layer]) == pytest.approx(61 / 80)
    both = [layer, features(torch.ones(10, 4, dtype=torch.float64))]
    assert m.dormant_ratio(both) == 2 / 12
    assert m.dormant_ratio([layer], threshold=0.001) == 1 / 8


def test_units_of_an_expert_without_states_are_dormant():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(6, 4).double()
    routing = top_k_routing(logits, 2)  # experts 0 and 1 on every state
    values = torch.ones(12, 5, dtype=torch.float64)
    layer = RoutedFeatures(values, values, routing)
    assert m.dormant_ratio([layer]) == m.dead_ratio([layer]) == 0.5
    assert m.active_fraction([layer]) == 1.0  # routed pairs only
    assert m.expert_load(layer) == [1.0, 1.0, 0.0, 0.0]


def test_dormancy_compares_a_unit_with_its_own_expert():
    """An expert with features a thousand times smaller than another's is not dormant for that."""
    routing = dense_routing(torch.zeros(4, 2).double())
    values = torch.cat((torch.full((4, 3), 1e-3), torch.ones(4, 3))).double()
    assert m.dormant_ratio([RoutedFeatures(values, values, routing)]) == 0.0


def test_grama_ratio_counts_units_without_gradient():
    gradient = torch.ones(2, 4, 6)
    gradient[0, 1] = 0.0
    gradient[1, 2] = 0.005  # mean of its layer (3·1 + 0.005)/4 = 0.75: score 0.0067
    assert m.grama_ratio([gradient]) == 2 / 8
    assert m.grama_ratio([gradient, torch.ones(1, 2, 3)]) == 2 / 10


def test_stable_rank_by_hand_and_by_svd():
    assert m.stable_rank(torch.diag(torch.tensor([2.0, 1.0]))).item() == pytest.approx(5 / 4)
    assert m.stable_rank(torch.zeros(3, 2)).item() == 0.0
    weight = draw(3, 6, 9)
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(m.stable_rank(weight), sigma.square().sum(-1) / sigma[:, 0].square())
    torch.testing.assert_close(m.stable_rank(weight.mT), m.stable_rank(weight))


def test_root_mean_square_and_churn():
    assert m.root_mean_square([torch.tensor([3.0]), torch.tensor([[4.0, 0.0, 0.0]])]) == 2.5
    assert m.root_mean_square([]) == 0.0
    after, before = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    assert m.churn(after, before) == (5 + 4) / 2


def test_gate_entropy():
    assert m.gate_entropy(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])) == pytest.approx(math.log(2) / 2)
    # A shared expert of weight 1 beside a routed one: the row is normalised first.
    assert m.gate_entropy(torch.tensor([[1.0, 1.0]])) == pytest.approx(math.log(2))


def test_expert_overlap():
    one = draw(20, 4)
    rotation = torch.linalg.qr(draw(4, 4, seed=1))[0]
    assert m.expert_overlap(torch.stack((one, one), dim=1)) == pytest.approx(1.0)
    assert m.expert_overlap(torch.stack((one, one @ rotation), dim=1)) == pytest.approx(1.0)
    apart = torch.zeros(20, 2, 4, dtype=torch.float64)
    apart[:10, 0], apart[10:, 1] = one[:10], one[10:]
    assert m.expert_overlap(apart) == pytest.approx(0.0, abs=1e-9)
    # Planes spanned by e1, e2 and by e1, e3: ⟨P, Q⟩ = 1, ‖P‖‖Q‖ = 2. The third expert is idle and left out.
    planes = torch.zeros(5, 3, 2, dtype=torch.float64)
    planes[0, 0, 0] = planes[1, 0, 1] = planes[0, 1, 0] = planes[2, 1, 1] = 1.0
    assert m.expert_overlap(planes) == pytest.approx(0.5)
    assert m.expert_overlap(planes[:, :1]) == 0.0


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"crelu": True}, {"spectral_norm": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_measure_gives_every_metric_of_every_actor(kind, options):
    policy = actor(kind, **options)
    gradients = {name: torch.ones_like(p) for name, p in policy.named_parameters()}
    found = m.measure(policy, observations(), gradients=gradients, previous=dict(policy.named_parameters()))
    assert list(found) == list(m.SPECTRAL_METRICS)
    load = found.pop("expert_load")
    assert isinstance(load, list)
    assert len(load) == (1 if kind in ("dense", "wide") else 4)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in found.values())
    assert found["weight_change"] == found["churn"] == 0.0
    assert found["grad_norm"] == 1.0


def test_measure_against_its_parts():
    policy = actor()
    found, trace = m.measure(policy, observations()), policy.trace(observations())
    kernel = entk(policy, observations()).double()
    assert set(m.SPECTRAL_METRICS) - set(found) == UPDATE_ONLY
    assert found["r_e_K"] == pytest.approx(effective_rank(torch.linalg.eigvalsh(kernel)), rel=1e-9)
    phi = trace.features[-1].weighted().detach().double()
    sigma = torch.linalg.svdvals(phi)
    assert found["r_e_A"] == pytest.approx(effective_rank(sigma.square()), rel=1e-6)
    assert found["effective_rank"] == pytest.approx(effective_rank(sigma), rel=1e-4)
    assert found["pca_rank"] == m.pca_rank(sigma)
    weights = [layer.weight for layer in policy.modules() if isinstance(layer, GroupedLinear)]
    ranks = [torch.linalg.matrix_norm(w) ** 2 / torch.linalg.matrix_norm(w, 2) ** 2 for w in weights]
    assert found["stable_rank_W"] == pytest.approx(torch.cat(ranks).mean().item(), rel=1e-5)


def test_measure_sees_an_update():
    policy = actor()
    previous = {name: p.detach().clone() for name, p in policy.named_parameters()}
    before = policy(observations()).detach()
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if name == "experts.head.bias":
                p += 0.5
    found = m.measure(policy, observations(), previous=previous)
    assert found["churn"] == pytest.approx(3 * 0.25, rel=1e-5)  # the gates add to one: every mean moved by 0.5
    assert m.churn(policy(observations()), before) == pytest.approx(found["churn"], rel=1e-6)
    size = sum(p.numel() for p in policy.parameters())
    assert found["weight_change"] == pytest.approx(0.5 * (12 / size) ** 0.5, rel=1e-6)


def test_gate_units_count():
    policy = actor()
    with torch.no_grad():
        dict(policy.named_parameters())["gate.hidden.0.bias"].fill_(-1e3)
    dead = m.measure(policy, observations())["dead_ratio"]
    experts = m.dead_ratio(policy.trace(observations()).features)
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
                m.measure(policy, observations(), gradients=gradients, previous=copy.deepcopy(policy.state_dict()))
            optimizer.step()
        return policy.state_dict()

    plain, measured = train(False), train(True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
