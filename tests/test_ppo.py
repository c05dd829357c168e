from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from sphere_rl.config import TrainConfig, override
from sphere_rl.errors import TrainingError
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.feature_penalty import NO_PENALTY
from sphere_rl.learner.losses import adapt_learning_rate, normalize, policy_loss, value_loss
from sphere_rl.learner.minibatch import Minibatch, flatten
from sphere_rl.learner.rollout import Collector, Rollout
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import train_epochs, update
from sphere_rl.training.step import Description, actor_step, apply_gradients, critic_step, direct_actor_step


def test_policy_loss_by_hand() -> None:
    ratio, advantage = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1]), torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0])
    loss = policy_loss(ratio.log(), torch.zeros(5), advantage, clip=0.2)
    # min(r A, clip(r) A): 1.2, 0.5, -1.5, -0.8, 2.2
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5)


def test_clipped_samples_have_no_gradient() -> None:
    log_prob = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    policy_loss(log_prob, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), clip=0.2).backward()
    # d/d log r of -r A / 4 where the unclipped term is the smaller one
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0, -0.5 / 4, 1.5 / 4, 0.0]))


def test_value_loss_and_normalize_by_hand() -> None:
    assert value_loss(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])).item() == pytest.approx((1 + 4) / 2)
    torch.testing.assert_close(
        normalize(torch.tensor([1.0, 2.0, 6.0])), torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(7.0)
    )


@pytest.mark.parametrize(("kl", "expected"), [(0.014, 1.5e-3), (0.016, 1e-3), (0.059, 1e-3), (0.061, 1e-3 / 1.5)])
def test_learning_rate_follows_kl(kl: float, expected: float) -> None:
    assert adapt_learning_rate(1e-3, kl, target=0.03, bounds=(1e-5, 1e-2)) == pytest.approx(expected)


def test_learning_rate_stays_in_its_bounds() -> None:
    assert adapt_learning_rate(9e-3, 0.0, 0.03, (1e-5, 1e-2)) == 1e-2
    assert adapt_learning_rate(1.2e-5, 1.0, 0.03, (1e-5, 1e-2)) == 1e-5


def test_gradients_are_clipped_by_global_norm_before_adam() -> None:
    parameters = [torch.zeros(2), torch.zeros(1)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    norm = apply_gradients(optimizer, parameters, [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], max_norm=0.5)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(torch.cat(parameters), torch.tensor([-0.3, 0.0, -0.4]), rtol=1e-5, atol=0)


@pytest.fixture
def agent(tiny: TrainConfig) -> Agent:
    return Agent(tiny, Spaces(3, 1, discrete=False), seed=0)


def rollout_of(agent: Agent) -> Rollout:
    envs = make_suite("gym").make("Pendulum-v1", 2, 0, 1)
    return Collector(envs, None, agent.device).collect(agent.actor, agent.critic, 64, agent.generator)


def minibatch(rows: int = 8) -> Minibatch:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return Minibatch(draw(rows, 3), draw(rows, 1), draw(rows, 2) * 0.1, draw(rows) - 2, draw(rows), draw(rows))


def direct_step(agent: Agent, batch: Minibatch, config: TrainConfig) -> list[torch.Tensor]:
    return direct_actor_step(agent, batch, config, keep=False, direct=Description(NO_PENALTY, None))


@pytest.mark.parametrize("step", [direct_step, actor_step])
def test_an_actors_step_is_adam_on_the_clipped_gradient(step: Callable, agent: Agent, tiny: TrainConfig) -> None:
    """Against the same step written out with plain autograd and a hand-made first Adam step."""
    batch, before = minibatch(), [p.detach().clone() for p in agent.actor_parameters]
    log_prob = agent.actor.head.log_prob(agent.actor(batch.observation), batch.action)
    loss = policy_loss(log_prob, batch.log_prob, normalize(batch.advantage), 0.2)
    gradients = torch.autograd.grad(loss, agent.actor_parameters, materialize_grads=True)
    norm = torch.sqrt(sum((g.square().sum() for g in gradients), start=torch.zeros(())))
    scale = min(1.0, 0.5 / (norm.item() + 1e-6))
    critic = [p.detach().clone() for p in agent.critic_parameters]
    statistics = step(agent, batch, tiny)
    assert statistics[0].item() == pytest.approx(loss.item())
    assert statistics[-1].item() == pytest.approx(norm.item(), rel=1e-4)
    for parameter, old, gradient in zip(agent.actor_parameters, before, gradients, strict=True):
        g = gradient * scale
        expected = old - 3e-4 * g / (g.abs() + 1e-5)  # the first Adam step, both moments bias-corrected
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-7)
    assert all(torch.equal(a, b) for a, b in zip(agent.critic_parameters, critic, strict=True))


def test_critic_step_moves_the_critic_alone_and_fits_its_targets(agent: Agent, tiny: TrainConfig) -> None:
    batch, before = minibatch(), [p.detach().clone() for p in agent.actor_parameters]
    losses = [critic_step(agent, batch, tiny)[0].item() for _ in range(200)]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(agent.actor_parameters, before, strict=True))


def test_every_epoch_sees_every_sample_once_in_a_fresh_order(agent: Agent, tiny: TrainConfig) -> None:
    seen: list[torch.Tensor] = []
    method = agent.methods[0]
    method.after_minibatch = lambda agent, batch: seen.append(batch.log_prob)  # type: ignore[method-assign]
    rollout = rollout_of(agent)
    update(agent, rollout, tiny)
    epochs = torch.cat(seen).view(tiny.num_epochs, -1)
    expected = rollout.log_prob.flatten().sort().values
    assert all(torch.equal(epoch.sort().values, expected) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_update_with_the_kl_schedule_moves_the_rate_within_the_iteration(tiny: TrainConfig) -> None:
    config = override(tiny, {"learning_rate_schedule": "kl", "learning_rate": 1e-4})
    agent = Agent(config, Spaces(3, 1, discrete=False), seed=0)
    update(agent, rollout_of(agent), config)
    assert agent.learning_rate > 1e-4  # the first minibatches have nearly no KL
    assert {group["lr"] for group in agent.critic_optimizer.param_groups} == {agent.learning_rate}


@pytest.mark.parametrize("schedule", ["constant", "kl"])
@pytest.mark.parametrize("actor", ["dense", "topk_moe"])
def test_an_epoch_in_one_call_is_its_minibatches_one_by_one(actor: str, schedule: str, tiny: TrainConfig) -> None:
    changes = {"actor": actor, "method": ("sphere",), "learning_rate_schedule": schedule, "network.num_experts": 5}
    config, results = override(tiny, changes), []
    for apart in (False, True):
        agent = Agent(config, Spaces(3, 1, discrete=False), seed=0)
        if apart:  # something happens between minibatches: each is a call of its own
            agent.methods[0].after_minibatch = lambda agent, batch: None  # type: ignore[method-assign]
        statistics = [update(agent, rollout_of(agent), config) for _ in range(2)]
        idle = [agent.actor_optimizer.state[p].get("idle") for p in agent.actor_parameters]
        carried = [p.grad for p in agent.actor_parameters + agent.critic_parameters]
        state = [*agent.actor_parameters, *agent.critic_parameters, *carried]
        results.append((statistics, agent.learning_rate, agent.methods[0].metrics(), idle, state))
    (*one, own), (*each, others) = results
    assert one == each
    assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("method", ["none", "sphere", "l2_init"])  # the step with and without autograd
def test_a_target_kl_ends_the_update_before_the_step_that_goes_too_far(
    method: str, apart: bool, tiny: TrainConfig
) -> None:
    """Up to there it is the update without a target; the policy is that of the minibatch before."""
    results, states = [], []
    for target in (0.0, 0.002):
        changes = {"method": (method,), "learning_rate": 3e-3, "target_kl": target, "num_epochs": 6}
        config = override(tiny, changes)
        agent = Agent(config, Spaces(3, 1, discrete=False), seed=0)
        taken: list[dict] = []
        if apart:
            follow = lambda agent, batch, taken=taken: taken.append(  # noqa: E731
                {name: value.clone() for name, value in agent.actor.state_dict().items()}
            )
            agent.methods[0].after_minibatch = follow  # type: ignore[method-assign]
        rollout = rollout_of(agent)
        batch = flatten(rollout, torch.arange(128.0).view(64, 2))
        results.append(train_epochs(agent, batch, config))
        states.append((taken, agent))
    (every, none), (some, stopped) = results
    limit = 1.5 * 0.002
    kl = [float(row[1]) for row in every]
    first = next(i for i, value in enumerate(kl) if value > limit)
    assert 0 < first < len(every) - 1
    assert none == 0
    assert stopped == 6 - first // 4  # 128 samples in minibatches of 32
    assert len(some) == first + 1
    torch.testing.assert_close(torch.stack(some), torch.stack(every[: first + 1]))
    taken, agent = states[1]
    if apart:
        assert len(taken) == first + 1  # the critic has taken its step
        before = states[0][0][first - 1]
        assert all(torch.equal(value, before[name]) for name, value in agent.actor.state_dict().items())
        assert all(torch.equal(value, taken[-1][name]) for name, value in agent.actor.state_dict().items())
    assert all(p.grad is not None for p in agent.actor_parameters + agent.critic_parameters)
    (step,) = {float(state["step"]) for state in agent.actor_optimizer.state.values()}
    assert step == first


@pytest.mark.parametrize("method", ["none", "l2_init"])  # the step with and without autograd
def test_a_rate_that_follows_the_kl_falls_where_target_kl_ends_updates(method: str, tiny: TrainConfig) -> None:
    """Else the first minibatch of each, whose KL is 0, would raise it to its bound, where updates are over at once."""
    changes = {"method": (method,), "learning_rate_schedule": "kl", "kl_target": 0.03, "target_kl": 0.02}
    config = override(tiny, changes | {"learning_rate": 9e-3, "num_epochs": 6})
    agent = Agent(config, Spaces(3, 1, discrete=False), seed=0)
    batch = flatten(rollout_of(agent), torch.arange(128.0).view(64, 2))
    before, (statistics, stopped) = agent.learning_rate, train_epochs(agent, batch, config)
    assert stopped > 0
    assert len(statistics) > 1
    assert agent.learning_rate == pytest.approx(before / 1.5)
    assert {group["lr"] for group in agent.actor_optimizer.param_groups} == {agent.learning_rate}


def test_an_update_counts_routings_that_flip(tiny: TrainConfig) -> None:
    config = override(tiny, {"learning_rate": 3e-2})
    agent = Agent(config, Spaces(3, 1, discrete=False), seed=0)
    rollout = rollout_of(agent)
    rows = rollout.observation.flatten(0, 1)
    before = agent.actor.trace(rows).gates > 0
    found = update(agent, rollout, config)
    flipped = (before != (agent.actor.trace(rows).gates > 0)).any(1).double().mean()
    assert 0 < found["routing_flips"] == pytest.approx(flipped.item())
    assert found["stopped_epochs"] == 0
    dense = override(tiny, {"actor": "dense"})
    assert "routing_flips" not in update(Agent(dense, agent.spaces, seed=0), rollout, dense)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_minibatch(agent: Agent, tiny: TrainConfig) -> None:
    rollout = rollout_of(agent)
    reward = rollout.reward.clone()
    reward[10, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"minibatch [1-4] of 8: .*value_loss = (inf|nan)"):
        update(agent, replace(rollout, reward=reward), tiny)


def test_entropy_bonus_widens_the_policy(tiny: TrainConfig) -> None:
    config = override(tiny, {"entropy_coefficient": 1.0})
    agent = Agent(config, Spaces(3, 1, discrete=False), seed=0)
    batch = replace(minibatch(), advantage=torch.zeros(8))
    for _ in range(10):
        actor_step(agent, batch, config)
    (log_std,) = agent.actor.head.parameters()
    assert log_std.item() == pytest.approx(10 * 3e-4, rel=1e-2)


@pytest.mark.slow
def test_ppo_solves_a_small_problem() -> None:
    """CartPole to a return of 150 (random: 22) in 40 k steps: the categorical head and PPO together learn.

    The learning rate falls to zero: at a constant one the last iterations go up and down by hundreds.
    """
    from sphere_rl.training.evaluation import summarize

    config = override(
        TrainConfig(),
        {"suite": "gym", "tasks": ["CartPole-v1"], "num_steps": 128, "minibatch_size": 128, "num_epochs": 6,
         "learning_rate": 2e-3, "actor": "topk_moe", "network": {"width": 32, "depth": 2, "num_experts": 4}},
    )  # fmt: skip
    envs = make_suite("gym").make("CartPole-v1", 8, 0, 1)
    agent = Agent(config, Spaces.of(envs), seed=0)
    collector, episodes = Collector(envs, None, agent.device), []
    for iteration in range(40):
        agent.set_learning_rate(config.learning_rate * (1 - iteration / 40))
        rollout = collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator)
        update(agent, rollout, config)
        episodes = rollout.episodes or episodes
    assert summarize(episodes).mean_return > 150
