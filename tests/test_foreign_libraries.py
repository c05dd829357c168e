"""The examples for other libraries run, and what they add is the penalty's gradient and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_examples import check_rank_rises, example

import sphere_rl as sp


def test_skrl(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    pytest.importorskip("skrl", reason="skrl is not installed")
    monkeypatch.chdir(tmp_path)
    module = example("skrl_ppo")
    (first, without), (same, with_penalty) = module.main(["--steps", "1024", "--rho", "1"]).values()
    assert first == pytest.approx(same, abs=0.5)  # other states: the policies differ after the first rollout
    assert with_penalty > 1.1 * without


def test_equinox_and_optax():
    pytest.importorskip("equinox", reason="Equinox is not installed")
    pytest.importorskip("optax", reason="Optax is not installed")
    module = example("jax_equinox")
    check_rank_rises(module.main(["--steps", "30", "--rho", "1"]), module.GRAVITIES)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_transformers_blocks_are_the_same_but_for_the_penalty(kind: str):
    """The output of a model and, with a fixed strength, the gradients of its loss and of a loss with the penalty."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    module = example("transformers_moe")
    tokens = torch.randint(32, (3, 10), generator=torch.Generator().manual_seed(0))
    model, other = module.tiny(kind).double(), module.tiny(kind).double()
    model.set_experts_implementation("eager")  # the one that takes float64
    plain = model(input_ids=tokens, labels=tokens)
    blocks = module.regularize_experts(model, strength=0.5)
    assert len(blocks) == 2
    shown = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(shown.logits, plain.logits)
    found = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(shown.loss, list(model.parameters())), strict=True)
    )
    penalties: list[torch.Tensor] = []
    for block in module.regularize_experts(other, strength=0.0):  # the penalty of what the block itself makes
        inner = block.forward

        def forward(x: Any, index: Any, weights: Any, block: Any = block, inner: Any = inner) -> Any:
            gates = weights.new_zeros(len(x), 4).scatter(1, index, weights).to(x.dtype)  # Mixtral routes in float32
            hidden = torch.stack([x @ weight.T for weight in block.gate_up_proj], 1)
            features = block.act_fn(hidden[..., :32]) * hidden[..., 32:] * (gates != 0)[:, :, None]
            penalties.append(sp.sphere_penalty(sp.weighted_features(features, gates), scale="free"))
            return inner(x, index, weights)

        block.forward = forward
    loss = other(input_ids=tokens, labels=tokens).loss + 0.5 * sum(penalties)
    parameters = dict(other.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_transformers_learns(capsys: Any):
    pytest.importorskip("transformers", reason="transformers is not installed")
    results = example("transformers_moe").main(["--steps", "40", "--rho", "1"])
    assert np.isfinite(list(results.values())).all()
    for kind in ("mixtral", "qwen2_moe"):
        (loss, rank), (other, higher) = results[kind, 0.0], results[kind, 1.0]
        assert max(loss, other) < 3.0  # log 32 = 3.47 before
        assert higher > rank


def test_track_watches_a_block_of_transformers():
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = example("transformers_moe").tiny("mixtral")
    tokens = torch.randint(32, (3, 10), generator=torch.Generator().manual_seed(0))
    gradients = []
    for rho in (0.0, 0.5):
        with sp.track(model, features="model.layers.1.mlp") as tracker:
            tracker.regularize(rho=rho)
            model.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            assert tracker.phi().shape == (30, 32)
            rank: Any = tracker.metrics(tokens)["r_e_A"]
            assert 1 <= rank <= 30
            gradients.append([parameter.grad.clone() for parameter in model.model.layers.parameters()])
    blocks = [not torch.equal(one, other) for one, other in zip(*gradients, strict=True)]
    assert any(blocks)
