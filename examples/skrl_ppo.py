"""SPHERE in skrl's PPO: one line in the policy's `compute`; agent, memory and trainer stay as they are.

python examples/skrl_ppo.py --steps 4096          # needs skrl
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from skrl.agents.torch.ppo import PPO
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer
from torch import Tensor, nn

import sphere_rl as sp

ENVS, LENGTH = 4, 128
EXPERTS, TOP_K, WIDTH = 4, 2, 32


class Policy(GaussianMixin, Model):
    """A mixture of experts in plain PyTorch."""

    def __init__(self, rho: float, **spaces: Any) -> None:
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self)
        inputs = self.num_observations
        self.rho = rho
        self.gate = nn.Linear(inputs, EXPERTS)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(inputs, WIDTH), nn.Tanh()) for _ in range(EXPERTS))
        self.heads = nn.Parameter(torch.randn(EXPERTS, WIDTH, self.num_actions) * 0.01)
        self.log_std = nn.Parameter(torch.zeros(self.num_actions))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, E, H] and routing weights [N, E]."""
        logits = self.gate(x)
        top = logits.topk(TOP_K)
        gates = torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1))
        return torch.stack([expert(x) for expert in self.experts], 1), gates

    def compute(self, inputs: Any, role: str = "") -> Any:  # type: ignore[override]
        features, gates = self.parts(inputs["observations"])
        features, gates = sp.regularize(features, gates, rho=self.rho)  # this line
        return torch.einsum("ne,neh,eha->na", gates, features, self.heads), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    def __init__(self, **spaces: Any) -> None:
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 64), nn.Tanh(), nn.Linear(64, 1))

    def compute(self, inputs: Any, role: str = "") -> Any:  # type: ignore[override]
        return self.net(inputs["observations"]), {}


def train(rho: float, steps: int) -> tuple[float, float]:
    """r_e(A) on the last rollout's states, before and after training."""
    torch.manual_seed(0)
    makers = [lambda: gymnasium.make("Pendulum-v1")] * ENVS
    env: Any = wrap_env(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP))
    spaces: dict[str, Any] = {"observation_space": env.observation_space, "action_space": env.action_space}
    spaces["device"] = env.device
    models = {"policy": Policy(rho, **spaces), "value": Value(**spaces)}
    memory = RandomMemory(memory_size=LENGTH, num_envs=ENVS, device=env.device)
    quiet = {"write_interval": 0, "checkpoint_interval": 0}
    settings = {"rollouts": LENGTH, "learning_epochs": 5, "mini_batches": 4, "experiment": quiet}
    agent = PPO(models=models, memory=memory, cfg=settings, **spaces)
    before = [parameter.clone() for parameter in models["policy"].parameters()]
    cfg = {
        "timesteps": steps // ENVS,
        "headless": True,
        "disable_progressbar": True,
        "close_environment_at_exit": False,
    }
    SequentialTrainer(env=env, agents=agent, cfg=cfg).train()
    env.close()
    policy, states = models["policy"], memory.get_tensor_by_name("observations").flatten(0, 1)
    after = [parameter.clone() for parameter in policy.parameters()]
    ranks = []
    with torch.no_grad():
        for weights in (before, after):
            for parameter, weight in zip(policy.parameters(), weights, strict=True):
                parameter.copy_(weight)
            ranks.append(sp.gram_effective_rank(sp.weighted_features(*policy.parts(states))))
    return ranks[0], ranks[1]


def main(words: Sequence[str] | None = None) -> dict[float, tuple[float, float]]:
    """Train without and with SPHERE and print the effective rank of the weighted features."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=4_096, help="environment steps of each of the two agents")
    options.add_argument("--rho", type=float, default=0.1, help="share of the gradient at features and routing weights")
    given = options.parse_args(words)
    results = {rho: train(rho, given.steps) for rho in (0.0, given.rho)}
    for rho, (first, last) in results.items():
        print(f"rho {rho:<5g} r_e(A) before {first:.2f}, after {last:.2f} of {EXPERTS * WIDTH}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
