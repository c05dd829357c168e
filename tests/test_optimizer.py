"""Adam over experts, beside torch's own Adam on whole tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sphere_rl.experts.layers import GroupedLinear
from sphere_rl.experts.routing import Routing
from sphere_rl.kernels.adam import REST, idle_experts
from sphere_rl.kernels.gradients import GradientStore, active_experts
from sphere_rl.learner.optimizer import ExpertAdam

EXPERTS = 4


def routing(counts: tuple[int, ...]) -> Routing:
    sample = torch.cat([torch.arange(count) for count in counts])
    weights = torch.zeros(max(counts), len(counts), dtype=torch.float64)
    return Routing(weights=weights, sample=sample, gate=torch.ones(len(sample), dtype=torch.float64), counts=counts)


def train(layer: GroupedLinear, optimizer: torch.optim.Optimizer, store: GradientStore | None, steps: list) -> None:
    """Steps of (counts, rows): the loss is the same for both learners, and so must be the weights."""
    parameters = list(layer.parameters())
    for counts, x in steps:
        loss = layer(x, routing(counts)).square().sum()
        found = torch.autograd.grad(loss, parameters) if store is None else store.differentiate(loss, parameters)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()


def steps_with_long_rests() -> list[tuple[tuple[int, ...], Tensor]]:
    """Expert 0 always has rows; 1 rests for long and comes back; 2 comes late; 3 never has any."""
    generator = torch.Generator().manual_seed(1)
    steps = []
    for step in range(REST + 700):
        counts = (3, 2 if step < 5 or step > REST + 650 else 0, 1 if step > REST + 300 else 0, 0)
        rows = torch.randn(sum(counts), 5, generator=generator, dtype=torch.float64)
        steps.append((counts, rows))
    return steps


def make_layer() -> GroupedLinear:
    return GroupedLinear(5, 3, EXPERTS, generator=torch.Generator().manual_seed(0)).double()


def test_it_is_torchs_adam_for_experts_that_work_rest_and_come_back() -> None:
    own, other = make_layer(), make_layer()
    optimizer = ExpertAdam(own.parameters(), lr=1e-2, eps=1e-5)
    train(own, optimizer, GradientStore(), steps_with_long_rests())
    train(other, torch.optim.Adam(other.parameters(), lr=1e-2, eps=1e-5), None, steps_with_long_rests())
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    start = make_layer()
    assert torch.equal(own.weight[3], start.weight[3])
    assert (own.weight[:3] - start.weight[:3]).abs().amin(dim=(1, 2)).gt(1e-4).all()


def test_a_resting_expert_is_passed_over_and_its_second_moment_catches_up() -> None:
    layer = make_layer()
    optimizer = ExpertAdam(layer.parameters(), lr=1e-2, eps=1e-5)
    steps = steps_with_long_rests()[: REST + 100]
    train(layer, optimizer, GradientStore(), steps)
    state = optimizer.state[layer.weight]
    assert state["idle"][1:] == [REST + 95, 2 * REST + 100, 2 * REST + 100]
    assert not state["exp_avg"][1].any()
    resting = state["exp_avg_sq"][1].clone()
    assert resting.all()
    rows = torch.zeros(2, 5, dtype=torch.float64)
    train(layer, optimizer, GradientStore(), [((1, 1, 0, 0), rows)])  # rows of zeros: a gradient of zeros
    torch.testing.assert_close(state["exp_avg_sq"][1], resting * 0.999 ** (96 + 1))


def test_state_goes_through_a_checkpoint_in_the_middle_of_a_rest() -> None:
    steps, stop = steps_with_long_rests(), REST + 200
    whole, first, second = make_layer(), make_layer(), make_layer()
    train(whole, ExpertAdam(whole.parameters(), lr=1e-2, eps=1e-5), GradientStore(), steps)
    optimizer = ExpertAdam(first.parameters(), lr=1e-2, eps=1e-5)
    train(first, optimizer, GradientStore(), steps[:stop])
    second.load_state_dict(first.state_dict())
    restored = ExpertAdam(second.parameters(), lr=1e-2, eps=1e-5)
    restored.load_state_dict(optimizer.state_dict())
    train(second, restored, GradientStore(), steps[stop:])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_gradients_of_unknown_origin_wake_every_expert() -> None:
    own, other = make_layer(), make_layer()
    optimizer, reference = (
        ExpertAdam(own.parameters(), 1e-2, 1e-5),
        torch.optim.Adam(other.parameters(), 1e-2, eps=1e-5),
    )
    steps = steps_with_long_rests()[: REST + 50]
    train(own, optimizer, GradientStore(), steps)
    train(other, reference, None, steps)
    for parameters, step in ((own.parameters(), optimizer.step), (other.parameters(), reference.step)):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step()
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_plain_modules_train_as_with_adam() -> None:
    torch.manual_seed(0)
    own, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(own.state_dict())
    for module, optimizer in (
        (own, ExpertAdam(own.parameters(), 1e-2, 1e-5)),
        (other, torch.optim.Adam(other.parameters(), 1e-2, eps=1e-5, fused=True)),
    ):
        for _ in range(3):
            optimizer.zero_grad()
            module(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(own.weight, other.weight)


def test_gradients_are_divided_by_the_scale_and_stay_known() -> None:
    own, other, store = make_layer().float(), make_layer().float(), GradientStore()
    optimizer = ExpertAdam(own.parameters(), lr=1e-2, eps=1e-5)
    counts, x = (3, 0, 1, 0), torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    own_parameters = list(own.parameters())
    gradients = store.differentiate(own(x, routing(counts)).square().sum(), own_parameters)
    for parameter, gradient in zip(own_parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step(grad_scale=torch.tensor(4.0))
    assert own.weight.grad is not None
    assert active_experts(own.weight.grad) == (0, 2)
    plain = torch.optim.Adam(other.parameters(), lr=1e-2, eps=1e-5)
    gradients = torch.autograd.grad(other(x, routing(counts)).square().sum() / 4, list(other.parameters()))
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient
    plain.step()
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_layers_of_an_expert_rest_together() -> None:
    """Layer 0 could rest one step earlier than layer 1; Adam moves both until both can, and counts no step twice."""
    idle = [[REST - 2], [REST - 3]]
    first, second = ([[torch.ones(2), torch.ones(2)]] for _ in range(2))
    found = [idle_experts(idle, [0], first, second, 0.9, REST) for _ in range(4)]
    assert found == [[0], [0], [], []]
    assert idle == [[REST + 1], [REST + 1]]
    assert not first[0][0].any()
    assert not first[0][1].any()
    assert idle_experts(idle, [3], first, second, 0.9, REST) == []
    assert idle == [[0], [0]]
    torch.testing.assert_close(second[0][0], torch.full((2,), 0.9**2))
