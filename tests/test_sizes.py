"""What a configuration takes is that of the agent that is made of it."""

from __future__ import annotations

import pytest
import torch

from sphere_rl.config import TrainConfig, override
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.training.agent import Agent
from sphere_rl.training.sizes import parameters


@pytest.mark.parametrize("methods", [["none"], ["crelu"], ["layernorm", "spectral_norm"], ["nap"]], ids=str)
@pytest.mark.parametrize("branches", [(), (2, 3)])
def test_parameters_are_those_that_an_agent_has(methods: list[str], branches: tuple[int, ...]) -> None:
    config = override(
        TrainConfig(), {"method": methods, "network": {"width": 8, "num_experts": 3}, "critic": "topk_moe"}
    )
    spaces, before = Spaces(4, 5, bool(branches), branches), torch.get_rng_state()
    agent = Agent(config, spaces, seed=0)
    made = sum(p.numel() for p in (*agent.actor_parameters, *agent.critic_parameters))
    assert parameters(config, spaces) == made
    assert torch.equal(torch.get_rng_state(), before)
