"""TRAC: beside its authors' package, by hand, and beside methods that change parameters, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from comparing import difference
from conformance.agents import make_agent, make_config, train, trained
from scipy.special import erfi
from torch import nn

from sphere_rl.methods.trac import TracAdam, TracConfig


def quadratic(parameters: list[nn.Parameter], step: int) -> None:
    """Gradients of a problem whose minimum moves."""
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        noise = torch.randn(p.shape, generator=generator)
        p.grad = p.detach() - (1.0 if step < 40 else -2.0) + 0.3 * noise


def start_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (4,), (2, 2, 2))]


def test_trac_is_the_published_package(tmp_path, monkeypatch):
    """Step by step, with an exact erfi in place of the package's float32 approximation (off by about 1 %)."""
    published: Any = pytest.importorskip("trac_optimizer.trac")
    approximate = published.erfi(torch.tensor([0.3, 0.9]))
    torch.testing.assert_close(approximate, torch.tensor(erfi([0.3, 0.9])).float(), rtol=2e-2, atol=0)
    monkeypatch.setattr(published, "erfi", lambda x: torch.as_tensor(erfi(x.double().numpy())).float())
    # From s0 = 1e-8 the tuner takes thousands of steps to move by more than round-off.
    mine, theirs, start = start_parameters(), start_parameters(), start_parameters()
    own = TracAdam(mine, TracConfig(s0=0.01), lr=0.05, eps=1e-5)
    other = published.start_trac(str(tmp_path / "log"), torch.optim.Adam, s_prev=0.01)(theirs, lr=0.05, eps=1e-5)
    for step in range(60):
        if step == 20:
            for optimizer in (own, other):
                optimizer.param_groups[0]["lr"] = 0.02
        quadratic(mine, step)
        quadratic(theirs, step)
        own.step()
        other.step()
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(mine, start, strict=True)) > 0.5


def test_trac_by_hand():
    """One parameter, one β, gradients −1 and −2, Adam without momentum's bias: two steps in scalars."""
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    config = TracConfig(betas=(0.5,), s0=0.1, eps=1e-8)
    optimizer = TracAdam([p], config, lr=0.2, eps=0.0)
    p.grad = torch.tensor([-1.0], dtype=torch.float64)
    optimizer.step()
    # Adam moves by lr; Δ was 0, so h = 0, v = 0, σ = 0.5·1e-8 and s = 0.1·erfi(0.5)/erfi(1/√2).
    s = 0.1 * erfi(0.5) / erfi(2**-0.5)
    assert p.item() == pytest.approx(1 + s * 0.2)
    p.grad = torch.tensor([-2.0], dtype=torch.float64)
    optimizer.step()
    delta = s * 0.2 / (s + 1e-8)
    h = -2 * delta
    sigma = 0.25 * 1e-8 - h
    s = 0.1 * erfi(sigma / (np.sqrt(2 * h**2) + 1e-8)) / erfi(2**-0.5)
    m, v = (0.9 * 0.1 + 0.1 * 2) / (1 - 0.9**2), (0.999 * 0.001 + 0.001 * 4) / (1 - 0.999**2)
    assert p.item() == pytest.approx(1 + s * (delta + 0.2 * m / v**0.5))


def test_trac_comes_back_from_steps_that_were_no_good() -> None:
    """The first move is uphill for the next gradient, so that Σs falls below 0: Δ goes on adding up from there."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = TracAdam([p], TracConfig(), lr=0.1, eps=1e-5)
    for gradient in [1.0] + [-1.0] * 60:
        p.grad = torch.tensor([gradient])
        optimizer.step()
    assert optimizer.moved[0].item() > 1
    assert p.item() > 1.01


def test_trac_keeps_steps_that_are_less_than_round_off() -> None:
    """With s₀ = 1e-8 the first steps change no float32 number near 1; their sum does."""
    p = nn.Parameter(torch.tensor([1.0]))
    optimizer = TracAdam([p], TracConfig(), lr=0.1, eps=1e-5)
    for _ in range(3):
        p.grad = torch.tensor([-1.0])
        optimizer.step()
    assert p.item() == 1
    assert optimizer.moved[0].item() == pytest.approx(0.3, rel=1e-3)


@pytest.mark.parametrize("other", ["redo", "cbp", "nap", "shrink_perturb"])
def test_what_others_change_is_no_move_of_tracs(other: str) -> None:
    agent = make_agent(make_config("trac", other, shrink_perturb={"when": "minibatch", "soft_perturb": 0.1}))
    agent.begin_task(0)
    train(agent, 1, 2)
    optimizer: Any = agent.actor_optimizer
    moved, there = [m.clone() for m in optimizer.moved], [p.detach().clone() for p in agent.actor_parameters]
    for parameter, value in zip(agent.actor_parameters, there, strict=True):
        parameter.grad = torch.zeros_like(value)
    optimizer.step()
    for parameter, value, before, after in zip(agent.actor_parameters, there, moved, optimizer.moved, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=1e-5)
        assert (after - before).abs().max() < 1e-2, "a step of Adam's and no more"


def test_trac_takes_checkpoints_without_its_moves() -> None:
    agent, again = trained("trac", learning_rate=0.1), make_agent(make_config("trac", critic="topk_moe"))
    optimizer, other = agent.critic_optimizer, again.critic_optimizer
    assert isinstance(optimizer, TracAdam)
    assert isinstance(other, TracAdam)
    scale = max(float(optimizer.state_dict()["tuner"]["s"].sum()), 0.0) + 1e-8
    state = agent.state_dict()
    del state["actor_optimizer"]["moved"], state["critic_optimizer"]["moved"]
    again.load_state_dict(state)
    for p, reference, moved in zip(again.critic_parameters, optimizer.reference, other.moved, strict=True):
        torch.testing.assert_close(moved, (p.detach() - reference) / scale)


def test_trac_keeps_its_reference_when_moments_are_reset():
    agent = trained("trac")
    optimizer: Any = agent.actor_optimizer
    reference = [r.clone() for r in optimizer.reference]
    for parameter in agent.actor_parameters:
        assert len(agent.moments(parameter)) == 2
        agent.forget(parameter)
    assert difference(reference, optimizer.reference) is None
    agent.set_learning_rate(0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_trac_starts_anew_on_tensors_that_are_replaced():
    """A replaced tensor's reference is its new value, so that the tuner does not pull it back to the old start."""
    agent = make_agent(make_config("trac", "reset_head"))
    agent.begin_task(0)
    train(agent, 1)
    agent.begin_task(1)
    optimizer: Any = agent.actor_optimizer
    head, references = agent.actor.experts.head.weight, [r.clone() for r in optimizer.reference]
    fresh = head.detach().clone()
    train(agent, 2)
    for parameter, before, after in zip(agent.actor_parameters, references, optimizer.reference, strict=True):
        expected = fresh if parameter is head else before
        assert torch.equal(after, expected) or parameter is agent.actor.experts.head.bias
    assert (head - fresh).abs().max() < 1e-5, "the tuner begins with tiny steps"
