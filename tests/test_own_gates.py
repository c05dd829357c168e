"""Gates of one's own: what is not this package's is called, may draw at random, leaves in a file, and is checked."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.agents import make_agent, make_config, rollout
from stopping import train_in_pieces
from test_examples import ROOT, files_of_page
from torch import Tensor, nn
from toy_runs import config, train

import sphere_rl as sp
from sphere_rl import plugins
from sphere_rl.commands import export as exporting
from sphere_rl.errors import ConfigError
from sphere_rl.experts import Kind, Routing, TopK, dense_routing, top_k_routing
from sphere_rl.experts.network import KINDS, make_actor
from sphere_rl.kernels.threads import two_lanes
from sphere_rl.runs import RunFolder
from sphere_rl.training.ppo import update

SMALL: dict[str, Any] = {"width": 8, "depth": 2, "num_experts": 4}
STATES = np.random.default_rng(1).normal(0, 2, (40, 3)).astype(np.float32)


@dataclass(frozen=True)
class Least(TopK):
    """Of the smallest logits."""

    def __call__(self, logits: Tensor) -> Routing:
        return super().__call__(-logits)


@dataclass(frozen=True)
class Noisy:
    """Top-k of logits with noise, while training."""

    k: int
    noise: float
    shared: int = 0

    def __call__(self, logits: Tensor) -> Routing:
        return top_k_routing(logits + self.noise * torch.randn(logits.shape).to(logits), self.k)


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "noisy", Kind("", lambda options, training: Noisy(options.top_k, float(training))))


def test_a_gate_derived_from_one_that_kernels_know_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "least", Kind("", lambda options, training: Least(options.top_k)))
    actor, states = make_actor("least", 3, 2, **SMALL), torch.from_numpy(STATES)
    trace = actor.trace(states)
    assert trace.logits is not None
    assert torch.equal(trace.gates != 0, top_k_routing(-trace.logits, 2).weights != 0)
    with torch.no_grad():
        assert torch.equal(actor(states), trace.output)
    assert not actor.has_kernel_gradient
    assert not hasattr(actor, "gating")
    assert actor.selection(states) is None
    torch.testing.assert_close(torch.export.export(actor, (states,)).module()(states), trace.output)


@pytest.mark.usefixtures("noisy")
def test_noise_from_the_global_stream_resumes_and_is_measured_without_a_change(tmp_path: Path) -> None:
    settings = config("Wide", actor="noisy", critic="noisy")
    whole = train(settings, tmp_path / "whole")
    pieces, begun = train_in_pieces(settings, tmp_path / "pieces")
    assert begun > 2
    measured = train(config("Wide", actor="noisy", critic="noisy", spectrum_every=16), tmp_path / "measured")
    assert rows(measured, "spectrum")
    for log in ("train", "eval"):
        assert rows(whole, log) == rows(pieces, log) == rows(measured, log) != []


def rows(folder: RunFolder, log: str) -> list[dict[str, Any]]:
    lines = (folder.path / f"{log}.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in lines]


@pytest.mark.usefixtures("noisy")
@pytest.mark.parametrize("front", [None, nn.Dropout(0.5)], ids=["gates", "dropout"])
def test_noise_on_two_lanes_is_that_of_one(front: nn.Module | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The critic's step draws on this thread, after the actor's."""
    drew = set()
    if front is not None:
        known, encoder = KINDS["topk_moe"].gate, lambda dim, options: front
        monkeypatch.setitem(KINDS, "noisy", Kind("", known, encoder=encoder))
    draw = Noisy.__call__ if front is None else nn.Dropout.forward
    where = Noisy if front is None else nn.Dropout
    name = "__call__" if front is None else "forward"
    monkeypatch.setattr(where, name, lambda *given: (drew.add(threading.current_thread()), draw(*given))[1])
    settings, found = make_config("none", actor="noisy", critic="noisy"), []
    for threads in (1, 2):
        agent = make_agent(settings)
        torch.manual_seed(0)
        with two_lanes(threads):
            update(agent, rollout(3), settings)
        found.append(nn.utils.parameters_to_vector([*agent.actor_parameters, *agent.critic_parameters]))
    assert torch.equal(*found)
    assert drew == {threading.main_thread()}


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's own gate."""
    (tmp_path / "sigmoid_moe.py").write_text(files_of_page((ROOT / "docs/own-gate.md").read_text())["sigmoid_moe.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_modules", {})
    plugins.load(["sigmoid_moe"])
    yield
    sys.modules.pop("sigmoid_moe")


@pytest.mark.filterwarnings("ignore:.torch.jit.load")
@pytest.mark.usefixtures("documented")
def test_the_documented_gate_leaves_as_a_graph(tmp_path: Path) -> None:
    formats = ["torchscript"]
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        formats.append("onnx")
    except ImportError:
        pass
    run = train(config("Wide", actor="sigmoid_moe", normalize_observations=True), tmp_path / "run")
    out, written = exporting.export(run.path, formats, tmp_path / "out")
    assert [one.format for one in written] == formats
    expected = sp.load_policy(run.path)(STATES)
    module: Any = torch.jit.load(out / "policy.pt")  # type: ignore[reportPrivateImportUsage]
    np.testing.assert_allclose(module(torch.from_numpy(STATES)).detach(), expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0).min() > 1e-3


@pytest.mark.usefixtures("documented")
def test_more_experts_than_there_are_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^top_k: 9 is not allowed; expected 1 to 4 for this gate \([^\n]*\)$"):
        make_actor("sigmoid_moe", 3, 2, **SMALL, top_k=9)
    with pytest.raises(ConfigError, match=r"^top_k: 2 is not allowed; expected 1 to 1 for this gate"):
        config("Wide", actor="sigmoid_moe", network={**SMALL, "num_experts": 1})


class Bare:
    def __call__(self, logits: Tensor) -> Routing:
        return dense_routing(logits)


class Returns:
    shared = 0

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        self.made = made

    def __call__(self, logits: Tensor) -> Any:
        return self.made(logits)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Bare(), "a kind that makes a gate (AttributeError: 'Bare' object has no attribute 'shared')"),
        (None, "a kind that makes a gate (AttributeError: 'NoneType' object has no attribute 'shared')"),
        (Returns(lambda z: z), "a kind whose Returns makes a Routing [2, 4], not Tensor"),
        (Returns(lambda z: 1 / 0), "a kind whose Returns makes a Routing [2, 4], not ZeroDivisionError: division by"),
        (
            Returns(lambda z: dense_routing(z[:, 1:])),
            "a kind whose Returns makes a Routing [2, 4], not [2, 3], of 3 experts",
        ),
    ],
    ids=["no shared", "none", "no routing", "error", "experts"],
)
def test_what_is_no_gate_is_one_line(gate: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "mine", Kind("a gate", lambda options, training: gate))
    with pytest.raises(ConfigError) as error:
        make_actor("mine", 3, 2, **SMALL)
    assert str(error.value).startswith(f"actor: 'a gate' is not allowed; expected {message}")
    assert "\n" not in str(error.value)
