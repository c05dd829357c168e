from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from sphere_rl.errors import ConfigError
from sphere_rl.experts.heads import CategoricalHead, GaussianHead
from sphere_rl.experts.network import KINDS, make_actor
from sphere_rl.spectrum import entk, measure

SMALL: dict[str, Any] = {"width": 8, "depth": 2, "num_experts": 4}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_cw10_actors() -> None:
    # one MLP 39 -> 256 -> 256 -> 256 -> 4: 39·256+256 + 2·(256·256+256) + 256·4+4
    mlp = 10_240 + 2 * 65_792 + 1_028
    gate = 10_240 + 2 * 65_792 + 256 * 10 + 10
    log_std = 4
    assert count(make_actor("dense", 39, 4)) == mlp + log_std
    for kind in ("topk_moe", "dense_moe", "shared_moe", "ds_moe"):
        routed = gate - 257 if kind == "shared_moe" else gate  # nine logits: the shared expert has none
        assert count(make_actor(kind, 39, 4)) == 10 * mlp + routed + log_std
    width = 850  # 256·√((10·mlp + gate)/mlp) = 849.5, rounded to even
    wide = 39 * width + width + 2 * (width * width + width) + width * 4 + 4
    assert count(make_actor("wide", 39, 4)) == wide + log_std
    assert wide == pytest.approx(10 * mlp + gate, rel=0.07)


def expert_by_hand(actor: torch.nn.Module, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    mlp = getattr(actor, part)
    for layer in mlp.hidden:
        x = (x @ layer.weight[expert].T + layer.bias[expert]).clamp(min=0)
    return x @ mlp.head.weight[expert].T + mlp.head.bias[expert]


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_the_gated_sum_of_experts(kind: str) -> None:
    actor = make_actor(kind, 5, 3, seed=1, **SMALL).double()
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = actor(x)
    for n, row in enumerate(x):
        expected = torch.zeros(3, dtype=torch.float64)
        for expert, weight in gates_by_hand(kind, actor, row).items():
            expected += weight * expert_by_hand(actor, "experts", expert, row)
        torch.testing.assert_close(output[n], expected)


def gates_by_hand(kind: str, actor: torch.nn.Module, row: torch.Tensor) -> dict[int, float]:
    if kind in ("dense", "wide"):
        return {0: 1.0}
    logits = expert_by_hand(actor, "gate", 0, row).tolist()
    shared = 1 if kind == "shared_moe" else 0
    chosen = range(len(logits))
    if kind in ("topk_moe", "shared_moe"):
        chosen = sorted(chosen, key=lambda e: -logits[e])[:2]
    total = sum(math.exp(logits[e]) for e in chosen)
    return dict.fromkeys(range(shared), 1.0) | {e + shared: math.exp(logits[e]) / total for e in chosen}


def test_ds_moe_is_dense_in_training_and_sparse_in_evaluation() -> None:
    actor, x = make_actor("ds_moe", 5, 3, **SMALL), torch.randn(6, 5)
    assert (actor.trace(x).gates > 0).all()
    actor.eval()
    assert ((actor.trace(x).gates > 0).sum(1) == 2).all()


def test_temperature_flattens_the_gate() -> None:
    x = torch.randn(6, 5)
    sharp = make_actor("dense_moe", 5, 3, temperature=1.0, **SMALL).trace(x)
    flat = make_actor("dense_moe", 5, 3, temperature=4.0, **SMALL).trace(x)
    assert sharp.logits is not None
    torch.testing.assert_close(flat.gates, (sharp.logits / 4).softmax(1))


def test_initial_weights_are_lecun_normal_from_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    actor, same, other = (make_actor("topk_moe", 39, 4, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b, c in zip(actor.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if "weight" in name:
            assert not torch.equal(a, c)
            assert a.std().item() == pytest.approx(a.shape[-1] ** -0.5, rel=0.05)
        else:
            assert not a.any()


def test_trace_gives_features_of_every_hidden_layer() -> None:
    trace = make_actor("topk_moe", 5, 3, **SMALL).trace(torch.randn(6, 5))
    assert [layer.weighted().shape for layer in trace.features] == [(6, 32), (6, 32)]
    assert [layer.weighted().shape for layer in trace.gate_features] == [(6, 8), (6, 8)]
    unselected = (trace.gates == 0)[:, :, None].expand(6, 4, 8)
    assert not trace.features[-1].dense()[unselected].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k: 5 is not allowed; expected 1 to num_experts (4)"),
        ({"temperature": 0.0}, "temperature: 0.0 is not allowed; expected a number above 0"),
        ({"width": 0}, "width: 0 is not allowed; expected at least 1"),
        ({"num_shared": 3}, "num_shared: 3 is not allowed; expected 0 to 2, num_experts - top_k"),
        ({"num_shared": -1}, "num_shared: -1 is not allowed; expected 0 or more"),
        ({"top_k": 0}, "top_k: 0 is not allowed; expected 1 to num_experts (4)"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_actor("shared_moe", 5, 3, **{**SMALL, **options})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("topk_moe", {"num_experts": 3, "top_k": 3}),
        ("topk_moe", {"num_experts": 1, "top_k": 1}),
        ("ds_moe", {"num_experts": 2, "top_k": 2, "num_shared": 9}),
        ("shared_moe", {"num_experts": 3, "top_k": 3, "num_shared": 0}),
        ("dense_moe", {"num_experts": 1, "top_k": 7}),
        ("dense", {"num_experts": 1, "top_k": 7, "num_shared": 9}),
        ("wide", {"num_experts": 1, "top_k": 7}),
    ],
)
def test_sizes_that_an_architecture_does_not_use_are_not_checked(kind: str, options: dict[str, int]) -> None:
    actor = make_actor(kind, 5, 3, **{**SMALL, **options})
    trace = actor.train().trace(torch.randn(6, 5))
    assert trace.output.shape == (6, 3)
    assert torch.isfinite(trace.output).all()


@pytest.mark.parametrize("size", [0, -1, 1.5, "39"])
@pytest.mark.parametrize("name", ["observation_dim", "action_dim", "width"])
@pytest.mark.usefixtures("unchecked_shapes")
def test_sizes_are_whole_numbers(name: str, size: Any) -> None:
    sizes: dict[str, Any] = {"observation_dim": 3, "action_dim": 2} | {name: size}
    with pytest.raises(ConfigError, match=rf"^{name}: {re.escape(repr(size))} is not allowed; expected "):
        make_actor("topk_moe", **sizes)


@pytest.mark.parametrize("options", [{"discrete": True}, {}])
def test_branches_that_do_not_fit_are_named(options: dict[str, Any]) -> None:
    actions = 5 if options else 4
    with pytest.raises(ConfigError, match=rf"^branches: \(2, 2\) is not allowed; .* sum action_dim \({actions}\)$"):
        make_actor("dense", 3, actions, branches=(2, 2), **options)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("states", "found"),
    [
        (torch.zeros(5, 3, dtype=torch.float64), "torch.float64 [5, 3]"),
        (torch.zeros(5, 4), "torch.float32 [5, 4]"),
        (torch.zeros(3), "torch.float32 [3]"),
        (torch.zeros(5, 3, dtype=torch.int64), "torch.int64 [5, 3]"),
        (np.zeros((5, 3), np.float32), "float32 [5, 3]"),
    ],
)
def test_states_that_an_actor_cannot_read_are_named(states: Any, found: str) -> None:
    actor = make_actor("topk_moe", 3, 2, width=8, depth=1)
    message = f"observation: got {found}, allowed: torch.float32 [N, 3]"
    for use in (actor, actor.trace, lambda x: measure(actor, x)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            use(states)
    if isinstance(states, Tensor):
        with pytest.raises(ValueError, match=re.escape(message)):
            entk(actor, states)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match="actor: got Linear, allowed: a MoENetwork"):
        measure(nn.Linear(3, 2), torch.zeros(5, 3))  # type: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="observations: got no state"):
        measure(make_actor("dense", 3, 2, width=8), torch.zeros(0, 3))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="actor: 'moe' is not allowed; expected one of dense, wide, topk_moe"):
        make_actor("moe", 5, 3)


def test_gaussian_head_is_the_diagonal_gaussian() -> None:
    head, old_head = GaussianHead(3), GaussianHead(3)
    head.log_std.data, old_head.log_std.data = torch.tensor([0.3, -0.5, 0.1]), torch.tensor([0.0, 0.2, -0.1])
    mean, old_mean, action = torch.randn(3, 5, 3).unbind()
    new = Independent(Normal(mean, head.log_std.exp()), 1)
    old = Independent(Normal(old_mean, old_head.log_std.exp()), 1)
    torch.testing.assert_close(head.log_prob(mean, action), new.log_prob(action))
    torch.testing.assert_close(head.entropy(mean), new.entropy())
    torch.testing.assert_close(head.kl(old_head.parameters_of(old_mean), mean), kl_divergence(old, new))
    draws = head.sample(torch.zeros(20_000, 3), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.std(0), head.log_std.exp().detach(), rtol=0.03, atol=0)


def test_categorical_head_is_the_categorical() -> None:
    head, action = CategoricalHead(), torch.tensor([0, 2, 1, 3, 3])
    logits, old_logits = torch.randn(2, 5, 4).unbind()
    new, old = Categorical(logits=logits), Categorical(logits=old_logits)
    torch.testing.assert_close(head.log_prob(logits, action), new.log_prob(action))
    torch.testing.assert_close(head.entropy(logits), new.entropy())
    torch.testing.assert_close(head.kl(head.parameters_of(old_logits), logits), kl_divergence(old, new))
    draws = head.sample(logits[:1].expand(20_000, 4), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.bincount(minlength=4) / 20_000, new.probs[0], atol=0.02, rtol=0)
    assert torch.equal(head.mode(logits), logits.argmax(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"spectral_norm": True}, {"layer_norm": True}, {"num_shared": 2}], ids=str)
def test_output_without_a_graph_is_that_of_the_trace(kind: str, options: dict[str, Any]) -> None:
    actor = make_actor(kind, 5, 3, width=8, depth=2, num_experts=5, **options)
    observation = torch.randn(17, 5)
    recorded = actor(observation)
    assert recorded.requires_grad
    with torch.no_grad():
        assert torch.equal(actor(observation), recorded)
        assert torch.equal(actor(observation[:1]), actor.trace(observation[:1]).output)


def test_hooks_see_what_runs_without_a_graph() -> None:
    actor, seen = make_actor("topk_moe", 5, 3, width=8, depth=2, num_experts=4), []
    for module in (actor.experts, actor.experts.hidden[0]):
        handle = module.register_forward_hook(lambda *call: seen.append(call[0]))
        with torch.no_grad():
            actor(torch.zeros(2, 5))
        handle.remove()
    assert seen == [actor.experts, actor.experts.hidden[0]]
