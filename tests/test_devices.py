"""Everything is made on the device of what it is used with.

Here PyTorch's default device is ``meta``, whose tensors hold no numbers: one that is made without saying where cannot
be computed with beside the agent's, just as one on the CPU cannot beside a GPU's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance.agents import SHORT, agent_or_refusal, make_config, rollout, spaces

import sphere_rl as sp
from sphere_rl import cli, protocol
from sphere_rl.experts.network import KINDS, make_actor
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder
from sphere_rl.spectrum import measure
from sphere_rl.spectrum.kernel import block_view, entk, estimate_entk_rank
from sphere_rl.training.ppo import update

CARTPOLE = "CartPole-v1"


@pytest.fixture
def elsewhere() -> torch.device:
    """The default device, where nothing of an agent is."""
    for task in (SHORT, CARTPOLE):  # made once, and kept
        rollout(3, task)
        spaces(task)
    return torch.device("meta")


@pytest.mark.parametrize("task", [SHORT, CARTPOLE])
@pytest.mark.parametrize("method", sorted(methods()))
def test_an_iteration_of_every_method(method: str, task: str, elsewhere: torch.device) -> None:
    config = make_config(method, tasks=[task], minibatch_size=8)
    agent = agent_or_refusal(config, task=task)
    with elsewhere:
        update(agent, rollout(3, task), config)
    assert all(parameter.device.type == "cpu" for parameter in agent.actor_parameters)


@pytest.mark.parametrize("actor", sorted(KINDS))
def test_measurements(actor: str, elsewhere: torch.device) -> None:
    network = make_actor(actor, 3, 1, width=16, depth=2, num_experts=3)
    states = torch.randn(12, 3)
    with elsewhere:
        found = measure(network, states)
        kernel = entk(network, states)
        by_products = entk(torch.nn.Sequential(network, torch.nn.Tanh()), states, outputs="sum")
        estimate = estimate_entk_rank(network, states, probes=4, deflated=2)
        blocks = block_view(network, states)
    assert kernel.device.type == by_products.device.type == "cpu"
    assert found["r_e_K"] == pytest.approx(sp.effective_rank(torch.linalg.eigvalsh(kernel.double())), rel=1e-5)
    assert estimate.value > 0
    assert blocks


@pytest.mark.parametrize("method", ["sphere", "spectral_norm", "shrink_perturb"])
def test_a_whole_run(tmp_path: Path, method: str, elsewhere: torch.device) -> None:
    """Normalisers, evaluations, measurements on probe states, and tasks that begin with new weights."""
    own = {"normalize_observations": True, "normalize_rewards": True, "spectrum_every": 32, "eval_every": 32}
    with elsewhere:
        with RunFolder(tmp_path) as folder:
            protocol.start(make_config(method, **own), folder, lambda step: [])
        policy = sp.load_policy(tmp_path)
        acted = policy(torch.zeros(1, 3, device="cpu"))
    assert acted.isfinite().all()
    assert RunFolder.existing(tmp_path).status()["state"] == "finished"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what a machine without a GPU does")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu", "banana", "mps", "meta", ""])
def test_training_on_one_that_is_not_there_writes_nothing(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", "--suite", "gym", "--tasks", CARTPOLE, f"--device={device}", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sphere: device: {device!r} is not allowed; expected one of cpu")
    assert not out.exists()
