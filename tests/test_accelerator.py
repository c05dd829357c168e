"""On an accelerator everything is what it is on the CPU: one of the two devices checks the other.

Skipped where PyTorch finds none; SPHERE_TEST_DEVICE=cpu runs the same code without one.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.agents import SHORT, agent_or_refusal, make_config, rollout
from stopping import StopAfter, Stopped
from torch import Tensor, nn

import sphere_rl as sp
from sphere_rl import protocol
from sphere_rl.config import TrainConfig, override
from sphere_rl.experts.network import KINDS, make_actor
from sphere_rl.learner.rollout import Rollout
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder
from sphere_rl.runtime import devices
from sphere_rl.training.ppo import update

DEVICE = os.environ.get("SPHERE_TEST_DEVICE") or devices()[-1]
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and "SPHERE_TEST_DEVICE" not in os.environ, reason="no accelerator here"),
]
TASKS = {"gaussian": SHORT, "categorical": "CartPole-v1"}
DRAWS = {"cbp", "fire", "injection", "redo", "regrama", "reset_all", "reset_head", "shrink_perturb", "nap"}
"""Methods that may draw new weights, which each device does from numbers of its own."""


def moved(found: Rollout) -> Rollout:
    """The same experience, there."""
    tensors = {f.name: getattr(found, f.name) for f in fields(found)}
    return replace(found, **{name: item.to(DEVICE) for name, item in tensors.items() if isinstance(item, Tensor)})


def weights(agent: Any) -> Tensor:
    return nn.utils.parameters_to_vector([*agent.actor_parameters, *agent.critic_parameters]).detach().cpu().double()


def iteration(device: str, method: str, task: str, **options: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Weights before and after three epochs of one minibatch each, whose order does not matter, and statistics."""
    config = make_config(method, device=device, tasks=[task], minibatch_size=32, num_epochs=3, **options)
    agent = agent_or_refusal(config, task=task)
    before = weights(agent)
    experience = rollout(3, task)
    statistics = update(agent, moved(experience) if device == DEVICE else experience, config)
    return before, weights(agent), statistics


@pytest.mark.parametrize("head", TASKS)
@pytest.mark.parametrize("method", sorted(methods()))
def test_an_iteration_is_the_cpus(method: str, head: str) -> None:
    before, expected, told = iteration("cpu", method, TASKS[head])
    start, found, statistics = iteration(DEVICE, method, TASKS[head])
    torch.testing.assert_close(start, before, rtol=0, atol=0)
    assert found.isfinite().all()
    if method not in DRAWS:
        assert (found - expected).norm() <= 0.01 * (expected - before).norm()
        for name, value in told.items():
            assert statistics[name] == pytest.approx(value, rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("actor", sorted(KINDS))
@pytest.mark.parametrize("mode", ["fixed", "loss", "grad"])
@pytest.mark.parametrize("scale", ["literal", "free"])
def test_the_penalty_joins_as_on_the_cpu(mode: str, scale: str, actor: str) -> None:
    options = {"sphere.mode": mode, "sphere.scale": scale, "actor": actor, "critic": "topk_moe", "sphere.layers": "all"}
    before, expected, _ = iteration("cpu", "sphere", SHORT, **options)
    _, found, _ = iteration(DEVICE, "sphere", SHORT, **options)
    assert (found - expected).norm() <= 0.01 * (expected - before).norm()


@pytest.mark.parametrize("scale", ["literal", "free"])
@pytest.mark.parametrize("exponent", [-15, 0, 15])
def test_the_penalty_alone(scale: Any, exponent: int) -> None:
    draw = torch.Generator().manual_seed(0)
    phi = torch.randn(64, 48, generator=draw) * 10.0**exponent
    expected = sp.sphere_penalty(phi.double(), scale=scale)
    there = phi.clone().to(DEVICE).requires_grad_()
    penalty = sp.sphere_penalty(there, scale=scale)
    assert penalty.device.type == torch.device(DEVICE).type
    if scale == "free" or exponent == 0:  # the literal one is of fourth order in Φ and leaves float32's range
        assert penalty.item() == pytest.approx(float(expected), rel=1e-5)
        penalty.backward()
        reference = phi.double().requires_grad_()
        sp.sphere_penalty(reference, scale=scale).backward()
        assert reference.grad is not None
        assert there.grad is not None
        torch.testing.assert_close(there.grad.cpu().double() * 10.0**exponent, reference.grad * 10.0**exponent,
                                   rtol=1e-4, atol=1e-6)  # fmt: skip


def test_ranks_and_the_kernel() -> None:
    actor = make_actor("topk_moe", 11, 3, width=32, depth=2, num_experts=5)
    states = torch.randn(24, 11, generator=torch.Generator().manual_seed(1))
    expected = sp.entk(copy.deepcopy(actor).double(), states.double())
    found = sp.entk(actor.to(DEVICE), states.to(DEVICE))
    assert (found.cpu().double() - expected).norm() <= 1e-5 * expected.norm()
    assert rank(found) == pytest.approx(rank(expected), rel=1e-4)


def rank(kernel: Tensor) -> float:
    return float(sp.effective_rank(torch.linalg.eigvalsh(kernel)))


def regularized(device: str, wrap: Callable[[nn.Module], nn.Module], dtype: torch.dtype | None) -> Tensor:
    """The first layer's gradient of a small network with a penalised hidden layer, seen from the CPU in float64."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2)

        def forward(self, states: Tensor) -> Tensor:
            return self.second(sp.regularize(torch.relu(self.first(states)), rho=0.5, scale="free"))

    torch.manual_seed(0)
    network, states = Network(), torch.randn(32, 8)
    called = wrap(network.to(device))
    with torch.autocast(torch.device(device).type, dtype or torch.bfloat16, enabled=dtype is not None):
        output = called(states.to(device))
    output.float().square().sum().backward()
    assert network.first.weight.grad is not None
    return network.first.weight.grad.cpu().double()


@pytest.mark.parametrize(
    "wrapped",
    ["plain", pytest.param("compiled", marks=pytest.mark.filterwarnings("ignore")), "bfloat16", "float16"],
)
def test_regularize(wrapped: str) -> None:
    if wrapped == "compiled" and DEVICE == "cpu":
        pytest.skip("needs a compiler")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(wrapped)
    expected = regularized("cpu", lambda module: module, None)
    found = regularized(DEVICE, torch.compile if wrapped == "compiled" else lambda module: module, dtype)  # type: ignore[reportArgumentType]
    assert (found - expected).norm() <= (1e-5 if dtype is None else 0.03) * expected.norm()


def settings(**changes: Any) -> TrainConfig:
    return override(make_config("sphere", device=DEVICE), {"spectrum_every": 32, "eval_every": 64} | changes)


def trained(path: Path, config: TrainConfig, rows: int | None = None) -> RunFolder:
    """A run; with ``rows``, one that is stopped after so many lines and resumed."""
    with RunFolder(path) as folder:
        try:
            protocol.start(config, folder, lambda step: [] if rows is None else [StopAfter(rows)])
        except Stopped:
            pass
        else:
            assert rows is None, "it has ended before it was to be stopped"
    if rows is not None:
        with RunFolder.existing(path) as folder:
            protocol.resume(folder, lambda step: [])
    return RunFolder.existing(path)


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": ("redo",)}, {"method": ("c_chain",)}, {"normalize_rewards": True, "normalize_observations": True}],
)
def test_a_stopped_run_ends_where_the_other_does(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole = trained(tmp_path / "whole", settings(**changes))
    parts = trained(tmp_path / "parts", settings(**changes), rows=4)
    states = torch.randn(8, 3).numpy()
    ours, others = (sp.load_policy(folder.path, device=DEVICE) for folder in (whole, parts))
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(
            others.state_dict()[name], tensor, rtol=0, atol=0, msg=lambda m, of=name: f"{of}: {m}"
        )
    here = sp.load_policy(whole.path)
    assert next(here.parameters()).device.type == "cpu"
    np.testing.assert_allclose(here(states), ours(states), rtol=1e-4, atol=1e-5)
    rows = whole.read("spectrum")
    assert rows
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
