"""Methods that recycle hidden units: ReDo, ReGraMa and continual backpropagation."""

from __future__ import annotations

import pytest
import torch
from conformance.agents import changed, make_agent, make_config, only_method, rollout, snapshot, train

from sphere_rl.experts.layers import RoutedFeatures
from sphere_rl.experts.network import MoENetwork
from sphere_rl.experts.routing import single_routing, top_k_routing
from sphere_rl.methods._layers import mean_by_expert, recycle, unit_features, unit_layers
from sphere_rl.methods.cbp import Cbp, CbpConfig, UnitStatistics, accumulate, choose, correction, fold
from sphere_rl.methods.nap import matrix_norms, weights
from sphere_rl.methods.redo import dormant_units
from sphere_rl.training.agent import Agent


def trained(*methods: str, actor: str = "topk_moe", **changes) -> Agent:
    """An agent with Adam moments everywhere, whose first method's next look is its first."""
    agent = make_agent(make_config(*methods, actor=actor, critic="topk_moe", **changes))
    agent.methods[0].after_iteration = lambda agent, rollout: None
    agent.begin_task(0)
    train(agent, 1)
    del agent.methods[0].after_iteration
    return agent


def plant(network: MoENetwork, layer: int, expert: int, unit: int) -> None:
    """Make a unit dead: its preactivation is -5 everywhere."""
    incoming = unit_layers(network)[layer].incoming
    with torch.no_grad():
        incoming.weight[expert, unit], incoming.bias[expert, unit] = 0.0, -5.0


def owners(agent: Agent) -> dict[str, MoENetwork]:
    return {"actor": agent.actor, "critic": agent.critic}


def expected_snapshot(agent: Agent, masks: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What recycling must leave: zeros by hand, NaN where new random weights belong."""
    names = {id(p): f"{n}.{k}" for n, net in owners(agent).items() for k, p in net.named_parameters()}
    state = snapshot(agent)

    def put(parameter: torch.Tensor, index: tuple, value: float, moments: float = 0.0) -> None:
        name = names[id(parameter)]
        state[name][index] = value
        for key in (f"{name}/0", f"{name}/1"):
            state[key][index] = moments

    for network, layers in masks.items():
        for layer, mask in zip(unit_layers(owners(agent)[network]), layers, strict=True):
            for e, i in mask.nonzero().tolist():
                put(layer.incoming.weight, (e, i), torch.nan)
                put(layer.incoming.bias, (e, i), 0.0)
    for network, layers in masks.items():
        for layer, mask in zip(unit_layers(owners(agent)[network]), layers, strict=True):
            for e, i in mask.nonzero().tolist():
                for column in range(i, layer.num_features, layer.num_units):
                    put(layer.outgoing.weight, (e, slice(None), column), 0.0)
    return state


def assert_recycled(agent: Agent, expected: dict[str, torch.Tensor]) -> None:
    """The agent is as expected, bitwise, and finite and not zero where new weights belong."""
    for name, actual in snapshot(agent).items():
        fresh = expected[name].isnan()
        assert torch.equal(actual[~fresh], expected[name][~fresh]), name
        assert (actual[fresh] != 0).all(), name


@pytest.mark.parametrize(("actor", "extra"), [("topk_moe", ()), ("dense", ("crelu",)), ("shared_moe", ("injection",))])
def test_redo_recycles_the_dormant_and_nothing_else(actor, extra):
    agent = trained("redo", *extra, actor=actor, redo={"threshold": 0.3, "every": 1})
    samples = rollout(2).observation.flatten(0, 1)
    if "crelu" not in extra:
        plant(agent.actor, 0, 0, 3)
        plant(agent.actor, 1, 0, 5)
        plant(agent.critic, 3, 0, 7)  # the second layer of the critic's gate
    with torch.no_grad():
        traces = {name: network.trace(samples) for name, network in owners(agent).items()}
        masks = {}
        for name, network in owners(agent).items():
            masks[name] = []
            for layer, features in zip(unit_layers(network), unit_features(traces[name]), strict=True):
                experts = []
                for start, size in zip(
                    torch.tensor((0, *features.routing.counts)).cumsum(0), features.routing.counts, strict=False
                ):
                    h = features.values[start : start + size].double().abs()
                    activity = layer.per_unit(h.mean(0)) if size else torch.zeros(layer.num_units)
                    experts.append((activity <= 0.3 * activity.mean()) & (activity.mean() > 0))
                masks[name].append(torch.stack(experts))
    assert sum(int(m.sum()) for layers in masks.values() for m in layers) > 3
    expected = expected_snapshot(agent, masks)
    agent.methods[0].after_iteration(agent, rollout(2))
    assert_recycled(agent, expected)
    if "crelu" not in extra:
        assert masks["actor"][0][0, 3]
        assert masks["actor"][1][0, 5]
        assert masks["critic"][3][0, 7]


def test_redo_of_dead_units_leaves_the_output_alone_and_waits_its_turn():
    agent = make_agent(make_config("redo", "injection", redo={"threshold": 0.0, "every": 2}))
    redo = agent.methods[0]
    agent.begin_task(0)
    agent.begin_task(1)  # so that the injected head has frozen weights
    plant(agent.actor, 1, 0, 5)
    samples, state = rollout(2).observation.flatten(0, 1), snapshot(agent)
    before = agent.actor(samples)
    redo.after_iteration(agent, rollout(2))
    assert not changed(state, snapshot(agent)), "the first of two"
    redo.after_iteration(agent, rollout(2))
    assert "actor.experts.hidden.1.weight" in changed(state, snapshot(agent))
    torch.testing.assert_close(agent.actor(samples), before)
    assert 0 < float(redo.metrics()["redo_recycled"]) < 0.5
    with torch.no_grad():  # awake again, the unit still has no way to the output: the frozen one is cut too
        unit_layers(agent.actor)[1].incoming.bias[0, 5] = 3.0
    torch.testing.assert_close(agent.actor(samples), before)


def test_new_weights_are_lecun_normal():
    agent = make_agent(make_config("redo", actor="dense", redo={"every": 1}, network={"width": 128}))
    for unit in range(100):
        plant(agent.actor, 1, 0, unit)
    only_method(agent).after_iteration(agent, rollout(2))
    rows = unit_layers(agent.actor)[1].incoming.weight[0, :100].detach()
    assert abs(float(rows.std()) - 128**-0.5) < 0.03 * 128**-0.5
    assert abs(float(rows.mean())) < 0.004


def test_an_expert_that_sees_nothing_is_left_alone():
    agent = make_agent(make_config("redo", redo={"threshold": 10.0, "every": 1}))
    with torch.no_grad():
        agent.actor.parts[1].head.bias[0, 2] = -1e3
    state = snapshot(agent)
    only_method(agent).after_iteration(agent, rollout(2))
    for i in range(2):
        weight = unit_layers(agent.actor)[i].incoming.weight
        assert torch.equal(weight[2], state[f"actor.experts.hidden.{i}.weight"][2])
        assert not torch.equal(weight[0], state[f"actor.experts.hidden.{i}.weight"][0])


def test_dormant_units_by_hand():
    activity = torch.tensor([[1.0, 0.1, 0.0, 2.9], [0.0, 0.0, 0.0, 0.0]])  # means 1 and 0
    assert dormant_units(activity, 0.1).tolist() == [[False, True, True, False], [False] * 4]
    assert dormant_units(activity, 0.09).tolist() == [[False, False, True, False], [False] * 4]
    tiny = dormant_units(activity.double() * 1e-30, 0.09)  # gradients of an expert whose gate weight is next to nothing
    assert tiny.tolist() == [[False, False, True, False], [False] * 4]


def test_regrama_recycles_units_without_gradient():
    agent = trained("regrama", regrama={"threshold": 0.01, "every": 1})
    layers, masks = {name: unit_layers(net) for name, net in owners(agent).items()}, {}
    generator = torch.Generator().manual_seed(0)
    for name in layers:
        masks[name] = []
        for layer in layers[name]:
            weight = layer.incoming.weight
            weight.grad = torch.randn(weight.shape, generator=generator).sign()  # mean |g| = 1 for each unit
            weight.grad[0, 2] = 0.0
            weight.grad[0, 3] *= 0.02  # above 0.01 of the layer's mean
            weight.grad[-1, 4] = 0.0
            mask = torch.zeros(weight.shape[:2], dtype=torch.bool)
            mask[0, 2] = mask[-1, 4] = True
            masks[name].append(mask)
    expected = expected_snapshot(agent, masks)
    only_method(agent).after_iteration(agent, rollout(2))
    assert_recycled(agent, expected)


def features_of(*rows: tuple[float, ...]) -> RoutedFeatures:
    values = torch.tensor(rows)
    return RoutedFeatures(values=values, routing=single_routing(len(rows)))


def test_cbp_by_hand():
    """Three units, two outputs, ρ = 0.3, maturity 1: the replacements of four minibatches, step by step."""
    agent = make_agent(make_config("cbp", actor="dense", network={"width": 3, "depth": 1, "num_experts": 3}))
    layer, config = unit_layers(agent.critic)[0], CbpConfig(rate=0.3, maturity=1, decay=0.9)
    with torch.no_grad():
        layer.outgoing.weight.copy_(torch.tensor([[[1.0, -2.0, 0.5]]]))
    statistics = UnitStatistics.of(layer)
    accumulate(statistics, layer, features_of((1.0, 0.0, 2.0), (3.0, 1.0, 0.0)), config)
    # mean h (2, 0.5, 1); utilities 0.1·(1·2, 2·0.5, 0.5·1)
    torch.testing.assert_close(statistics.utility, torch.tensor([[0.2, 0.1, 0.05]]))
    torch.testing.assert_close(statistics.activation, torch.tensor([[0.2, 0.05, 0.1]]))
    assert not choose(statistics, config).any()  # ages 1: nobody is mature
    accumulate(statistics, layer, features_of((0.0, 0.0, 4.0)), config)
    # 0.9·0.2, 0.9·0.1, 0.9·0.05 + 0.1·0.5·4; three mature units earn 0.9
    torch.testing.assert_close(statistics.utility, torch.tensor([[0.18, 0.09, 0.245]]))
    assert not choose(statistics, config).any()
    torch.testing.assert_close(statistics.credit, torch.tensor([0.9], dtype=torch.float64))
    accumulate(statistics, layer, features_of((0.0, 0.0, 0.0)), config)  # 1.8: one is due, the least useful
    chosen = choose(statistics, config)
    assert chosen.tolist() == [[False, True, False]]
    torch.testing.assert_close(statistics.credit, torch.tensor([0.8], dtype=torch.float64))
    bias = layer.outgoing.bias.clone()
    fold(statistics, layer, chosen, config.decay)
    # its mean activation 0.05·0.81 over 1 − 0.9³ = 0.271, times its outgoing weight −2
    torch.testing.assert_close(layer.outgoing.bias - bias, torch.tensor([[-2 * 0.05 * 0.81 / 0.271]]))
    assert statistics.age.tolist() == [[3, 0, 3]]
    assert statistics.utility[0, 1] == statistics.activation[0, 1] == 0
    accumulate(statistics, layer, features_of((0.0, 0.0, 0.0)), config)  # two mature: 0.8 + 0.6
    assert choose(statistics, config).tolist() == [[True, False, False]]  # 0.18·0.81 < 0.245·0.81


def test_correction_of_running_means():
    expected = torch.tensor([[1.0, 0.1, 0.19]])
    torch.testing.assert_close(correction(torch.tensor([[0, 1, 2]]), 0.9), expected)


def test_cbp_counts_only_experts_that_see_samples():
    routing = top_k_routing(torch.tensor([[5.0, 0.0, -5.0], [4.0, 0.0, -5.0]]), 1)
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    features = RoutedFeatures(values=values, routing=routing)
    assert mean_by_expert(features, values).tolist() == [[2.0, 3.0], [0.0, 0.0], [0.0, 0.0]]
    agent = make_agent(make_config("cbp", network={"width": 2, "depth": 1, "num_experts": 3}))
    layer = unit_layers(agent.actor)[0]
    statistics = UnitStatistics.of(layer)
    accumulate(statistics, layer, features, CbpConfig(maturity=0, rate=0.25))
    assert statistics.age.tolist() == [[1, 1], [0, 0], [0, 0]]
    assert statistics.credit.tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("methods", [("cbp",), ("cbp", "spectral_norm"), ("cbp", "injection")])
def test_cbp_goes_by_the_weights_in_use(methods):
    """Those that spectral normalisation divides, and the frozen ones of an injection beside the trained."""
    agent = make_agent(make_config(*methods, actor="dense", cbp={"maturity": 0}))
    with torch.no_grad():
        agent.actor.experts.head.weight[:, :, 0] = 50.0
    agent.begin_task(1)
    layer, samples = unit_layers(agent.actor)[1], rollout(1).observation.flatten(0, 1)
    with torch.no_grad():
        layer.incoming.bias[0, 0] = 1.0
        features = unit_features(agent.actor.trace(samples))[1]
    statistics, config = UnitStatistics.of(layer), CbpConfig(maturity=0, rate=0.0, decay=0.0)
    accumulate(statistics, layer, features, config)
    assert int(statistics.utility[0].argmax()) == 0
    units = torch.zeros_like(statistics.age, dtype=torch.bool)
    units[0, 0] = True
    weight, bias = layer.outgoing.effective()[0].detach().clone(), layer.outgoing.bias.detach().clone()
    fold(statistics, layer, units, config.decay)
    added = weight[0, :, 0] * features.values[:, 0].mean()
    torch.testing.assert_close((layer.outgoing.bias - bias)[0], added, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("methods", [("cbp", "reset_all"), ("reset_all", "cbp")])
def test_units_of_replaced_layers_are_new_to_cbp(methods: tuple[str, ...]) -> None:
    """Else what units of the old layers did would be folded into the biases of the new ones."""
    agent = make_agent(make_config(*methods, cbp={"rate": 0.0, "maturity": 1}))
    agent.begin_task(0)
    train(agent, 1, 2)
    agent.begin_task(1)
    train(agent, 3)
    (cbp,) = (method for method in agent.methods if isinstance(method, Cbp))
    minibatches = 32 // agent.config.minibatch_size
    assert all(layer.age.max() == minibatches for layers in cbp.statistics.values() for layer in layers)


def test_units_of_layers_that_stay_are_old_to_cbp_in_the_next_task() -> None:
    agent = make_agent(make_config("cbp", "reset_head", cbp={"rate": 0.0, "maturity": 1}))
    agent.begin_task(0)
    train(agent, 1, 2)
    agent.begin_task(1)
    train(agent, 3)
    (cbp, _) = agent.methods
    assert isinstance(cbp, Cbp)
    minibatches = 32 // agent.config.minibatch_size
    assert all(layer.age.max() == 3 * minibatches for layers in cbp.statistics.values() for layer in layers)


def test_nap_holds_the_norms_of_a_critic_whose_actor_went_too_far():
    config = make_config("nap", target_kl=1e-6, learning_rate=1e-2, num_epochs=2)
    agent = make_agent(config)
    agent.begin_task(0)
    before = [matrix_norms(weight) for weight in weights(agent)]
    train(agent, 1)
    fresh = make_agent(config)
    assert not all(map(torch.equal, agent.critic_parameters, fresh.critic_parameters))
    for weight, norm in zip(weights(agent), before, strict=True):
        torch.testing.assert_close(matrix_norms(weight), norm, rtol=1e-5, atol=0)


def test_cbp_replaces_a_constant_unit_without_changing_the_output():
    agent = make_agent(make_config("cbp", actor="dense", cbp={"rate": 0.0, "maturity": 1}))
    cbp, samples = only_method(agent), rollout(1).observation.flatten(0, 1)
    layer = unit_layers(agent.actor)[1]
    with torch.no_grad():  # a unit that is 1.5 on every sample, and of little use
        layer.incoming.weight[0, 4], layer.incoming.bias[0, 4] = 0.0, 1.5
        layer.outgoing.weight[0, :, 4] = 1e-3
    agent.learning_rate = 0.0
    agent.set_learning_rate(0.0)
    agent.begin_task(0)
    agent.set_learning_rate(0.0)
    train(agent, 1)
    before, state = agent.actor(samples), snapshot(agent)
    statistics = cbp.statistics["actor"][1]
    statistics.utility[0, 4] = 0.0
    statistics.credit += 1.0
    chosen = [torch.zeros_like(s.age, dtype=torch.bool) for s in cbp.statistics["actor"]]
    chosen[1] = choose(statistics, cbp.config)
    assert chosen[1].nonzero().tolist() == [[0, 4]]
    fold(statistics, layer, chosen[1], 0.99)
    expected = expected_snapshot(agent, {"actor": chosen, "critic": none_of(agent.critic)})
    recycle(agent, unit_layers(agent.actor), chosen)
    assert_recycled(agent, expected)
    torch.testing.assert_close(agent.actor(samples), before, atol=1e-6, rtol=0)
    assert "actor.experts.head.bias" in changed(state, snapshot(agent))


def none_of(network: MoENetwork) -> list[torch.Tensor]:
    return [torch.zeros(layer.incoming.bias.shape, dtype=torch.bool) for layer in unit_layers(network)]


def test_cbp_replaces_at_its_rate():
    """ρ = 0.05 of 16 mature units: 0.8 a minibatch in each layer that is at work."""
    agent = make_agent(make_config("cbp", actor="dense", cbp={"rate": 0.05, "maturity": 0}))
    agent.begin_task(0)
    train(agent, 1, 2, 3)  # six minibatches, four layers
    # A replaced unit is mature again in the next minibatch, so a layer earns 0.8 six times: 4.8.
    assert only_method(agent).metrics() == {"cbp_replaced": 16.0}
