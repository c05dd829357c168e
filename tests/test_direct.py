"""Steps without autograd, beside autograd and torch's Adam on the same networks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from conformance.agents import batch, make_agent, make_config, only_method
from torch import Tensor, nn

from sphere_rl.config import TrainConfig, override
from sphere_rl.experts import GroupedLinear, Routing
from sphere_rl.experts.heads import GaussianHead
from sphere_rl.experts.network import KINDS, MoENetwork, Trace, make_actor
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.kernels import backward as sweeps
from sphere_rl.kernels.adam import REST
from sphere_rl.kernels.script import SCRIPTED
from sphere_rl.kernels.threads import two_lanes
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.losses import Samples, gaussian_loss
from sphere_rl.learner.minibatch import Minibatch
from sphere_rl.learner.optimizer import ExpertAdam
from sphere_rl.learner.policy_step import has_fused_step
from sphere_rl.learner.value_step import begin_regression, regression
from sphere_rl.methods import ActorStep, Method
from sphere_rl.methods.sphere import Sphere, SphereConfig
from sphere_rl.penalty import sphere_penalty
from sphere_rl.training.agent import Agent
from sphere_rl.training.step import (
    actor_loss,
    actor_step,
    apply_gradients,
    begin_critic_step,
    critic_step,
    description,
    direct_actor_step,
)

pytestmark = pytest.mark.skipif(not SCRIPTED, reason="everything goes through autograd where TorchScript is gone")
N, D, A = 40, 5, 3


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def minibatch(seed: int, discrete: bool = False, rows: int = N) -> Minibatch:
    """Samples of an old policy that differs from the present one, some ratios outside the clip."""
    g = generator(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    policy = draw(rows, A).log_softmax(1) if discrete else 0.3 * draw(rows, 2 * A)
    action = torch.randint(A, (rows,), generator=g) if discrete else draw(rows, A)
    old = -1.1 + 0.3 * draw(rows) if discrete else -0.5 * (action.square() + 1.84).sum(1) + 0.1 * draw(rows)
    return Minibatch(2 * draw(rows, D) + 1, action, policy, old, draw(rows), draw(rows))


def double_agent(config: TrainConfig, discrete: bool = False) -> Agent:
    agent = Agent(config, Spaces(D, A, discrete), seed=4)
    agent.actor.double()
    agent.critic.double()
    for parameter in (*agent.actor_parameters, *agent.critic_parameters):  # biases and log σ, too, are not zero
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64)
    return agent


def by_autograd(agent: Agent, samples: Minibatch) -> list[Tensor]:
    return actor_step(agent, samples, agent.config)


def directly(agent: Agent, samples: Minibatch, keep: bool = True) -> list[Tensor]:
    direct = description(agent, samples, torch.arange(len(samples)))
    assert direct is not None
    return direct_actor_step(agent, samples, agent.config, keep, direct)


@pytest.mark.parametrize(
    ("methods", "whose"),
    [
        (("none",), None), (("shrink_perturb",), None),
        (("sphere",), "sphere"), (("shrink_perturb", "sphere"), "sphere"),
        (("sphere", "l2_init"), "autograd"), (("sphere", "cbp"), "autograd"), (("cbp",), "autograd"),
        (("c_chain",), "autograd"), (("layernorm", "sphere"), "autograd"), (("weight_decay",), "autograd"),
    ],
)  # fmt: skip
def test_a_step_goes_without_autograd_where_one_method_at_most_has_a_hand_in_it(
    methods: tuple[str, ...], whose: str | None
) -> None:
    config = override(TrainConfig(), {"method": methods, "network.num_experts": 4, "network.width": 8})
    found = description(double_agent(config), minibatch(0), torch.arange(N))
    assert (found.method and found.method.name if found else "autograd") == whose


@pytest.mark.parametrize("change", [{"factor": "gradient"}, {"grouping": "per_expert"}, {"gate_coefficient": 0.1}])
def test_what_no_description_says_goes_through_autograd(change: dict) -> None:
    changes = {"method": ("sphere",), "network.width": 8} | {f"sphere.{name}": value for name, value in change.items()}
    assert description(double_agent(override(TrainConfig(), changes)), minibatch(0), torch.arange(N)) is None


def of_sphere(*names: str) -> type[Sphere]:
    """A subclass with these of its own."""
    own = {name: lambda *given, name=name: getattr(Sphere, name)(*given) for name in names}
    return type("Mine", (Sphere,), own)


def mixed(*bases: type) -> type[Any]:
    """A class of these, the first of which goes first."""
    return type("Mixed", bases, {})


class Doubled(Sphere):
    """Twice the penalty: of all that calls it."""

    def penalty(self, trace: Trace) -> Tensor:
        return 2 * super().penalty(trace)


class Halved:
    """What is mixed in goes first, too."""

    def actor_penalty(self, step: ActorStep) -> Tensor | None:
        return None


@pytest.mark.parametrize(
    ("method", "direct"),
    [
        (of_sphere("actor_penalty"), False), (of_sphere("actor_gradients"), False), (Doubled, False),
        (of_sphere("observe"), False), (of_sphere("parameter_gradients"), False), (of_sphere("_differentiate"), False),
        (mixed(Halved, Sphere), False), (mixed(of_sphere("metrics"), Doubled), False),
        (of_sphere(), True), (of_sphere("__init__", "summary", "metrics", "after_iteration", "state_dict"), True),
        (of_sphere("penalty", "feature_penalty"), True),
        (mixed(of_sphere("feature_penalty"), Doubled), True),
    ],
)  # fmt: skip
def test_a_description_is_believed_where_nothing_that_it_stands_for_is_overridden(
    method: type[Sphere], direct: bool
) -> None:
    agent = double_agent(override(TrainConfig(), {"network.num_experts": 4, "network.width": 8}))
    agent.methods = list[Method]([method(SphereConfig())])
    assert (description(agent, minibatch(0), torch.arange(N)) is not None) == direct


def assert_same_training(config: TrainConfig, threads: int = 1, discrete: bool = False, steps: int = 4) -> None:
    """Statistics, gradients, weights and what the method says of itself, of each of a few steps."""
    own, peer = (double_agent(config, discrete) for _ in range(2))
    for seed in range(steps):
        samples = minibatch(seed, discrete)
        expected = by_autograd(peer, samples)
        with two_lanes(threads):
            found = directly(own, samples)
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-9, atol=1e-12)
        for (name, mine), theirs in zip(own.actor.named_parameters(), peer.actor_parameters, strict=True):
            kind = lambda text, name=name, seed=seed: f"step {seed}, {name}: {text}"  # noqa: E731
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-13, msg=kind)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11, msg=kind)
        for mine, theirs in zip(*(only_method(agent).metrics().values() for agent in (own, peer)), strict=True):
            assert float(mine) == pytest.approx(float(theirs), rel=1e-9)


NETWORK = {"width": 8, "depth": 3, "num_experts": 4, "temperature": 0.7}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"method": ("none",), "entropy_coefficient": 0.05},
        {"method": ("sphere",), "sphere": {"mode": "fixed", "strength": 0.3}},
        {"method": ("sphere",), "sphere": {"mode": "loss", "rho": 0.7, "layers": "all"}},
        {"method": ("sphere",), "sphere": {"mode": "grad", "rho": 0.7}},
        {"method": ("sphere",), "sphere": {"mode": "grad", "rho": 0.7, "layers": "all", "pcgrad": True}},
        {"method": ("sphere",), "sphere": {"mode": "grad", "rho": 0.7, "scale": "free"}},
    ],
    ids=["none", "fixed", "loss", "grad", "pcgrad", "free"],
)
def test_an_actors_steps_are_those_of_autograd(options: dict[str, Any], kind: str, threads: int) -> None:
    assert_same_training(make_config(actor=kind, **({"network": NETWORK, "learning_rate": 1e-2} | options)), threads)


STRENGTHS = [{"mode": "fixed"}, {"mode": "loss"}, {"mode": "grad"}, {"mode": "grad", "pcgrad": True}]


@pytest.mark.parametrize("kind", ["topk_moe", "shared_moe", "dense"])  # the last has fewer features than samples
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("strength", STRENGTHS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_scale_free_penalty_is_that_of_its_formula(
    strength: dict[str, Any], layers: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside autograd through `sphere_penalty` of whole feature matrices."""

    def penalty(self: Any, trace: Trace) -> Tensor:
        chosen = trace.features if layers == "all" else trace.features[-1:]
        return torch.stack([sphere_penalty(layer.weighted(), "free") for layer in chosen]).sum()

    monkeypatch.setattr(Sphere, "penalty", penalty)
    options = strength | {"scale": "free", "layers": layers, "rho": 0.7}
    assert_same_training(make_config("sphere", actor=kind, network=NETWORK, learning_rate=1e-2, sphere=options))


@pytest.mark.parametrize("size", [1e-18, 1e18, 0.0])
@pytest.mark.parametrize("strength", STRENGTHS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_scale_free_penalty_takes_features_of_any_size(strength: dict[str, Any], size: float) -> None:
    found = []
    for factor in (1.0, size):
        config = make_config("sphere", network=NETWORK, sphere=strength | {"scale": "free", "layers": "last"})
        agent = Agent(config, Spaces(D, A, False), seed=4)
        last, head = agent.actor.experts.hidden[-1], agent.actor.experts.head
        with torch.no_grad():
            last.weight.mul_(factor)  # type: ignore[reportCallIssue]
            head.weight.div_(max(factor, 1.0))
        samples = Minibatch(**{name: tensor.float() for name, tensor in vars(minibatch(2)).items()})
        statistics = torch.stack(directly(agent, samples))
        assert statistics.isfinite().all()
        assert all(
            p.isfinite().all() and p.grad.isfinite().all() for p in agent.actor.parameters() if p.grad is not None
        )
        found.append(float(only_method(agent).metrics()["sphere_penalty"]))
    assert found[1] == (pytest.approx(found[0], rel=1e-5) if size else 0.0)


@pytest.mark.parametrize("mode", ["loss", "grad"])
def test_discrete_policies_too(mode: str) -> None:
    config = make_config("sphere", network=NETWORK, sphere={"mode": mode, "rho": 0.7})
    assert_same_training(config, discrete=True)


@pytest.mark.parametrize("brief", [False, True])
def test_gradients_that_are_kept_and_gradients_that_are_not(brief: bool) -> None:
    """At the size of these tests both kinds occur; here all are of one."""
    rows, wide = (2, 64) if brief else (300, 8)
    assert sweeps.is_cheaper_later(rows, 2, wide, wide) == brief
    config = make_config("sphere", network=NETWORK | {"width": wide}, sphere={"mode": "grad", "rho": 0.7})
    own, peer = (double_agent(config) for _ in range(2))
    samples = minibatch(3, rows=rows)
    torch.testing.assert_close(torch.stack(directly(own, samples)), torch.stack(by_autograd(peer, samples)))
    for mine, theirs in zip(own.actor_parameters, peer.actor_parameters, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-13)


def test_experts_that_rest_and_come_back_move_as_with_adam() -> None:
    """One sample a step uses two of four experts; whole tensors in torch's Adam move the others, too."""
    config = make_config(network=NETWORK | {"width": 4, "depth": 1}, learning_rate=1e-3)
    own, peer = double_agent(config), double_agent(config)
    peer.actor_optimizer = torch.optim.Adam(peer.actor_parameters, lr=config.learning_rate, eps=config.adam_eps)
    used = set()
    for step in range(REST + 60):
        samples = minibatch(1 if 20 < step < REST + 30 else step, rows=2)
        samples = replace(samples, observation=3 * samples.observation)
        directly(own, samples, keep=False)
        by_autograd(peer, samples)
        idle = own.actor_optimizer.state[own.actor.experts.head.weight]["idle"]
        used.add(tuple(expert for expert, steps in enumerate(idle) if not steps))
    assert len(used) > 2
    for mine, theirs in zip(own.actor_parameters, peer.actor_parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("moved", ["moments", "weights"])
def test_what_is_kept_between_steps_follows_moments_and_weights_that_move(moved: str) -> None:
    """A checkpoint loaded in the middle brings other moments; ``data`` may be replaced."""
    config = make_config(network=NETWORK, learning_rate=1e-2)
    own, peer = double_agent(config), double_agent(config)
    earlier = []
    for seed in range(6):
        if seed == 1:
            earlier = [deepcopy(agent.actor_optimizer.state_dict()) for agent in (own, peer)]
        if seed == 3 and moved == "moments":
            for agent, state in zip((own, peer), earlier, strict=True):
                agent.actor_optimizer.load_state_dict(state)
        if seed == 3 and moved == "weights":
            for parameter in own.actor_parameters:
                parameter.data = parameter.data.clone()
        directly(own, minibatch(seed), keep=False)
        by_autograd(peer, minibatch(seed))
    for mine, theirs in zip(own.actor_parameters, peer.actor_parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_the_gaussian_loss_is_autograds() -> None:
    config, head = make_config(entropy_coefficient=0.3), GaussianHead(A).double()
    head.log_std.data += torch.tensor([-0.5, 0.1, 0.4])
    samples = minibatch(7)
    mean = torch.randn(N, A, generator=generator(8), dtype=torch.float64).requires_grad_()
    loss, numbers = actor_loss(head, mean, samples, config)
    expected = torch.autograd.grad(loss, [mean, head.log_std])
    found, found_numbers, gradients = gaussian_loss(
        mean.detach(),
        head.log_std.detach(),
        Samples(samples.observation, samples.action, samples.policy, samples.log_prob, samples.advantage),
        config.clip,
        config.entropy_coefficient,
    )
    assert 0.1 < float(numbers[2]) < 0.9, "ratios on both sides of the clip"
    torch.testing.assert_close(found, loss.detach())
    torch.testing.assert_close(torch.stack(found_numbers), torch.stack(numbers))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "option",
    [{"layer_norm": True}, {"crelu": True}, {"spectral_norm": True}, {"layerwise": True}, {"hook": 0}, {"hook": 1}],
)
def test_networks_with_something_between_their_layers_are_not_plain(option: dict[str, Any]) -> None:
    options = {key: value for key, value in option.items() if key not in ("layerwise", "hook")}
    actor = make_actor("topk_moe", D, A, width=8, depth=2, num_experts=3, **options)
    if "layerwise" in option:
        actor.experts.layerwise = True
    if "hook" in option:
        (actor.experts.hidden[0], actor.experts)[option["hook"]].register_forward_hook(lambda *_: None)
    assert not has_fused_step(actor)
    assert has_fused_step(make_actor("topk_moe", D, A, width=8, depth=2, num_experts=3))


@pytest.mark.parametrize("part", ["layer", "head"])
def test_parts_of_ones_own_are_called(part: str) -> None:
    """A method may put them in their places."""
    own = make_actor("topk_moe", D, A, width=8, depth=2, num_experts=3)
    states = torch.randn(7, D, generator=generator(0))
    before = own.trace(states).output
    if part == "head":
        own.head = type("Mine", (GaussianHead,), {})(A)
    else:
        own.experts.head.__class__ = type("Mine", (GroupedLinear,), {"forward": negative})
        torch.testing.assert_close(own.trace(states).output, -before)
        with torch.no_grad():
            torch.testing.assert_close(own(states), -before)
    assert not has_fused_step(own)


def negative(layer: GroupedLinear, x: Tensor, routing: Routing) -> Tensor:
    return -GroupedLinear.forward(layer, x, routing)


def test_an_optimizer_of_ones_own_sees_gradients_that_are_clipped() -> None:
    seen: list[float] = []

    class Mine(ExpertAdam):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            seen.append(float(cast(Tensor, parameter.grad).norm()))

    parameter = nn.Parameter(torch.zeros(4))
    apply_gradients(Mine([parameter], lr=1.0, eps=1e-8), [parameter], [torch.full((4,), 5.0)], max_norm=0.5)
    assert seen == pytest.approx([0.5])


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_regression_steps_are_those_of_autograd_and_torchs_adam(max_norm: float) -> None:
    own, other = (MoENetwork("dense", D, 1, NetworkOptions(width=8, depth=2), generator(0)).double() for _ in range(2))
    optimizer = ExpertAdam(own.parameters(), lr=1e-2, eps=1e-5)
    peer = torch.optim.Adam(other.parameters(), lr=1e-2, eps=1e-5)
    for seed in range(20):
        samples = minibatch(seed)
        x, target = samples.observation, samples.value_target
        loss, norm = begin_regression(regression(own, optimizer, x, target, 0.7, max_norm, keep=True))()
        expected = (other(x).squeeze(1) - target).square().mean()
        peer.zero_grad()
        (0.7 * expected).backward()
        expected_norm = nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        peer.step()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(norm, expected_norm)
        for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-13)
    for mine, theirs in zip(own.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


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
