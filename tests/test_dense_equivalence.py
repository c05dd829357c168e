"""Computing only the selected experts changes nothing: a whole PPO iteration beside one that computes all of them."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sphere_rl.config import TrainConfig, override
from sphere_rl.experts.layers import ExpertMLP, ExpertOutput, RoutedFeatures
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.rollout import Rollout
from sphere_rl.penalty import Scale, sphere_penalty
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import update

T, B, D, A = 4, 32, 6, 3


@dataclass(frozen=True)
class DenseFeatures(RoutedFeatures):
    """Features that hold every expert's activations of every sample [N, E, H], with the penalty from Φ itself."""

    every: torch.Tensor

    def sphere_penalty(self, scale: Scale = "literal") -> torch.Tensor:
        return sphere_penalty((self.routing.weights[:, :, None] * self.every).flatten(1), scale)


class DenseExperts(nn.Module):
    """All experts on all samples, out = Σ_e g_e · expert_e(x), sharing the weights of an `ExpertMLP`."""

    def __init__(self, experts: ExpertMLP) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x, routing):
        p = dict(self.experts.named_parameters())
        h, features = x[:, None].expand(-1, routing.num_experts, -1), []
        for i in range(len(self.experts.hidden)):
            z = torch.einsum("eoi,nei->neo", p[f"hidden.{i}.weight"], h) + p[f"hidden.{i}.bias"]
            h = F.relu(z)
            selected = h[routing.sample, routing.expert]
            features.append(DenseFeatures(selected, routing, h))
        y = torch.einsum("eoi,nei->neo", p["head.weight"], h) + p["head.bias"]
        return ExpertOutput(
            (routing.weights[:, :, None] * y).sum(1), y[routing.sample, routing.expert], tuple(features)
        )


def rollout(dtype: torch.dtype) -> Rollout:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(T, B, *shape, generator=generator, dtype=torch.float64).to(dtype)

    done = draw() > 1
    return Rollout(
        observation=draw(D) + torch.linspace(-2, 2, D, dtype=dtype),
        action=draw(A),
        policy=torch.cat((draw(A), 0 * draw(A)), -1),
        log_prob=draw() / 10 - 4,
        reward=draw(),
        value=draw(),
        next_value=draw(),
        terminated=done,
        done=done,
        episodes=[],
    )


def weights_after_an_iteration(dense: bool, dtype: torch.dtype, method: dict[str, object]) -> torch.Tensor:
    sizes = {"network.width": 16, "network.num_experts": 5}
    config = override(
        TrainConfig(), {"num_envs": B, "num_steps": T, "minibatch_size": 32, "num_epochs": 4} | sizes | method
    )
    agent = Agent(config, Spaces(D, A, discrete=False), seed=1)
    agent.actor.to(dtype)
    agent.critic.to(dtype)
    if dense:
        agent.actor.experts = DenseExperts(agent.actor.experts)  # type: ignore[assignment]
    start = nn.utils.parameters_to_vector(agent.actor_parameters).detach()
    update(agent, rollout(dtype), config)
    end = nn.utils.parameters_to_vector(agent.actor_parameters).detach()
    assert (end - start).abs().max() > 5e-4  # 25 times the widest tolerance below
    return end


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"method": ("sphere",), "sphere.mode": "loss"},
        {"method": ("sphere",), "sphere.mode": "grad", "learning_rate_schedule": "kl"},
    ],
    ids=["none", "loss", "grad"],
)
def test_weights_after_one_iteration(method: dict[str, object], dtype: torch.dtype, tolerance: float):
    torch.set_num_threads(1)
    sparse, dense = (weights_after_an_iteration(d, dtype, method) for d in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=tolerance)
