"""Passes without autograd, beside autograd on the same networks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conformance.agents import batch, make_agent, make_config
from torch import Tensor, nn

from sphere_rl.agent import Agent
from sphere_rl.chain import SCRIPTED
from sphere_rl.direct import PenaltyPass, is_plain, regression_step
from sphere_rl.gradients import active_experts
from sphere_rl.lanes import two_lanes
from sphere_rl.networks import KINDS, Actor, MoENetwork, NetworkOptions, make_actor
from sphere_rl.optimizer import ExpertAdam
from sphere_rl.penalty import sphere_penalty
from sphere_rl.ppo import begin_critic_step, critic_step

pytestmark = pytest.mark.skipif(not SCRIPTED, reason="everything goes through autograd where TorchScript is gone")
N, D, A = 40, 5, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double_actor(kind: str, seed: int = 0) -> Actor:
    actor = make_actor(kind, D, A, seed=seed, width=8, depth=3, num_experts=4, temperature=0.7).double()
    for parameter in actor.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(seed + 1), dtype=torch.float64)
    return actor


def observations(seed: int = 2) -> Tensor:
    return torch.randn(N, D, generator=generator(seed), dtype=torch.float64)


def by_autograd(actor: Actor, observation: Tensor, layers: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The penalty from whole matrices Φ [N, E·H]."""
    features = actor.trace(observation).features
    penalty = torch.stack([sphere_penalty(features[layer].weighted()) for layer in layers]).sum()
    return penalty, list(torch.autograd.grad(penalty, list(actor.parameters()), materialize_grads=True))


def assert_same(found: tuple[Tensor, list[Tensor], Tensor], actor: Actor, observation: Tensor, layers: list) -> None:
    penalty, gradients = by_autograd(actor, observation, layers)
    torch.testing.assert_close(found[0], penalty.detach(), rtol=1e-12, atol=0)
    for (name, _), own, other in zip(actor.named_parameters(), found[1], gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(found[2], nn.utils.get_total_norm(gradients), rtol=1e-12, atol=0)
    assert found[2] > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layers", [[2], [0, 1, 2], [0]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_penaltys_gradients_are_autograds(kind: str, layers: list[int], threads: int) -> None:
    actor, observation = double_actor(kind), observations()
    with two_lanes(threads):
        found = PenaltyPass().begin(actor, observation, actor.trace(observation), layers)()
    assert_same(found, actor, observation, layers)


def test_a_pass_leaves_nothing_to_the_next_whose_samples_use_other_experts() -> None:
    actor, passes, used = double_actor("topk_moe", seed=5), PenaltyPass(), set()
    for seed in range(3, 9):
        observation = 5 * observations(seed)[:1]
        trace = actor.trace(observation)
        found = passes.begin(actor, observation, trace, [2])()
        assert_same(found, actor, observation, [2])
        gradients = dict(zip((name for name, _ in actor.named_parameters()), found[1], strict=True))
        active = active_experts(gradients["experts.hidden.2.weight"])
        assert active == tuple(e for e, count in enumerate(trace.features[-1].routing.counts) if count)
        used.add(active)
    assert len(used) > 1


@pytest.mark.parametrize(
    "option", [{"layer_norm": True}, {"crelu": True}, {"spectral_norm": True}, {"layerwise": True}, {"hook": True}]
)
def test_networks_with_something_between_their_layers_are_not_plain(option: dict[str, bool]) -> None:
    options = {key: value for key, value in option.items() if key not in ("layerwise", "hook")}
    actor = make_actor("topk_moe", D, A, width=8, depth=2, num_experts=3, **options)
    if "layerwise" in option:
        actor.experts.layerwise = True
    if "hook" in option:
        actor.experts.hidden[0].register_forward_hook(lambda *_: None)
    assert not is_plain(actor)
    assert is_plain(make_actor("topk_moe", D, A, width=8, depth=2, num_experts=3))


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_regression_steps_are_those_of_autograd_and_torchs_adam(max_norm: float) -> None:
    own, other = (MoENetwork("dense", D, 1, NetworkOptions(width=8, depth=2), generator(0)) for _ in range(2))
    optimizer = ExpertAdam(own.parameters(), lr=1e-2, eps=1e-5)
    peer = torch.optim.Adam(other.parameters(), lr=1e-2, eps=1e-5)
    for seed in range(20):
        x, target = observations(seed).float(), torch.randn(N, generator=generator(100 + seed))
        loss, norm = regression_step(own, optimizer, x, target, 0.7, max_norm)()
        expected = (other(x).squeeze(1) - target).square().mean()
        peer.zero_grad()
        (0.7 * expected).backward()
        expected_norm = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        peer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("method", "critic"), [("none", "dense"), ("l2_init", "dense"), ("none", "topk_moe")])
def test_a_critics_step_is_the_same_either_way(method: str, critic: str) -> None:
    config = make_config(method, critic=critic)
    samples = batch(1, torch.float32)

    def train(step: Callable[[Agent], object]) -> list[Tensor]:
        agent = make_agent(config)
        for _ in range(3):
            step(agent)
        return agent.critic_parameters

    one = train(lambda agent: begin_critic_step(agent, samples, config)())
    two = train(lambda agent: critic_step(agent, samples, config))
    for mine, theirs in zip(one, two, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
