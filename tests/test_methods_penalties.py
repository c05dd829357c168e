"""Penalties of the methods: values by hand or by dense oracles, gradients by finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance.agents import (
    SHORT,
    actor_step,
    batch,
    make_agent,
    make_config,
    only_method,
    rollout,
    train,
)
from torch import Tensor

from sphere_rl.errors import ConfigError
from sphere_rl.experts.network import MoENetwork
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.rollout import Collector
from sphere_rl.methods._layers import hidden_layers, linear_layers
from sphere_rl.methods.c_chain import policy, policy_change
from sphere_rl.methods.load_balance import balance_loss, z_loss
from sphere_rl.methods.parseval import add_gradient
from sphere_rl.methods.spectral_reg import power_iteration
from sphere_rl.suites import make_suite
from sphere_rl.suites.spaces import LARGEST
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import update
from sphere_rl.training.step import actor_loss, add_parameter_gradients
from sphere_rl.training.step import actor_step as step_of_actor
from sphere_rl.training.step import critic_step as step_of_critic


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


def test_gradients_of_load_balance():
    for penalty, parameters in penalties(double_agent("load_balance")):
        check_gradient(penalty, parameters)


def l2_init_by_hand(network: MoENetwork, before: MoENetwork) -> Tensor:
    pairs = zip(network.parameters(), before.parameters(), strict=True)
    return 0.1 * torch.stack([(p - p0).square().mean() for p, p0 in pairs]).sum()


def parseval_by_hand(network: MoENetwork, _: MoENetwork) -> Tensor:
    terms = []
    for matrix in (matrix for layer in hidden_layers(network) for matrix in layer.weight):
        small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        terms.append((small @ small.T - 1.5 * torch.eye(len(small), dtype=matrix.dtype)).square().sum())
    assert len(terms) == 8  # two hidden layers of three experts and a gate
    return 0.1 * torch.stack(terms).sum()


def spectral_reg_by_hand(network: MoENetwork, _: MoENetwork) -> Tensor:
    terms = []
    for layer in linear_layers(network):
        largest = torch.linalg.matrix_norm(layer.weight, 2)
        terms += [(largest**3 - 1).square().sum(), layer.bias.norm(dim=1).pow(6).sum()]
    return 0.1 * torch.stack(terms).sum()


PARAMETER_PENALTIES = [
    ("l2_init", {}, l2_init_by_hand, 1e-9),
    ("parseval", {"scale": 1.5}, parseval_by_hand, 1e-9),
    ("spectral_reg", {"power": 3}, spectral_reg_by_hand, 1e-4),
]
"""Method, options beside strength 0.1, its penalty in plain PyTorch, and how exactly it is computed."""


@pytest.mark.parametrize(
    ("method", "options", "penalty", "rtol"), PARAMETER_PENALTIES, ids=[case[0] for case in PARAMETER_PENALTIES]
)
def test_penalties_on_parameters_give_steps_the_gradient_that_autograd_would(method, options, penalty, rtol):
    changes = {method: {"strength": 0.1} | options, "max_grad_norm": 1e9}
    agent, samples = double_agent(method, **changes), batch(1, torch.float64)
    start = make_agent(make_config(method, critic="topk_moe", **changes))
    for network, zeros in ((name, zeros_of(agent, name)) for name in ("actor", "critic")):
        for _ in range(300 if method == "spectral_reg" else 0):  # the power iterations converge
            add_parameter_gradients(agent, network, *zeros)
    policy_loss, _ = actor_loss(agent.actor.head, agent.actor(samples.observation), samples, agent.config)
    value = agent.critic(samples.observation).squeeze(-1)
    value_loss = agent.config.value_coefficient * (value - samples.value_target).square().mean()
    for loss, network, before, parameters, step in (
        (policy_loss, agent.actor, start.actor.double(), agent.actor_parameters, step_of_actor),
        (value_loss, agent.critic, start.critic.double(), agent.critic_parameters, step_of_critic),
    ):
        total = loss + penalty(network, before)
        expected = torch.autograd.grad(total, parameters, materialize_grads=True)
        step(agent, samples, agent.config)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=rtol, atol=1e-3 * rtol)


def zeros_of(agent: Agent, network: str) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a network, and gradients of zero."""
    parameters = agent.actor_parameters if network == "actor" else agent.critic_parameters
    return parameters, [torch.zeros_like(p) for p in parameters]


def test_l2_init_pulls_at_nothing_where_training_began():
    agent = make_agent(make_config("l2_init", l2_init={"strength": 0.5}))
    parameters, gradients = zeros_of(agent, "actor")
    add_parameter_gradients(agent, "actor", parameters, gradients)
    assert not any(gradient.count_nonzero() for gradient in gradients)
    with torch.no_grad():
        agent.actor.experts.head.bias[0, 0] += 3.0  # of 3 experts × 1 action
        next(agent.actor.head.parameters()).add_(1.0)  # log σ is a parameter, too
    add_parameter_gradients(agent, "actor", parameters, gradients)
    found = [value for gradient in gradients for value in gradient[gradient != 0].tolist()]
    assert found == pytest.approx([2 * 0.5 * 3.0 / 3, 2 * 0.5 * 1.0])


def test_one_step_of_parseval_by_hand():
    weight = torch.tensor([[[1.0, 2.0, 0.0]], [[0.0, 0.0, 3.0]]])  # W Wᵀ = 5 and 9: 4λ (5 − 2) W and 4λ (9 − 2) W
    expected = 1 + torch.tensor([[[6.0, 12.0, 0.0]], [[0.0, 0.0, 42.0]]])
    for own, wanted in ((weight, expected), (weight.mT.contiguous(), expected.mT)):  # the smaller side
        gradient = torch.ones_like(own)
        add_gradient(own, 2.0, 0.5, gradient)
        torch.testing.assert_close(gradient, wanted)


def test_one_power_iteration_by_hand():
    weight, u = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0.6, 0.8]])
    # v ∝ (1.2, 0.8), u ∝ (2.4, 0.8): σ = uᵀWv = |W v|
    v = torch.tensor([1.2, 0.8]) / (1.2**2 + 0.8**2) ** 0.5
    sigma, found = power_iteration(weight, u)
    torch.testing.assert_close(found[0], v)
    assert sigma.item() == pytest.approx(float((weight[0] @ v).norm()))
    torch.testing.assert_close(u[0], torch.tensor([2.4, 0.8]) / (2.4**2 + 0.8**2) ** 0.5)


def test_load_balance_where_there_are_fewer_experts_than_a_gate_would_choose():
    """dense_moe selects none, so its experts may be fewer than top_k; all are chosen then and the load is even."""
    agent = make_agent(make_config("load_balance", actor="dense_moe", network={"num_experts": 1, "width": 16}))
    penalty = only_method(agent).actor_penalty(actor_step(agent, batch()))
    assert penalty is not None
    assert float(only_method(agent).metrics()["load_balance_actor"]) == 1.0


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


def test_bound_loss_by_hand():
    """Of a box from −1 to 3 the half width is 2; without an upper bound actions count as they are."""
    spaces = Spaces(3, 2, discrete=False, low=(-1.0, -1.0), high=(3.0, LARGEST))
    method = only_method(Agent(make_config("bound_loss"), spaces, 0))
    found = method.outside(torch.tensor([[-5.0, -2.0], [4.0, 1e9], [0.0, 0.0], [3.0, -1.0]]))
    assert found.tolist() == [[2.0, 1.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]
    point = Spaces(3, 2, discrete=False, low=(-1.0, 0.0), high=(3.0, 0.0))  # of an action that does nothing
    method = only_method(Agent(make_config("bound_loss"), point, 0))
    assert method.outside(torch.tensor([[1.0, 0.0], [1.0, -0.5]])).tolist() == [[0.0, 0.0], [0.0, 0.5]]
    agent = make_agent(make_config("bound_loss", bound_loss={"coefficient": 0.5}))
    with torch.no_grad():
        agent.actor.experts.head.bias.add_(3.0)  # Pendulum takes torques from −2 to 2
    step = actor_step(agent, batch(1))
    mean = step.trace.output
    share = (mean > 2).float().mean().item()
    assert 0 < share < 1
    loss = ((mean - 2) / 2).clamp(min=0).square().mean().item()
    assert only_method(agent).actor_penalty(step).item() == pytest.approx(0.5 * loss)
    metrics = {name: float(value) for name, value in only_method(agent).metrics().items()}
    assert metrics == {"bound_loss": pytest.approx(loss), "bound_loss_share": pytest.approx(share)}


def test_bound_loss_gradient_and_where_there_is_no_box():
    agent = double_agent("bound_loss")
    with torch.no_grad():
        agent.actor.experts.head.bias.add_(3.0)
    (actor_penalty, parameters), _ = penalties(agent)
    assert actor_penalty().item() > 0
    check_gradient(actor_penalty, parameters)
    unknown = Agent(agent.config, Spaces(3, 1, discrete=False), 0)
    assert only_method(unknown).actor_penalty(actor_step(unknown, batch(1))).item() == 0
    with pytest.raises(ConfigError, match="method: 'bound_loss' is not allowed; expected a task with continuous"):
        make_agent(make_config("bound_loss"), task="CartPole-v1")


def test_bound_loss_brings_back_an_agent_whose_actions_are_all_clipped():
    """Beyond the box everything that it tries is the bound, and plain PPO sees nothing that would lead back."""
    left = {}
    for method in ("none", "bound_loss"):
        agent = make_agent(make_config(method, learning_rate=3e-3, num_steps=64, steps_per_task=128))
        with torch.no_grad():
            agent.actor.experts.head.bias.add_(8.0)  # σ is 1, the bound 2
        envs = make_suite("gym").make(SHORT, 2, 0, 1)
        collector = Collector(envs, None, agent.device)
        for _ in range(20):
            update(agent, collector.collect(agent.actor, agent.critic, 64, agent.generator), agent.config)
        envs.close()
        left[method] = agent.actor(batch(1).observation).mean().item()
    assert left["bound_loss"] < 3.5 < 5.5 < left["none"]


def test_c_chain_compares_with_the_policy_before_the_last_step():
    agent = double_agent("c_chain", c_chain={"coefficient": 7.0, "warmup": 3})
    method = only_method(agent)
    agent.begin_task(0)
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
    agent.begin_task(1)
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
    reference = method.state_dict()

    def penalty() -> Tensor:
        method.load_state_dict(reference)
        return method.actor_penalty(actor_step(agent, batch(3, torch.float64)))

    check_gradient(penalty, agent.actor_parameters, rtol=1e-5)


def test_c_chain_lessens_churn():
    churns = []
    for coefficient in (0.0, 1e4):
        agent = make_agent(
            make_config("c_chain", c_chain={"coefficient": coefficient, "warmup": 100}, learning_rate=3e-3)
        )
        agent.begin_task(0)
        train(agent, 1, 2, 3, 1, 2, 3)
        churns.append(float(only_method(agent).metrics()["c_chain_churn"]))
    assert churns[1] < 0.8 * churns[0]
