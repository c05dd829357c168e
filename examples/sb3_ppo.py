"""SPHERE in Stable-Baselines3: PPO stays as it is, the policy is a mixture of experts, a callback logs its plasticity.

python examples/sb3_ppo.py --steps 8192       # needs stable-baselines3: pip install 'sphere-rl[sb3]'
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3 import PPO

from sphere_rl.integrations.sb3 import MoEPolicy, PlasticityCallback

EXPERTS, WIDTH = 4, 32


class Ranks(PlasticityCallback):
    """Keeps every measurement of r_e(A) beside what SB3's logger gets."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[float] = []

    def _on_rollout_start(self) -> None:
        super()._on_rollout_start()
        if self.last:
            self.ranks.append(self.last["r_e_A"])


def train(rho: float, steps: int) -> list[float]:
    """r_e(A) after the update of each rollout but the last."""
    net_arch = {"pi": [WIDTH], "vf": [64, 64]}
    policy: dict[str, Any] = {"num_experts": EXPERTS, "top_k": 2, "sphere_rho": rho, "net_arch": net_arch}
    options: dict[str, Any] = {"n_steps": 1024, "batch_size": 128, "n_epochs": 5, "seed": 0, "device": "cpu"}
    callback = Ranks()
    PPO(MoEPolicy, "Pendulum-v1", policy_kwargs=policy, **options).learn(steps, callback=callback)
    return callback.ranks


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
