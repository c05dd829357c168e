"""Penalties of the methods: values by hand or by dense oracles, gradients by finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance.agents import (
    actor_step,
    batch,
    begin,
    make_agent,
    make_config,
    only_method,
    rollout,
    train,
)
from torch import Tensor

from sphere_rl.methods._layers import hidden_layers, linear_layers
from sphere_rl.methods.c_chain import policy, policy_change
from sphere_rl.methods.load_balance import balance_loss, z_loss
from sphere_rl.methods.parseval import orthogonality
from sphere_rl.methods.spectral_reg import largest_singular_value
from sphere_rl.training.agent import Agent


def double_agent(method: str, **changes) -> Agent:
    """An agent in float64 whose biases are not zero."""
    agent = make_agent(make_config(method, critic="topk_moe", **changes))
    generator = torch.Generator().manual_seed(0)
    agent.actor.double()
    agent.critic.double()
    only_method(agent).start(agent)
    with torch.no_grad():
        for p in (*agent.actor.parameters(), *agent.critic.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return agent


def check_gradient(penalty: Callable[[], Tensor], parameters: list[Tensor], rtol: float = 1e-6) -> None:
    """⟨∇f, d⟩ is (f(θ + εd) − f(θ − εd))/2ε for random directions d."""
    gradients = torch.autograd.grad(penalty(), parameters, materialize_grads=True)
    assert any(g.count_nonzero() for g in gradients)
    for seed in range(3):
        generator, step = torch.Generator().manual_seed(seed), 1e-6
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        values = []
        for sign in (1, -2, 1):  # to +ε, to −ε, back
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * step)
            values.append(penalty().item())
        slope = float(torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True)]).sum())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=rtol, abs=1e-7)


def penalties(agent: Agent) -> list[tuple[Callable[[], Tensor], list[Tensor]]]:
    """The actor's and the critic's penalty as functions, with their parameters."""
    method, samples = only_method(agent), batch(1, agent.actor_parameters[0].dtype)
    observation = samples.observation
    return [
        (lambda: method.actor_penalty(actor_step(agent, samples)), agent.actor_parameters),
        (lambda: method.critic_penalty(agent, samples, agent.critic.trace(observation)), agent.critic_parameters),
    ]


@pytest.mark.parametrize("method", ["l2_init", "parseval", "spectral_reg", "load_balance"])
def test_gradients(method):
    agent = double_agent(method)
    for penalty, parameters in penalties(agent):
        for _ in range(300 if method == "spectral_reg" else 0):
            penalty()  # the power iterations converge
        check_gradient(penalty, parameters, rtol=1e-4 if method == "spectral_reg" else 1e-6)


def test_l2_init_is_zero_at_the_start_and_a_mean_square_for_each_tensor():
    agent = make_agent(make_config("l2_init", l2_init={"strength": 0.5}))
    for penalty, _ in penalties(agent):
        assert penalty().item() == 0.0
    with torch.no_grad():
        agent.actor.experts.head.bias[0, 0] += 3.0  # of 3 experts × 1 action
        agent.critic.experts.head.bias.add_(2.0)
        next(agent.actor.head.parameters()).add_(1.0)  # log σ is a parameter, too
    values = [penalty().item() for penalty, _ in penalties(agent)]
    assert values == pytest.approx([0.5 * (9 / 3 + 1), 0.5 * 4])


def test_orthogonality_by_hand():
    weight = torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]])  # W Wᵀ = 5 and 9
    assert float(orthogonality(weight, 2.0)) == 9 + 49
    assert float(orthogonality(weight.mT.contiguous(), 2.0)) == 9 + 49  # the smaller side
    assert float(orthogonality(2**0.5 * torch.eye(3)[None], 2.0)) == pytest.approx(0, abs=1e-10)


def test_parseval_covers_hidden_layers_of_experts_and_gate():
    agent = double_agent("parseval", parseval={"strength": 0.1, "scale": 1.5})
    expected = 0.0
    for layer in hidden_layers(agent.actor):
        for matrix in layer.weight.detach():
            small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            expected += float((small @ small.T - 1.5 * torch.eye(len(small), dtype=matrix.dtype)).square().sum())
    assert len(hidden_layers(agent.actor)) == 4
    assert penalties(agent)[0][0]().item() == pytest.approx(0.1 * expected)


def test_spectral_reg_finds_every_largest_singular_value():
    agent = double_agent("spectral_reg", spectral_reg={"strength": 0.1, "power": 3})
    (penalty, _), _ = penalties(agent)
    for _ in range(300):
        penalty()
    value, expected = penalty().item(), 0.0
    for layer in linear_layers(agent.actor):
        largest = torch.linalg.matrix_norm(layer.weight.detach(), 2)
        expected += float((largest**3 - 1).square().sum() + layer.bias.detach().norm(dim=1).pow(6).sum())
    assert value == pytest.approx(0.1 * expected, rel=1e-5)


def test_one_power_iteration_by_hand():
    weight, u = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0.6, 0.8]])
    # v ∝ (1.2, 0.8), u ∝ (2.4, 0.8): σ = uᵀWv = |W v|
    v = torch.tensor([1.2, 0.8]) / (1.2**2 + 0.8**2) ** 0.5
    sigma = largest_singular_value(weight, u)
    assert sigma.item() == pytest.approx(float((weight[0] @ v).norm()))
    torch.testing.assert_close(u[0], torch.tensor([2.4, 0.8]) / (2.4**2 + 0.8**2) ** 0.5)


def test_load_balance_by_hand():
    even = torch.log(
        torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1] * 3 + [0.7]])
    )
    assert float(balance_loss(even, 1)) == pytest.approx(1.0)
    assert float(z_loss(even + 2.0)) == pytest.approx(4.0)
    # Expert 0 always first, expert 1 always second: f = (1/2, 1/2, 0, 0), P = (0.5, 0.3, 0.1, 0.1).
    skewed = torch.log(torch.tensor([[0.5, 0.3, 0.1, 0.1]] * 3))
    assert float(balance_loss(skewed, 2)) == pytest.approx(4 * (0.5 * 0.5 + 0.5 * 0.3))
    collapsed = torch.tensor([[50.0, 49.0, 0.0, 0.0]] * 3)
    assert float(balance_loss(collapsed, 2)) == pytest.approx(4 / 2)


def test_load_balance_gradient_descent_evens_the_load():
    logits = torch.tensor([[1.0, 0.5, 0.0]] * 8) + 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(3, requires_grad=True)
    for _ in range(200):
        (gradient,) = torch.autograd.grad(balance_loss(logits + bias, 1), [bias])
        bias = (bias - 0.05 * gradient).detach().requires_grad_()
    assert (logits + bias).argmax(1).bincount(minlength=3).max() < 8


@pytest.mark.parametrize("actor", ["topk_moe", "dense_moe", "shared_moe", "ds_moe", "dense"])
def test_load_balance_covers_every_gate(actor):
    agent = make_agent(make_config("load_balance", actor=actor, critic="topk_moe"))
    (actor_penalty, _), (critic_penalty, _) = penalties(agent)
    assert critic_penalty().item() > 0
    value = actor_penalty()
    if actor == "dense":
        assert value is None
        return
    trace = agent.actor.trace(batch(1).observation)
    assert trace.logits is not None
    expected = 0.01 * balance_loss(trace.logits, 2) + 0.001 * trace.logits.logsumexp(1).square().mean()
    torch.testing.assert_close(value, expected)


def test_c_chain_compares_with_the_policy_before_the_last_step():
    agent = double_agent("c_chain", c_chain={"coefficient": 7.0, "warmup": 3})
    method = only_method(agent)
    begin(agent, 0)
    generator, policies, losses, penalty = torch.Generator().manual_seed(3), [], [], None
    observations = [batch(seed, torch.float64).observation for seed in (1, 2, 3)]
    for seed in (1, 2, 3):
        step = actor_step(agent, batch(seed, torch.float64))
        policies.append([agent.actor(o).detach() for o in observations])
        losses.append(abs(step.loss.item()))
        penalty = method.actor_penalty(step)
        if seed < 3:
            assert penalty is None
            with torch.no_grad():
                for p in agent.actor.parameters():
                    p.add_(0.01 * torch.randn(p.shape, generator=generator))
    churn = float((policies[2][0] - policies[1][0]).square().sum(1).mean())  # on the first batch, by the second step
    assert churn > 0
    assert penalty is not None
    assert penalty.item() == pytest.approx(7.0 * churn)
    method.after_iteration(agent, rollout(1))
    assert method.metrics() == pytest.approx({"c_chain_coefficient": 7.0, "c_chain_churn": churn})
    method.after_iteration(agent, rollout(1))
    method.after_iteration(agent, rollout(1))
    assert method.metrics()["c_chain_coefficient"] == pytest.approx(0.05 * losses[2] / churn)
    begin(agent, 1)
    assert method.actor_penalty(actor_step(agent, batch(1, torch.float64))) is None, (
        "another task's states are no reference"
    )
    assert method.metrics() == {"c_chain_coefficient": 7.0, "c_chain_churn": 0.0}, "each task has its own warm-up"


def test_c_chain_compares_discrete_policies_by_their_divergence():
    task = "CartPole-v1"
    agent = make_agent(make_config("c_chain", actor="dense"), task=task)
    agent.actor.double()
    observation = rollout(1, task).observation.flatten(0, 1).double()
    before = policy(agent, observation).detach()
    with torch.no_grad():
        agent.actor.experts.head.weight.mul_(1.5)
    after = agent.actor(observation).softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=before), torch.distributions.Categorical(probs=after)
    ).mean()
    assert policy_change(agent, observation, before).item() == pytest.approx(expected.item(), rel=1e-9)
    assert expected > 0


def test_c_chain_gradient():
    agent = double_agent("c_chain")
    method = only_method(agent)
    for seed in (1, 2):
        method.actor_penalty(actor_step(agent, batch(seed, torch.float64)))
    with torch.no_grad():
        agent.actor.experts.head.weight.mul_(1.1)
    reference = method._reference

    def penalty() -> Tensor:
        method._reference = reference
        return method.actor_penalty(actor_step(agent, batch(3, torch.float64)))

    check_gradient(penalty, agent.actor_parameters, rtol=1e-5)


def test_c_chain_lessens_churn():
    churns = []
    for coefficient in (0.0, 1e4):
        agent = make_agent(
            make_config("c_chain", c_chain={"coefficient": coefficient, "warmup": 100}, learning_rate=3e-3)
        )
        begin(agent, 0)
        train(agent, 1, 2, 3, 1, 2, 3)
        churns.append(float(only_method(agent).metrics()["c_chain_churn"]))
    assert churns[1] < 0.8 * churns[0]
