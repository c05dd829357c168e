"""PPO in one file with a mixture-of-experts actor and SPHERE, on a pendulum whose gravity changes halfway.

    python examples/cleanrl_style.py --steps 16384            # --rho 0 switches SPHERE off

Built like the single-file scripts that many projects start from: everything is in sight. The actor is this library's;
the lines that matter are marked. Here the strength is set by gradient norms, as in `--sphere.mode grad`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

import sphere_rl as sp

ENVS, LENGTH, MINIBATCH, EPOCHS = 8, 128, 128, 4
GAMMA, LAMBDA, CLIP = 0.95, 0.95, 0.2
GRAVITIES = (10.0, 3.0)


def make_envs(gravity: float) -> SyncVectorEnv:
    makers = [lambda: gymnasium.make("Pendulum-v1", g=gravity)] * ENVS
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


def advantages(reward: Tensor, value: Tensor, following: Tensor, done: Tensor) -> Tensor:
    """Generalised advantage estimates [T, B]; Pendulum only truncates, so the last value always counts."""
    result, running = torch.zeros_like(reward), torch.zeros(ENVS)
    for t in reversed(range(LENGTH)):
        delta = reward[t] + GAMMA * following[t] - value[t]
        running = delta + GAMMA * LAMBDA * (1 - done[t]) * running
        result[t] = running
    return result


def collect(envs: SyncVectorEnv, observation: np.ndarray, actor: Any, critic: nn.Module, generator: torch.Generator):
    """One rollout: observation, action, log π, advantage and value target, flat, and the next observation."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("x", "a", "logp", "r", "v", "next", "done")}
    for _ in range(LENGTH):
        x = torch.as_tensor(observation, dtype=torch.float32)
        mean = actor(x)
        action = actor.head.sample(mean, generator)
        observation, reward, terminated, truncated, info = envs.step(action.clamp(-1, 1).numpy() * 2)
        done, last = terminated | truncated, observation.copy()
        for i in np.flatnonzero(done):
            last[i] = info["final_obs"][i]  # the reset observation is no successor of this step
        row = (x, action, actor.head.log_prob(mean, action), torch.tensor(reward / 8, dtype=torch.float32))
        row += (critic(x).squeeze(1), critic(torch.as_tensor(last, dtype=torch.float32)).squeeze(1))
        for column, item in zip(columns.values(), (*row, torch.tensor(done, dtype=torch.float32)), strict=True):
            column.append(item)
    x, action, log_prob, reward, value, following, done = map(torch.stack, columns.values())
    advantage = advantages(reward, value, following, done)
    flat = (x, action, log_prob, advantage, advantage + value)
    return [column.flatten(0, 1) for column in flat], observation, float(8 * reward.mean())


def update_actor(actor: Any, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor], rho: float) -> None:
    x, action, old_log_prob, advantage, _ = batch
    trace = actor.trace(x)
    ratio = (actor.head.log_prob(trace.output, action) - old_log_prob).exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()

    parameters = list(actor.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    penalty = trace.features[-1].sphere_penalty()  # 1: equals sp.sphere_penalty(trace.features[-1].weighted())
    own = torch.autograd.grad(penalty, parameters, materialize_grads=True)  # 2
    scale = rho * norm(gradients) / (norm(own) + 1e-8)  # 3
    for parameter, gradient, extra in zip(parameters, gradients, own, strict=True):
        parameter.grad = gradient + scale * extra
    nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()


def norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


def update_critic(critic: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor]) -> None:
    loss = (critic(batch[0]).squeeze(1) - batch[4]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(critic.parameters(), 0.5)
    optimizer.step()


def train(rho: float, steps: int, seed: int = 0) -> list[tuple[float, float, float, float]]:
    """One agent through both gravities: (gravity, mean reward a step, r_e(K), r_e(A)) at the end of each."""
    generator = torch.Generator().manual_seed(seed)
    actor: Any = sp.make_actor("topk_moe", 3, 1, seed=seed, width=32, depth=2, num_experts=4, top_k=2)
    torch.manual_seed(seed)
    critic = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3, eps=1e-5)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, eps=1e-5)
    rows = []
    for gravity in GRAVITIES:
        envs = make_envs(gravity)
        observation, reward, batch = envs.reset(seed=seed)[0], 0.0, []
        for _ in range(max(1, steps // len(GRAVITIES) // (ENVS * LENGTH))):
            with torch.no_grad():
                batch, observation, reward = collect(envs, observation, actor, critic, generator)
            for _ in range(EPOCHS):
                for index in torch.randperm(ENVS * LENGTH, generator=generator).split(MINIBATCH):
                    minibatch = [column[index] for column in batch]
                    update_actor(actor, actor_optimizer, minibatch, rho)
                    update_critic(critic, critic_optimizer, minibatch)
        envs.close()
        probe = batch[0][:128]
        kernel_rank = sp.effective_rank(torch.linalg.eigvalsh(sp.entk(actor, probe).double()))
        rows.append((gravity, reward, kernel_rank, sp.gram_effective_rank(actor.trace(probe).features[-1].weighted())))
    return rows


def main(words: Sequence[str] | None = None) -> list[tuple[float, float, float, float]]:
    """Train one agent on both gravities."""
    options = argparse.ArgumentParser(description=main.__doc__)
    options.add_argument("--steps", type=int, default=16_384, help="environment steps, both tasks together")
    options.add_argument("--rho", type=float, default=0.1, help="length of SPHERE's gradient relative to PPO's")
    given = options.parse_args(words)
    rows = train(given.rho, given.steps)
    for gravity, reward, kernel_rank, feature_rank in rows:
        print(
            f"gravity {gravity:<5g} reward a step {reward:6.2f}  r_e(K) {kernel_rank:5.2f}  r_e(A) {feature_rank:5.2f}"
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
