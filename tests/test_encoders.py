"""A module of one's own in front of gate and experts: any torch network, trained, measured, reset and taken away."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conformance.agents import SHORT, make_agent, make_config, rollout
from test_examples import ROOT, files_of_page
from torch import Tensor, nn
from toy_runs import WORDS

import sphere_rl as sp
from sphere_rl import plugins
from sphere_rl.cli import main
from sphere_rl.errors import ConfigError
from sphere_rl.experts import Kind, TopK
from sphere_rl.experts.network import KINDS, make_actor
from sphere_rl.methods import methods
from sphere_rl.spectrum.kernel import entk
from sphere_rl.training.ppo import update


class Window(nn.Module):
    """The last hidden state of a recurrent network that goes through three states of one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.GRU(1, 8, batch_first=True)

    def forward(self, states: Tensor) -> Tensor:
        return self.steps(states.unsqueeze(-1))[0][:, -1]


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = lambda options, training: TopK(options.top_k)  # noqa: E731
    monkeypatch.setitem(KINDS, "window_moe", Kind("", gate, encoder=lambda dim, options: Window()))
    monkeypatch.setitem(KINDS, "window", Kind("", encoder=lambda dim, options: Window()))


def test_experts_see_what_the_encoder_makes() -> None:
    """The same numbers as an actor without one on its features; seeds decide the weights, the global stream nothing."""
    before = torch.random.get_rng_state()
    actor, twin = (make_actor("window_moe", 3, 2, seed=4, width=8, depth=1, num_experts=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(actor.parameters(), twin.parameters(), strict=True))
    other = make_actor("window_moe", 3, 2, seed=5, width=8, depth=1, num_experts=3)
    assert actor.encoder is not None
    assert other.encoder is not None
    first, second = next(actor.encoder.parameters()), next(other.encoder.parameters())
    assert not torch.equal(first, second)
    plain = make_actor("topk_moe", 8, 2, width=8, depth=1, num_experts=3)
    plain.load_state_dict({name: t for name, t in actor.state_dict().items() if not name.startswith("encoder.")})
    states = torch.randn(20, 3)
    seen = actor.encoder(states)
    torch.testing.assert_close(actor(states), plain(seen))
    torch.testing.assert_close(actor.selection(states), plain.selection(seen))
    actor(states).sum().backward()
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_the_kernel_has_the_encoders_parameters_in_it() -> None:
    actor = make_actor("window_moe", 3, 2, width=8, depth=1, num_experts=3).double()
    states = torch.randn(6, 3, dtype=torch.float64)
    parameters, rows = list(actor.parameters())[: -len(list(actor.head.parameters()))], []
    for out in actor(states).flatten():
        found = torch.autograd.grad(out, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    jacobian = torch.stack(rows)
    torch.testing.assert_close(entk(actor, states), jacobian @ jacobian.T)


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_trains_it(method: str) -> None:
    config = make_config(method, actor="window_moe", critic="window", tasks=[SHORT])
    agent = make_agent(config)
    assert agent.actor.encoder is not None
    before = [p.detach().clone() for p in agent.actor.encoder.parameters()]
    update(agent, rollout(3, SHORT), config)
    after = list(agent.actor.encoder.parameters())
    assert all(p.isfinite().all() for p in after)
    changed = any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert changed == (method != "trac")  # its first steps are of length 1e-8


def test_a_reset_begins_the_encoder_anew() -> None:
    agent = make_agent(make_config("reset_all", actor="window_moe"))
    assert agent.actor.encoder is not None
    before = [p.detach().clone() for p in agent.actor.encoder.parameters()]
    agent.begin_task(1)
    assert all(not torch.equal(p, q) for p, q in zip(before, agent.actor.encoder.parameters(), strict=True))


@pytest.mark.parametrize(
    ("made", "found"),
    [(nn.Identity(), None), (nn.Unflatten(1, (1, 3)), r"\[2, 1, 3\]"), (nn.GRU(3, 4), "tuple")],
)
def test_what_makes_no_features_is_refused(made: nn.Module, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mine", Kind("", encoder=lambda dim, options: made))
    if found is None:
        assert make_actor("mine", 3, 1, width=8, depth=1).observation_dim == 3
        return
    with pytest.raises(
        ConfigError, match=f"actor: 'mine' is not allowed; expected a kind whose encoder .* not {found}"
    ):
        make_actor("mine", 3, 1, width=8, depth=1)


@pytest.mark.filterwarnings("ignore:`?torch.jit")
def test_images_train_resume_and_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documented file, on an environment whose observations are 8 × 8 × 3 pixels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_modules", {})
    (tmp_path / "pixel_moe.py").write_text(files_of_page((ROOT / "docs" / "own-gate.md").read_text())["pixel_moe.py"])
    words = "--plugin pixel_moe --tasks toy_envs:Image-v0 --actor pixel_moe --critic pixels --method sphere --quiet"
    try:
        assert main(["train", *WORDS, *shlex.split(words), "--spectrum-every", "32", "--out", "run"]) == 0
        assert main(["evaluate", "run", "--episodes", "1"]) == 0
        assert main(["diagnose", "run"]) == 0
        rows = [json.loads(line) for line in Path("run/spectrum.jsonl").read_text().splitlines()]
        assert all(row["r_e_K"] > 0 for row in rows)
        policy, images = sp.load_policy("run"), torch.randint(256, (5, 192))
        assert main(["export", "run", "--format", "torchscript", "--out", "away"]) == 0
        (file,) = Path("away").glob("*.pt")
        torch.testing.assert_close(torch.jit.load(file)(images.float()), policy(images.float()), rtol=1e-4, atol=1e-5)
    finally:
        sys.modules.pop("pixel_moe", None)
    capsys.readouterr()
