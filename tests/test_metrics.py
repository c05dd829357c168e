"""Each metric on a hand-made case: a matrix of known rank, a planted dormant unit, two experts with equal features."""

import math

import pytest
import torch

from sphere_rl.experts.layers import RoutedFeatures
from sphere_rl.experts.routing import dense_routing, single_routing, top_k_routing
from sphere_rl.spectrum import plasticity as m
from sphere_rl.spectrum.ranks import effective_rank, gram_effective_rank

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_rank(rank: int, samples: int = 40, width: int = 30) -> torch.Tensor:
    """[N, m] with ``rank`` singular values √N, the rest zero: A is a projector."""
    left, right = torch.linalg.qr(draw(samples, rank))[0], torch.linalg.qr(draw(width, rank, seed=1))[0]
    return left @ right.T * samples**0.5


def features(values: torch.Tensor) -> RoutedFeatures:
    """Activations [N, H] of a layer without experts."""
    return RoutedFeatures(values, single_routing(len(values), dtype=values.dtype))


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
    layer = RoutedFeatures(values, routing)
    assert m.dormant_ratio([layer]) == m.dead_ratio([layer]) == 0.5
    assert m.active_fraction([layer]) == 1.0  # routed pairs only
    assert m.expert_load(layer) == [1.0, 1.0, 0.0, 0.0]


def test_dormancy_compares_a_unit_with_its_own_expert():
    """An expert with features a thousand times smaller than another's is not dormant for that."""
    routing = dense_routing(torch.zeros(4, 2).double())
    values = torch.cat((torch.full((4, 3), 1e-3), torch.ones(4, 3))).double()
    assert m.dormant_ratio([RoutedFeatures(values, routing)]) == 0.0


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
    # Any routing has one: a state without an expert counts as 0, and of a weight below zero its size.
    assert m.gate_entropy(torch.tensor([[0.0, 0.0], [2.0, -2.0]])) == pytest.approx(math.log(2) / 2)
    assert m.gate_entropy(torch.zeros(3, 2)) == 0.0


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


def test_overlap_does_not_grow_with_the_square_of_the_states():
    """From H × H where that is smaller: 20,000 states' own Gram would be 3 GB."""
    few = draw(30, 3, 4) * torch.tensor([4.0, 2.0, 1.0, 0.01], dtype=torch.float64)
    bases = [torch.linalg.svd(expert)[0][:, :3] for expert in few.unbind(1)]
    pairs = [(bases[i].T @ bases[j]).square().sum().item() / 3 for i, j in ((0, 1), (0, 2), (1, 2))]
    assert m.expert_overlap(few) == pytest.approx(sum(pairs) / 3)
    many = draw(20_000, 2, 3)
    assert 0 <= m.expert_overlap(many) < 0.01
    assert m.expert_overlap(many[:, :1].expand(-1, 2, -1)) == pytest.approx(1.0)
