"""SPHERE in a plain PyTorch loop: a mixture of experts learns the dynamics of a pendulum whose gravity changes.

    python examples/plain_pytorch.py --steps 200

The mixture is ordinary PyTorch. The three lines that matter are marked; everything else is the loop they live in.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

import sphere_rl as sp

GRAVITIES = (10.0, 3.0, 15.0)
EXPERTS, TOP_K, WIDTH, BATCH = 4, 2, 32, 128


class MixtureOfExperts(nn.Module):
    """Σ_e g_e(x) · expert_e(x), g the softmax over the gate's top-k logits."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_dim, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(in_dim, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
            for _ in range(EXPERTS)
        )
        self.heads = nn.ModuleList(nn.Linear(WIDTH, out_dim) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output [N, A], last hidden features [N, E, H] and routing weights [N, E]."""
        logits = self.gate(x)
        top = logits.topk(TOP_K, dim=1)
        gates = torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1))
        features = torch.stack([expert(x) for expert in self.experts], dim=1)
        outputs = torch.stack([head(features[:, e]) for e, head in enumerate(self.heads)], dim=1)
        return (gates[:, :, None] * outputs).sum(1), features, gates


def transitions(gravity: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random actions in Pendulum: (observation, action) [N, 4] and the change of the observation [N, 3]."""
    env = gymnasium.make("Pendulum-v1", g=gravity)
    env.action_space.seed(seed)
    inputs, targets = [], []
    observation, _ = env.reset(seed=seed)
    for _ in range(count):
        action = env.action_space.sample()
        following, _, terminated, truncated, _ = env.step(action)
        inputs.append(np.concatenate([observation, action]))
        targets.append(following - observation)
        observation = env.reset()[0] if terminated or truncated else following
    env.close()
    return torch.tensor(np.array(inputs), dtype=torch.float32), torch.tensor(np.array(targets), dtype=torch.float32)


def train(rho: float, steps: int, seed: int = 0) -> list[tuple[float, float, float]]:
    """One model through all gravities: (gravity, error, r_e(A)) at the end of each."""
    torch.manual_seed(seed)
    model = MixtureOfExperts(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    rows = []
    for task, gravity in enumerate(GRAVITIES):
        inputs, targets = transitions(gravity, 800, seed=seed + task)
        for _ in range(steps):
            batch = torch.randint(len(inputs), (BATCH,))
            output, features, gates = model(inputs[batch])
            loss = (output - targets[batch]).square().mean()

            penalty = sp.sphere_penalty(sp.weighted_features(features, gates))  # 1
            strength = rho * loss.detach() / (penalty.detach() + 1e-8)  # 2: a share ρ of the loss
            loss = loss + strength * penalty  # 3

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            output, features, gates = model(inputs)
            error = float((output - targets).square().mean())
            rows.append((gravity, error, sp.gram_effective_rank(sp.weighted_features(features, gates))))
    return rows


def main(words: Sequence[str] | None = None) -> dict[float, list[tuple[float, float, float]]]:
    """Train without and with SPHERE and print both."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=200, help="gradient steps on each of the three tasks")
    options.add_argument("--rho", type=float, default=0.1, help="share of the loss that the penalty gets")
    given = options.parse_args(words)
    results = {rho: train(rho, given.steps) for rho in (0.0, given.rho)}
    for rho, rows in results.items():
        for gravity, error, rank in rows:
            print(f"rho {rho:<5g} gravity {gravity:<5g} error {error:.5f}  r_e(A) {rank:5.2f} of {EXPERTS * WIDTH}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
