"""Training where there is no TorchScript, as on Python 3.14: the same weights, from plain loops and autograd."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.agents import make_agent, make_config, rollout

from sphere_rl.kernels.script import SCRIPTED
from sphere_rl.training.ppo import update

CASES: list[tuple[str, dict[str, Any]]] = [
    ("none", {"critic": "topk_moe"}),
    ("sphere", {"sphere.mode": "grad", "sphere.scale": "free"}),
    ("sphere", {"sphere.mode": "loss", "sphere.layers": "all"}),
    ("layernorm", {}),
    ("cbp", {"actor": "shared_moe"}),
]


def trained(method: str, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and statistics after an iteration in float64."""
    config = make_config(method, **options)
    agent = make_agent(config)
    statistics = update(agent, rollout(3), config)
    weights = torch.nn.utils.parameters_to_vector([*agent.actor_parameters, *agent.critic_parameters])
    return weights.detach(), torch.tensor(list(statistics.values()), dtype=torch.float64)


@pytest.mark.skipif(not SCRIPTED, reason="this is what there is no TorchScript for")
def test_weights_are_those_of_torchscript(tmp_path: Path) -> None:
    found = tmp_path / "found.pt"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTORCH_JIT": "0", "PYTHONPATH": path}
    subprocess.run([sys.executable, __file__, str(found)], env=environment, check=True)
    for (method, options), (weights, statistics) in zip(CASES, torch.load(found), strict=True):
        expected, told = trained(method, options)
        torch.testing.assert_close(weights, expected, rtol=0, atol=2e-5, msg=lambda m, of=method: f"{of}: {m}")
        torch.testing.assert_close(statistics, told, rtol=1e-3, atol=1e-5, msg=lambda m, of=method: f"{of}: {m}")


if __name__ == "__main__":
    assert not SCRIPTED
    torch.save([trained(*case) for case in CASES], sys.argv[1])
