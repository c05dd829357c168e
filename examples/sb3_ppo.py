"""SPHERE in Stable-Baselines3's PPO: a policy class with a mixture of experts; PPO itself stays as it is.

    python examples/sb3_ppo.py --steps 8192       # needs stable-baselines3

The weighted features φ = [g_1 h_1 ‖ … ‖ g_E h_E] are the actor's latent vector, so SB3's own linear action layer is the
experts' output layer: W φ = Σ_e g_e W_e h_e. The penalty's gradient joins PPO's where the backward pass reaches φ, with
ρ times its length there. So nothing of PPO is overridden, and clipping and Adam see the sum, as they should.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

import sphere_rl as sp
from sphere_rl.experts import ExpertMLP, top_k_routing

EXPERTS, TOP_K, WIDTH = 4, 2, 32


class SphereExtractor(nn.Module):
    """SB3's place for the hidden layers: φ for the actor, an MLP for the critic."""

    def __init__(self, in_dim: int, rho: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rho, self.latent_dim_pi, self.latent_dim_vf = rho, EXPERTS * WIDTH, 64
        self.gate = nn.Linear(in_dim, EXPERTS)
        self.experts = ExpertMLP(in_dim, (WIDTH,), WIDTH, EXPERTS, generator=generator)
        self.value = nn.Sequential(nn.Linear(in_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        phi = self.weighted(features)
        if phi.requires_grad and self.rho:  # SB3 collects rollouts without gradients, so this is its training pass
            phi.register_hook(lambda gradient: gradient + self.sphere_gradient(phi, gradient))
        return phi

    def forward_critic(self, features: Tensor) -> Tensor:
        return self.value(features)

    def weighted(self, x: Tensor) -> Tensor:
        """φ [N, E·H]."""
        return self.experts(x, top_k_routing(self.gate(x), TOP_K)).features[-1].weighted()

    def sphere_gradient(self, phi: Tensor, gradient: Tensor) -> Tensor:
        """∂ penalty / ∂φ, with ρ times the length of PPO's gradient."""
        leaf = phi.detach().requires_grad_()
        with torch.enable_grad():
            (own,) = torch.autograd.grad(sp.sphere_penalty(leaf), leaf)
        return self.rho * gradient.norm() / (own.norm() + 1e-8) * own


class SpherePolicy(ActorCriticPolicy):
    """SB3's actor-critic policy with that extractor; ``policy_kwargs={"rho": ...}``."""

    def __init__(self, *args: Any, rho: float = 0.1, **kwargs: Any) -> None:
        self.rho = rho
        super().__init__(*args, ortho_init=False, **kwargs)

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor: Any = SphereExtractor(self.features_dim, self.rho)


class RankLogger(BaseCallback):
    """r_e(A) on each rollout's states."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        states = torch.as_tensor(model.rollout_buffer.observations).flatten(0, 1)
        with torch.no_grad():
            self.ranks.append(sp.gram_effective_rank(model.policy.mlp_extractor.weighted(states)))
        self.logger.record("train/r_e_A", self.ranks[-1])


def train(rho: float, steps: int) -> list[float]:
    """r_e(A) at the end of each rollout."""
    logger = RankLogger()
    options: dict[str, Any] = {"n_steps": 1024, "batch_size": 128, "n_epochs": 5, "seed": 0, "device": "cpu"}
    model = PPO(SpherePolicy, "Pendulum-v1", policy_kwargs={"rho": rho}, **options)
    model.learn(steps, callback=logger)
    return logger.ranks


def main(words: Sequence[str] | None = None) -> dict[float, list[float]]:
    """Train without and with SPHERE and print the effective rank of the weighted features."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=8_192, help="environment steps of each of the two agents")
    options.add_argument("--rho", type=float, default=0.1, help="length of SPHERE's gradient at φ relative to PPO's")
    given = options.parse_args(words)
    results = {rho: train(rho, given.steps) for rho in (0.0, given.rho)}
    for rho, ranks in results.items():
        print(f"rho {rho:<5g} r_e(A) by rollout: {'  '.join(f'{rank:.2f}' for rank in ranks)} of {EXPERTS * WIDTH}")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
