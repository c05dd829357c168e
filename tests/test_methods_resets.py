"""Methods that act on weights, layers or the optimiser: resets, projections, injection, normalisation, TRAC."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from comparing import difference
from conformance.agents import batch, begin, changed, make_agent, make_config, rollout, snapshot, train
from scipy.special import erfi
from torch import nn
from watching import linear_outputs

from sphere_rl.errors import ConfigError
from sphere_rl.methods._layers import fresh_networks, hidden_layers, linear_layers
from sphere_rl.methods.fire import nearest_isometry
from sphere_rl.methods.injection import InjectedHead
from sphere_rl.methods.nap import matrix_norms, weights
from sphere_rl.methods.trac import TracAdam, TracConfig
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent


def trained(method: str, critic: str = "topk_moe", **changes) -> Agent:
    agent = make_agent(make_config(method, critic=critic, **changes))
    begin(agent, 0)
    train(agent, 1)
    return agent


def expected_fresh(agent: Agent) -> dict[str, torch.Tensor]:
    """The fresh parameters that the agent's random stream gives next."""
    state = agent.generator.get_state()
    fresh = fresh_networks(agent)
    agent.generator.set_state(state)
    return {
        f"{name}.{key}": parameter.detach()
        for name, network in zip(("actor", "critic"), fresh, strict=True)
        for key, parameter in network.named_parameters()
    }


def step_counts(agent: Agent) -> dict[str, float]:
    return {
        f"{name}.{key}": float(optimizer.state[parameter]["step"])
        for name, network, optimizer in (
            ("actor", agent.actor, agent.actor_optimizer),
            ("critic", agent.critic, agent.critic_optimizer),
        )
        for key, parameter in network.named_parameters()
    }


def is_weight(name: str) -> bool:
    return name.endswith("weight")


@pytest.mark.parametrize(
    ("method", "concerns"),
    [
        ("reset_head", lambda name: "experts.head" in name),
        ("reset_all", lambda name: True),
        ("shrink_perturb", lambda name: True),
        ("fire", is_weight),
        ("injection", lambda name: "experts.head" in name),
    ],
)
def test_task_starts(method, concerns):
    """What the rule speaks of gets the value it says and fresh Adam state; all else is bitwise what it was."""
    agent = make_agent(make_config(method, critic="topk_moe"))
    initial = snapshot(agent)
    begin(agent, 0)
    assert not changed(initial, snapshot(agent)), "nothing at the first task"
    train(agent, 1)
    before, fresh = snapshot(agent), expected_fresh(agent)
    begin(agent, 1)
    after = snapshot(agent)
    for name, tensor in before.items():
        parameter, _, moment = name.partition("/")
        if not concerns(parameter):
            assert torch.equal(after[name], tensor), name
        elif moment:
            assert (after[name] == 0).all(), name
            assert (tensor != 0).any(), name
        elif method == "shrink_perturb":
            torch.testing.assert_close(after[name], 0.5 * tensor + 0.5 * fresh[name], rtol=0, atol=1e-7)
        elif method == "fire":
            assert not torch.equal(after[name], tensor)
        else:
            assert torch.equal(after[name], fresh[name]), name
    for name, count in step_counts(agent).items():
        assert count == (0.0 if concerns(name) else 2.0), name


def test_soft_shrink_and_perturb():
    """After every minibatch a little of fresh parameters comes in; Adam goes on."""
    soft = {"when": "minibatch", "soft_shrink": 0.9, "soft_perturb": 0.2}
    agent = trained("shrink_perturb", shrink_perturb=soft)
    before, fresh, samples = snapshot(agent), expected_fresh(agent), batch(1)
    begin(agent, 1)
    assert not changed(before, snapshot(agent)), "the soft form does nothing at a task's start"
    agent.methods[0].after_minibatch(agent, samples)
    for name, tensor in snapshot(agent).items():
        expected = before[name] if "/" in name else 0.9 * before[name] + 0.2 * fresh[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)


def test_fire_is_the_polar_factor():
    """Newton–Schulz converges to U Vᵀ of W = U S Vᵀ, scaled; ten steps are the default."""
    for shape in ((2, 5, 8), (2, 8, 5), (1, 6, 6)):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, _, vt = torch.linalg.svd(weight, full_matrices=False)
        scale = (shape[1] / shape[2]) ** 0.5
        torch.testing.assert_close(nearest_isometry(weight, 60), scale * u @ vt)
    x = torch.tensor([[[0.6, 0.0], [0.0, 0.8]]])  # ‖x‖_F = 1: every singular value by itself, σ ← 1.5σ − 0.5σ³
    one = torch.tensor([[[0.9 - 0.108, 0.0], [0.0, 1.2 - 0.256]]])
    torch.testing.assert_close(nearest_isometry(5 * x, 1), one)
    assert (nearest_isometry(torch.zeros(1, 3, 2), 10) == 0).all()


def test_injection_keeps_the_output_and_trains_only_the_new_head():
    agent = trained("injection")
    samples = batch(3).observation
    for task in (1, 2):
        outputs = agent.actor(samples), agent.critic(samples)
        old = agent.actor.experts.head.weight.detach().clone()
        begin(agent, task)
        torch.testing.assert_close((agent.actor(samples), agent.critic(samples)), outputs, rtol=0, atol=2e-6)
        head = agent.actor.experts.head
        assert isinstance(head, InjectedHead)
        assert not torch.equal(head.weight, old)
        frozen, start = head.frozen_weight.clone(), head.weight.detach().clone()
        train(agent, 1 + task)
        assert torch.equal(head.frozen_weight, frozen)
        assert not torch.equal(head.weight, start)
        assert torch.equal(agent.state_dict()["actor"]["experts.head.frozen_weight"], frozen)


def test_injection_is_the_sum_of_three_heads():
    agent = trained("injection", critic="dense")
    network, samples = agent.critic, batch(3).observation
    theta = network.experts.head.weight[0].detach().clone(), network.experts.head.bias[0].detach().clone()
    begin(agent, 1)
    b = network.experts.head.weight[0].detach().clone(), network.experts.head.bias[0].detach().clone()
    train(agent, 2)
    a = network.experts.head.weight[0].detach(), network.experts.head.bias[0].detach()
    trace = network.trace(samples)
    h = trace.features[-1].values
    three = nn.functional.linear(h, *theta) + nn.functional.linear(h, *a) - nn.functional.linear(h, *b)
    torch.testing.assert_close(trace.output, three, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reset", ["reset_head", "reset_all"])
def test_injection_refuses_resets(reset):
    with pytest.raises(ConfigError, match=f"expected injection without {reset}"):
        make_agent(make_config(reset, "injection"))


def test_nap_survives_a_layer_without_weights():
    agent = trained("nap")
    with torch.no_grad():
        agent.critic.experts.head.weight.zero_()
    agent.methods[0].after_minibatch(agent, batch(1))
    assert all(p.isfinite().all() for p in agent.critic_parameters)


def test_nap_restores_every_norm():
    agent = make_agent(make_config("nap", critic="topk_moe", learning_rate=1e-2))
    layers = [*linear_layers(agent.actor), *linear_layers(agent.critic)]
    initial = [layer.weight.detach().clone() for layer in layers]
    begin(agent, 0)
    train(agent, 1, 2)
    for layer, old in zip(layers, initial, strict=True):
        torch.testing.assert_close(layer.weight.detach().norm(dim=(1, 2)), old.norm(dim=(1, 2)), rtol=1e-5, atol=0)
    assert sum(not torch.allclose(a.weight, b, atol=1e-3) for a, b in zip(layers, initial, strict=True)) > 6


@pytest.mark.parametrize("other", ["fire", "shrink_perturb", "reset_all", "injection"])
@pytest.mark.parametrize("first", [True, False])
def test_nap_holds_new_weights_at_their_own_norms(first: bool, other: str) -> None:
    """Projected to those of the weights before them, the policy would be another after the first minibatch."""
    agent = make_agent(make_config(*(("nap", other) if first else (other, "nap")), critic="topk_moe"))
    begin(agent, 0)
    train(agent, 1, 2)
    begin(agent, 1)
    new = [matrix_norms(weight) for weight in weights(agent)]
    train(agent, 3)
    for weight, norm in zip(weights(agent), new, strict=True):
        torch.testing.assert_close(matrix_norms(weight), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["layernorm", "nap"])
def test_layer_norm_is_before_every_nonlinearity(method):
    agent = make_agent(make_config(method, critic="topk_moe"))
    for network in (agent.actor, agent.critic):
        assert network.gate is not None
        with linear_outputs(network.experts, network.gate) as before:
            trace = network.trace(batch(1).observation)
        for features, z in zip(trace.features + trace.gate_features, before, strict=True):
            centred = z - z.mean(1, keepdim=True)
            normal = centred / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            torch.testing.assert_close(features.values, normal.relu(), rtol=1e-4, atol=1e-5)
        assert not any("norm" in name for name, _ in network.named_parameters()), "no affine"


@pytest.mark.parametrize("kind", ["dense", "wide", "topk_moe"])
def test_crelu_never_leaves_a_unit_without_gradient(kind):
    agent = make_agent(make_config("crelu", actor=kind))
    stacks = [agent.actor.experts] if agent.actor.gate is None else [agent.actor.experts, agent.actor.gate]
    with linear_outputs(*stacks) as before:
        trace = agent.actor.trace(batch(1).observation)
    for features, z in zip(trace.features + trace.gate_features, before, strict=True):
        units = z.shape[1]
        assert features.values.shape[1] == 2 * units
        torch.testing.assert_close(features.values[:, :units] - features.values[:, units:], z)


def test_spectral_norm_brings_hidden_layers_to_one_and_only_learns_with_gradients():
    agent = make_agent(make_config("spectral_norm", critic="topk_moe"))
    samples = batch(1).observation
    buffers = {name: b.clone() for name, b in agent.actor.named_buffers()}
    with torch.no_grad():
        agent.actor(samples)
    assert all(torch.equal(b, buffers[name]) for name, b in agent.actor.named_buffers())
    for _ in range(300):
        agent.actor(samples)
        agent.critic(samples)
    for layer in (*hidden_layers(agent.actor), *hidden_layers(agent.critic)):
        weight = layer.weight.detach()
        used = weight / torch.einsum("eo,eoi,ei->e", layer.u, weight, layer.v)[:, None, None]
        torch.testing.assert_close(torch.linalg.matrix_norm(used, 2), torch.ones(len(used)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["none", "reset_all", "shrink_perturb", "fire"])
def test_spectral_norm_holds_for_new_weights_before_any_training_pass(method):
    """Experience is collected with weights that no training pass has seen."""
    width = {"width": 64, "depth": 3}
    agent = make_agent(make_config("spectral_norm", method, critic="topk_moe", network=width))
    for task_index in range(2):
        begin(agent, task_index)
        for layer in (*hidden_layers(agent.actor), *hidden_layers(agent.critic)):
            with torch.no_grad():
                largest = torch.linalg.matrix_norm(layer.normalized_weight(), 2)
            torch.testing.assert_close(largest, torch.ones_like(largest), rtol=0.1, atol=0)
        train(agent, 1)


def test_weight_decay_is_decoupled_and_follows_the_learning_rate():
    agent = trained("weight_decay", weight_decay={"decay": 0.25})
    agent.set_learning_rate(0.1)
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        for parameter in optimizer.param_groups[0]["params"]:
            for moment in agent.moments(parameter):
                moment.zero_()
            parameter.grad = torch.zeros_like(parameter)
            old = parameter.detach().clone()
            parameter.old = old
        optimizer.step()
        for parameter in optimizer.param_groups[0]["params"]:
            torch.testing.assert_close(parameter.detach(), parameter.old * (1 - 0.1 * 0.25))


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
    begin(agent, 0)
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
    begin(agent, 0)
    train(agent, 1)
    begin(agent, 1)
    optimizer: Any = agent.actor_optimizer
    head, references = agent.actor.experts.head.weight, [r.clone() for r in optimizer.reference]
    fresh = head.detach().clone()
    train(agent, 2)
    for parameter, before, after in zip(agent.actor_parameters, references, optimizer.reference, strict=True):
        expected = fresh if parameter is head else before
        assert torch.equal(after, expected) or parameter is agent.actor.experts.head.bias
    assert (head - fresh).abs().max() < 1e-5, "the tuner begins with tiny steps"


def test_no_method_takes_part_in_collecting():
    """Experience with LayerNorm off and any penalty on is that of plain PPO: methods act in updates only."""
    from sphere_rl.learner.rollout import Collector

    rollouts = []
    for method in ("none", "l2_init", "cbp", "trac"):
        config = make_config(method)
        envs = make_suite("gym").make(config.tasks[0], 2, 3, 1)
        agent = make_agent(config)
        rollouts.append(Collector(envs, None, agent.device).collect(agent.actor, agent.critic, 8, agent.generator))
        envs.close()
    assert all(torch.equal(r.observation, rollouts[0].observation) for r in rollouts)
    assert rollout(1).observation.shape[-1] == 3
