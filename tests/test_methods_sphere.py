"""SPHERE's method: every variant's value and gradient, its modes of strength and their schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from conformance.agents import actor_step, batch, make_agent, make_config, only_method, rollout, train
from shrink import Shrink, ShrinkConfig
from test_methods_penalties import check_gradient, double_agent
from torch import Tensor
from watching import linear_outputs

from sphere_rl.config import override
from sphere_rl.errors import ConfigError
from sphere_rl.experts.layers import RoutedFeatures
from sphere_rl.experts.network import Trace, make_actor
from sphere_rl.experts.routing import single_routing
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.methods.sphere import Schedule, Sphere, SphereConfig, project_conflict
from sphere_rl.training.agent import Agent

VARIANTS = [
    {"scale": scale, "factor": factor, "grouping": grouping, "layers": layers, "gate_coefficient": gate}
    for scale, factor, grouping, layers, gate in product(
        ("literal", "free"), ("feature", "gradient"), ("joint", "per_expert"), ("last", "all"), (0.0, 0.7)
    )
    if (factor, grouping) != ("gradient", "per_expert")
]


def sphere_agent(actor: str = "topk_moe", **options) -> Agent:
    return double_agent("sphere", actor=actor, sphere={"schedule": "constant"} | options)


def samples() -> Minibatch:
    return batch(1, torch.float64)


def spread(phi: Tensor, scale: str = "literal") -> Tensor:
    """‖A − (tr A/m) I‖_F² as it is written, or that of A/tr A; nothing spreads nothing."""
    a = phi.T @ phi / len(phi)
    if scale == "free" and a.any():
        a = a / a.trace()
    return (a - a.trace() / len(a) * torch.eye(len(a), dtype=a.dtype)).square().sum()


def by_hand(agent: Agent, observation: Tensor, options: dict) -> float:
    """The penalty from dense features, or from signals of one backward pass for each sample and output."""
    with linear_outputs(agent.actor.experts) as before:
        trace = agent.actor.trace(observation)
    layers = list(zip(trace.features, before, strict=True))
    layers = layers if options["layers"] == "all" else layers[-1:]
    total = options["gate_coefficient"] * spread(trace.gates, options["scale"]) / trace.gates.shape[1]
    for layer, z in layers:
        if options["factor"] == "gradient":
            rows = []
            for n, output in product(range(len(trace.output)), range(trace.output.shape[1])):
                (signal,) = torch.autograd.grad(trace.output[n, output], z, retain_graph=True)
                rows.append(replace(layer, values=signal).dense()[n].flatten())
            total = total + spread(torch.stack(rows), options["scale"])
        elif options["grouping"] == "joint":
            total = total + spread(layer.weighted(), options["scale"])
        else:
            experts = layer.weighted().unflatten(1, (trace.gates.shape[1], -1))
            total = total + torch.stack([spread(phi, options["scale"]) for phi in experts.unbind(1)]).sum()
    return total.item()


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_variant(options):
    agent = sphere_agent(**options)
    method, data = only_method(agent), samples()
    value = method.penalty(agent.actor.trace(data.observation)).item()
    assert value == pytest.approx(by_hand(agent, data.observation, options), rel=1e-9)
    check_gradient(lambda: method.penalty(agent.actor.trace(data.observation)), agent.actor_parameters, rtol=1e-5)


@pytest.mark.parametrize("actor", ["dense", "dense_moe", "shared_moe", "ds_moe"])
def test_other_actors(actor):
    agent = sphere_agent(actor)  # free, as it comes
    method, data = only_method(agent), samples()
    trace = agent.actor.trace(data.observation)
    assert method.penalty(trace).item() == pytest.approx(spread(trace.features[-1].weighted(), "free").item(), rel=1e-9)
    check_gradient(lambda: method.penalty(agent.actor.trace(data.observation)), agent.actor_parameters, rtol=1e-5)


@pytest.mark.parametrize("options", [{"grouping": "per_expert"}, {"factor": "gradient"}, {"gate_coefficient": 0.7}])
@pytest.mark.parametrize("actor", ["dense", "topk_moe"])
def test_where_the_free_penalty_has_no_gradient_round_off_is_none(actor: str, options: dict[str, Any]):
    """Equal states of one output: mode grad would make whatever is left as long as any gradient."""
    method = Sphere(SphereConfig(**options))
    policy = make_actor(actor, 4, 1, seed=1, width=32, depth=2, num_experts=4)
    policy.experts.layerwise = options.get("factor") == "gradient"
    penalty = method.penalty(policy.trace(torch.tensor([[0.3, -1.2, 0.7, 0.9]]).repeat(64, 1)))
    for gradient in torch.autograd.grad(penalty, [*policy.parameters()], materialize_grads=True):
        assert not gradient.any()


def gradients_of(agent: Agent, scalar: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(scalar, agent.actor_parameters, retain_graph=True, materialize_grads=True))


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).norm()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"scale": "literal"}, 1e-3), ({}, 0.1), ({"scale": "free", "strength": 1e-3}, 1e-3), ({"strength": 0.2}, 0.2)],
)
def test_lambda_of_mode_fixed_is_the_scales_own_unless_given(options: dict[str, Any], expected: float):
    agent = sphere_agent(mode="fixed", **options)
    method, step = only_method(agent), actor_step(agent, samples())
    assert method.actor_penalty(step).item() == pytest.approx(expected * method.penalty(step.trace).item())
    described = method.feature_penalty(agent.actor, samples().observation)
    assert described is not None
    assert described.share == expected


def test_the_literal_penalty_in_mode_loss_is_the_free_one_and_a_pull_to_small_features():
    """∇log P_literal = ∇log P_free + ∇log (tr A)², which benchmarks/shrink.py is."""
    found = {}
    for scale in ("literal", "free"):
        agent = sphere_agent(scale=scale, mode="loss", rho=0.05)
        found[scale] = gradients_of(agent, only_method(agent).actor_penalty(actor_step(agent, samples())))
    agent = sphere_agent()
    pull = Shrink(ShrinkConfig(rho=0.05)).actor_penalty(actor_step(agent, samples()))
    found["pull"] = gradients_of(agent, pull)
    for literal, free, pulled in zip(*found.values(), strict=True):
        torch.testing.assert_close(literal, free + pulled, rtol=1e-5, atol=1e-9)
    assert norm(found["pull"]) > 0.1 * norm(found["free"]) > 0


@pytest.mark.parametrize("layers", ["last", "all"])
def test_scale_free_steps_do_not_shrink_the_features(layers: str):
    """d/dc of the penalty at cΦ is 0 at c = 1: of the last layer's weights, the layer's own scale."""
    agent = sphere_agent("dense", scale="free", layers=layers)
    with torch.no_grad():
        for layer in agent.actor.experts.layers:
            layer.bias.zero_()
    penalty = only_method(agent).penalty(agent.actor.trace(samples().observation))
    weight = agent.actor.experts.layers[-2].weight
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert gradient.abs().max() > 1e-4
    assert (gradient * weight).sum().abs().item() < 1e-12


def test_modes_fixed_and_loss_are_multiples_of_the_penalty():
    for mode, strength in (("fixed", lambda loss, penalty: 0.25), ("loss", lambda loss, penalty: 0.5 * loss / penalty)):
        agent = sphere_agent(mode=mode, strength=0.25, rho=0.5)
        method, step = only_method(agent), actor_step(agent, samples())
        gradients = [torch.ones(2)]
        assert method.actor_gradients(step, gradients) is gradients
        penalty = method.penalty(step.trace)
        expected = strength(step.loss.abs().item(), penalty.item())
        added = method.actor_penalty(step)
        assert added.item() == pytest.approx(expected * penalty.item())
        for mine, g in zip(gradients_of(agent, added), gradients_of(agent, penalty), strict=True):
            torch.testing.assert_close(mine, expected * g)  # the strength itself has no gradient
        assert float(method.metrics()["sphere_strength"]) == pytest.approx(expected)


@pytest.mark.parametrize("pcgrad", [False, True])
def test_mode_grad_adds_a_share_of_the_gradient_norm(pcgrad):
    agent = sphere_agent(mode="grad", rho=0.3, pcgrad=pcgrad)
    method, step = only_method(agent), actor_step(agent, samples())
    assert method.actor_penalty(step) is None
    ppo, own = gradients_of(agent, step.loss), gradients_of(agent, method.penalty(step.trace))
    if pcgrad:
        own = project_conflict(own, ppo)
    scale = 0.3 * norm(ppo) / norm(own)
    expected = [g + scale * s for g, s in zip(ppo, own, strict=True)]
    for mine, wanted in zip(method.actor_gradients(step, list(ppo)), expected, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_project_conflict_by_hand():
    own, other = [torch.tensor([1.0, -2.0])], [torch.tensor([0.0, 4.0])]
    torch.testing.assert_close(project_conflict(own, other)[0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(project_conflict([-own[0]], other)[0], -own[0])


def test_linear_schedule_rises_to_one_in_each_task():
    schedule = Schedule(SphereConfig(schedule="linear"))
    for _ in range(2):
        schedule.start_task(4)
        factors = []
        for _ in range(5):
            factors.append(schedule.factor)
            schedule.advance()
        assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def of_rank(rank: int) -> Callable[[], Trace]:
    """A forward pass whose feature Gram has so many equal eigenvalues."""
    values = torch.eye(10)[:, :rank] if rank else torch.zeros(10, 1)
    features = RoutedFeatures(values=values, routing=single_routing(10))
    return lambda: Trace(torch.zeros(10, 1), torch.ones(10, 1), None, torch.zeros(10, 1), (features,), ())


def test_entropy_schedule_raises_the_strength_where_the_rank_fell():
    config = SphereConfig(schedule="entropy", entropy_share=0.5, entropy_growth=2.0, entropy_limit=4.0)
    schedule = Schedule(config)
    schedule.start_task(100)
    factors = []
    for rank in (8, 8, 3, 3, 3, 4, 3, 8, 8, 8):  # half of 8 is not below 4
        factors.append(schedule.observe(of_rank(rank)))
        assert schedule.observe(of_rank(1)) == factors[-1], "once an iteration"
        schedule.advance()
    assert factors == [1, 1, 2, 4, 4, 2, 4, 2, 1, 1]
    schedule.start_task(100)
    assert [schedule.observe(of_rank(2)), schedule.factor] == [1, 1], "a new task has its own start"
    assert schedule.metrics() == pytest.approx({"sphere_factor": 1.0, "sphere_rank": 2.0})


def test_schedule_scales_every_mode():
    for mode in ("fixed", "loss", "grad"):
        results = []
        for schedule in ("constant", "linear"):
            agent = sphere_agent(mode=mode, schedule=schedule, strength=0.5, rho=0.5)
            agent.begin_task(0)  # two iterations a task: the first has half the strength
            method, step = only_method(agent), actor_step(agent, samples())
            zero = [torch.zeros_like(p) for p in agent.actor_parameters]
            if mode == "grad":
                ppo = gradients_of(agent, step.loss)
                results.append([a - b for a, b in zip(method.actor_gradients(step, list(ppo)), ppo, strict=True)])
            else:
                assert method.actor_gradients is not None
                results.append(gradients_of(agent, method.actor_penalty(step)))
            assert len(zero) == len(results[-1])
        for constant, linear in zip(*results, strict=True):
            torch.testing.assert_close(linear, 0.5 * constant, atol=1e-12, rtol=1e-6)


def test_training_with_sphere_raises_the_rank():
    from sphere_rl.spectrum.ranks import effective_rank

    ranks = []
    for rho in (0.0, 5.0):
        agent = make_agent(make_config("sphere", learning_rate=3e-3, sphere={"rho": rho, "schedule": "constant"}))
        agent.begin_task(0)
        train(agent, *[1, 2, 3] * 5)
        features = agent.actor.trace(rollout(1).observation.flatten(0, 1)).features[-1]
        ranks.append(effective_rank(torch.linalg.eigvalsh(features.gram().detach().double())))
    assert ranks[1] > 1.1 * ranks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rho": -0.1}, "sphere.rho: -0.1"),
        ({"entropy_growth": 0.5}, "sphere.entropy_growth: 0.5"),
        ({"entropy_share": 1.5}, "sphere.entropy_share: 1.5"),
        ({"schedule": "cosine"}, "sphere.schedule: 'cosine'"),
        ({"scale": "fixed"}, "sphere.scale: 'fixed' is not allowed; expected one of literal, free"),
        ({"strength": -1}, "sphere.strength: -1.0 is not allowed; expected a finite number, 0 or more"),
        ({"strength": "much"}, "sphere.strength: 'much' is not allowed; expected a value of type float"),
        ({"mode": "loss", "pcgrad": True}, "sphere.pcgrad: True"),
        ({"factor": "gradient", "grouping": "per_expert"}, "sphere.grouping: 'per_expert'"),
    ],
)
def test_refusals_name_the_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(make_config("sphere"), {"sphere": changes})
