"""Methods that act on weights, layers or the optimiser: resets, projections, injection, normalisation, TRAC."""

from __future__ import annotations

import pytest
import torch
from conformance.agents import batch, changed, make_agent, make_config, rollout, snapshot, train, trained
from torch import nn
from watching import linear_outputs

from sphere_rl.errors import ConfigError
from sphere_rl.methods._layers import fresh_networks, hidden_layers, linear_layers
from sphere_rl.methods.fire import nearest_isometry
from sphere_rl.methods.injection import InjectedHead
from sphere_rl.methods.nap import matrix_norms, weights
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent


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
    agent.begin_task(0)
    assert not changed(initial, snapshot(agent)), "nothing at the first task"
    train(agent, 1)
    before, fresh = snapshot(agent), expected_fresh(agent)
    agent.begin_task(1)
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
    agent.begin_task(1)
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
        agent.begin_task(task)
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
    agent.begin_task(1)
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
    agent.begin_task(0)
    train(agent, 1, 2)
    for layer, old in zip(layers, initial, strict=True):
        torch.testing.assert_close(layer.weight.detach().norm(dim=(1, 2)), old.norm(dim=(1, 2)), rtol=1e-5, atol=0)
    assert sum(not torch.allclose(a.weight, b, atol=1e-3) for a, b in zip(layers, initial, strict=True)) > 6


@pytest.mark.parametrize("other", ["fire", "shrink_perturb", "reset_all", "injection"])
@pytest.mark.parametrize("first", [True, False])
def test_nap_holds_new_weights_at_their_own_norms(first: bool, other: str) -> None:
    """Projected to those of the weights before them, the policy would be another after the first minibatch."""
    agent = make_agent(make_config(*(("nap", other) if first else (other, "nap")), critic="topk_moe"))
    agent.begin_task(0)
    train(agent, 1, 2)
    agent.begin_task(1)
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
        agent.begin_task(task_index)
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
