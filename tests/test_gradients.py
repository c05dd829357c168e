"""Kept gradient tensors, beside autograd's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optimizer import EXPERTS, make_layer, routing
from torch import Tensor

from sphere_rl.experts.layers import GroupedLinear
from sphere_rl.kernels.gradients import GradientStore, active_experts, add_scaled_, pieces, scale_, total_norm

COUNTS = st.tuples(*[st.integers(0, 3)] * EXPERTS).filter(any)


def loss_of(layer: GroupedLinear, counts: tuple[int, ...], seed: int = 0) -> Tensor:
    rows = torch.randn(sum(counts), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return layer(rows, routing(counts)).square().sum()


def gradients(layer: GroupedLinear, counts: tuple[int, ...], store: GradientStore, seed: int = 0) -> list[Tensor]:
    return store.differentiate(loss_of(layer, counts, seed), list(layer.parameters()))


def expected(layer: GroupedLinear, counts: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(layer, counts, seed), list(layer.parameters()))


def assert_equal(found: list[Tensor], wanted: tuple[Tensor, ...] | list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@settings(deadline=None, max_examples=40)
@given(st.lists(COUNTS, min_size=1, max_size=6), st.booleans())
def test_pass_after_pass_they_are_autograds(sequence: list[tuple[int, ...]], disturbed: bool) -> None:
    layer, store = make_layer(), GradientStore()
    for seed, counts in enumerate(sequence):
        found = gradients(layer, counts, store, seed)
        assert_equal(found, expected(layer, counts, seed))
        assert active_experts(found[0]) == tuple(e for e in range(EXPERTS) if counts[e])
        if disturbed:
            found[0].add_(1.0)  # somebody else's business: nothing is known of it any more, and the next pass is right
            assert active_experts(found[0]) is None


def test_memory_is_used_again() -> None:
    layer, store = make_layer(), GradientStore()
    first = gradients(layer, (2, 0, 1, 0), store)[0].data_ptr()
    assert gradients(layer, (0, 1, 1, 0), store)[0].data_ptr() == first


def test_two_uses_in_one_pass_add_up() -> None:
    layer, store = make_layer(), GradientStore()
    gradients(layer, (1, 1, 1, 1), store)
    loss = loss_of(layer, (2, 0, 1, 0)) + loss_of(layer, (0, 0, 1, 3), seed=1)
    found = store.differentiate(loss, list(layer.parameters()))
    parts = zip(expected(layer, (2, 0, 1, 0)), expected(layer, (0, 0, 1, 3), seed=1), strict=True)
    for mine, (a, b) in zip(found, parts, strict=True):
        torch.testing.assert_close(mine, a + b)
    assert active_experts(found[0]) is None
    assert_equal(gradients(layer, (2, 0, 1, 0), store), expected(layer, (2, 0, 1, 0)))


def test_a_term_on_the_whole_weight_is_not_lost() -> None:
    layer, store = make_layer(), GradientStore()
    loss = loss_of(layer, (2, 0, 0, 0)) + layer.weight.sum()
    found = store.differentiate(loss, list(layer.parameters()))
    torch.testing.assert_close(found[0], expected(layer, (2, 0, 0, 0))[0] + 1)
    assert active_experts(found[0]) is None


def test_arithmetic_on_pieces_is_arithmetic_on_wholes() -> None:
    layer, one, two = make_layer(), GradientStore(), GradientStore()
    mine, others = gradients(layer, (2, 0, 1, 0), one), gradients(layer, (2, 0, 1, 0), two, seed=1)
    a, b = expected(layer, (2, 0, 1, 0)), expected(layer, (2, 0, 1, 0), seed=1)
    factor = torch.tensor(0.3, dtype=torch.float64)
    assert len(pieces(mine)) == 3
    torch.testing.assert_close(total_norm(mine), torch.cat([t.flatten() for t in a]).norm())
    add_scaled_(mine, others, factor)
    scale_(mine, factor)
    for found, x, y in zip(mine, a, b, strict=True):
        torch.testing.assert_close(found, factor * (x + factor * y))
    assert active_experts(mine[0]) == (0, 2)


def test_different_experts_add_up_too() -> None:
    layer = make_layer()
    mine = gradients(layer, (2, 0, 1, 0), GradientStore())
    add_scaled_(mine, gradients(layer, (0, 3, 0, 0), GradientStore()), torch.tensor(2.0, dtype=torch.float64))
    for found, x, y in zip(mine, expected(layer, (2, 0, 1, 0)), expected(layer, (0, 3, 0, 0)), strict=True):
        torch.testing.assert_close(found, x + 2 * y)


def test_outside_a_store_gradients_are_nobodys() -> None:
    found = expected(make_layer(), (2, 0, 1, 0))[0]
    assert active_experts(found) is None
    assert not found[1].any()
    assert not found[3].any()
