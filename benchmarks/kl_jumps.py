"""What makes single updates jump when observations are normalised? The worst minibatch, sample by sample.

    python benchmarks/kl_jumps.py --task hammer --iterations 3 --clips 10 3

Trains the mixture, the dense actor and Stable-Baselines3's PPO on the same normalised MetaWorld environments with the
CW10 preset, and prints a line an iteration: KL(policy that collected the rollout ‖ policy after the update) over all
samples, its median, the share of it that samples with a clipped input carry, and the squared length of the inputs of
the hundredth with the largest KL beside that of the median sample. Of the mixture's and the dense actor's worst
minibatch it prints the samples that made it: KL, log of the probability ratio, advantage, length and clipped
dimensions of the input, and the experts that the gate selected before and after.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from sphere_rl.config import TrainConfig, override
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import Minibatch, flatten
from sphere_rl.learner.rollout import Collector, gae
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent
from sphere_rl.training.step import STATISTICS, minibatch_steps

SHOWN = 6


@dataclass(frozen=True)
class Drift:
    """How far an update took the policy, for each sample of its rollout: KL and input."""

    kl: Tensor
    observation: Tensor
    clip: float

    def line(self) -> str:
        clipped = (self.observation.abs() >= 0.99 * self.clip).any(1)
        length, far = self.observation.square().sum(1), self.kl.topk(max(1, len(self.kl) // 100)).indices
        return (
            f"mean {self.kl.mean():8.4f}  median {self.kl.median():7.4f}  "
            f"clipped samples {clipped.float().mean():6.1%}, of the KL {self.kl[clipped].sum() / self.kl.sum():6.1%}  "
            f"|x|^2 {length[far].median():6.0f} (all: {length.median():4.0f})"
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--task", default="hammer")
    options.add_argument("--iterations", type=int, default=3)
    options.add_argument("--clips", type=float, nargs="+", default=[10.0, 3.0])
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    torch.set_num_threads(1)
    for clip in given.clips:
        changes = {"normalize_observations": True, "observation_clip": clip, "protocol": "rl", "tasks": [given.task]}
        for actor in ("topk_moe", "dense"):
            print(f"\n{actor}, clip {clip:g}")
            train_own(override(TrainConfig(), changes | {"actor": actor}), given.iterations, given.seed)
        print(f"\nStable-Baselines3, clip {clip:g}")
        train_peer(override(TrainConfig(), changes), given.iterations, given.seed)


def train_own(config: TrainConfig, iterations: int, seed: int) -> None:
    envs = make_suite(config.suite).make(config.tasks[0], config.num_envs, seed, 1)
    agent = Agent(config, Spaces.of(envs), seed)
    collector, worst = Collector(envs, agent.normalizer, agent.device), (0.0, "")
    for iteration in range(1, iterations + 1):
        rollout = collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator)
        advantage = gae(
            rollout.reward, rollout.value, rollout.next_value, rollout.terminated, rollout.done,
            config.gamma, config.gae_lambda,
        )  # fmt: skip
        batch = flatten(rollout, advantage)
        before = agent.actor.selection(batch.observation)
        for epoch in range(config.num_epochs):
            for index in torch.randperm(len(batch), generator=agent.generator).split(config.minibatch_size):
                (statistics,) = minibatch_steps(agent, batch, [index], config)
                kl = float(statistics[STATISTICS.index("kl")])
                if kl > worst[0]:
                    head = f"worst minibatch: iteration {iteration}, epoch {epoch + 1}, KL {kl:.3f} before its step"
                    worst = kl, "\n".join([head, *samples(agent, batch, index, before, config.observation_clip)])
        drift = Drift(divergence(agent, batch), batch.observation, config.observation_clip)
        print(f"{iteration:3d}  {drift.line()}{flips(agent, batch, before)}")
    envs.close()
    print(worst[1])


@torch.no_grad()
def divergence(agent: Agent, batch: Minibatch) -> Tensor:
    output = torch.cat([agent.actor(rows) for rows in batch.observation.split(4096)])
    return agent.actor.head.kl(batch.policy, output)


def flips(agent: Agent, batch: Minibatch, before: Tensor | None) -> str:
    after = agent.actor.selection(batch.observation)
    if before is None or after is None:
        return ""
    return f"  flipped routings {(before != after).any(1).float().mean():6.1%}"


@torch.no_grad()
def samples(agent: Agent, batch: Minibatch, index: Tensor, before: Tensor | None, clip: float) -> list[str]:
    """A line for each of the samples of a minibatch that the policy moved most on."""
    part, output = batch[index], agent.actor(batch.observation[index])
    kl = agent.actor.head.kl(part.policy, output)
    ratio = agent.actor.head.log_prob(output, part.action) - part.log_prob
    advantage = (part.advantage - part.advantage.mean()) / part.advantage.std()
    after, lines = agent.actor.selection(part.observation), []
    for i in kl.topk(SHOWN).indices.tolist():
        dims = (part.observation[i].abs() >= 0.99 * clip).nonzero().flatten().tolist()
        experts = "" if before is None or after is None else f"  experts {before[index[i]].tolist()}"
        if before is not None and after is not None and not torch.equal(before[index[i]], after[i]):
            experts += f" -> {after[i].tolist()}"
        lines.append(
            f"     KL {kl[i]:8.2f}  log ratio {ratio[i]:8.1f}  advantage {advantage[i]:5.2f}  "
            f"|x|^2 {part.observation[i].square().sum():6.0f}  clipped {dims}{experts}"
        )
    return lines


class Follow(BaseCallback):
    """Compares the policy after each update with the one that collected the rollout."""

    def __init__(self, clip: float) -> None:
        super().__init__()
        self.clip, self.iteration = clip, 0
        self.rollout: tuple[Tensor, Tensor, Tensor] | None = None

    def parameters_of(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            normal = self.model.policy.get_distribution(observation).distribution  # type: ignore[attr-defined]
        return normal.mean, normal.stddev

    def _on_rollout_end(self) -> None:
        rows = self.model.rollout_buffer.observations  # type: ignore[attr-defined]
        observation = torch.as_tensor(np.asarray(rows).reshape(-1, rows.shape[-1]))
        self.rollout = (observation, *self.parameters_of(observation))

    def compare(self) -> None:
        if self.rollout is None:
            return
        observation, mean, sigma = self.rollout
        new, wide = self.parameters_of(observation)
        kl = ((wide / sigma).log() + (sigma**2 + (mean - new) ** 2) / (2 * wide**2) - 0.5).sum(1)
        self.iteration += 1
        print(f"{self.iteration:3d}  {Drift(kl, observation, self.clip).line()}")

    def _on_rollout_start(self) -> None:
        self.compare()

    def _on_step(self) -> bool:
        return True


def train_peer(config: TrainConfig, iterations: int, seed: int) -> None:
    from peer import make_ppo

    envs = make_suite(config.suite).make(config.tasks[0], config.num_envs, seed, 1)
    learner, follow = make_ppo(config, envs, seed), Follow(config.observation_clip)
    assert learner.env is not None
    learner.env = VecNormalize(learner.env, norm_reward=False, clip_obs=config.observation_clip)
    learner.learn(iterations * config.steps_per_iteration, callback=follow)
    follow.compare()
    envs.close()


if __name__ == "__main__":
    main()
