"""Environment steps a second of whole training, presets cw10 and h1, beside Stable-Baselines3's PPO on the same envs.

    python benchmarks/train.py --suite cw10 --threads 1 2

An iteration is a rollout and all its epochs; learners take turns. Stable-Baselines3 trains MLPs of the same sizes
without experts, with the preset's numbers, and with minibatches of its default size. Rollouts are shortened where the
preset's are long: the work of a step stays the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measure import CLOCKS, interleaved, machine, markdown
from peer import make_ppo
from reference import Reference

from sphere_rl.config import TrainConfig, override, preset
from sphere_rl.kernels.threads import two_lanes
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import flatten
from sphere_rl.learner.rollout import Collector
from sphere_rl.runtime import tune_process
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import update

LEARNERS: dict[str, dict[str, object]] = {
    "dense": {"actor": "dense"},
    "topk_moe": {"actor": "topk_moe"},
    "topk_moe + sphere loss": {"actor": "topk_moe", "method": ("sphere",), "sphere.mode": "loss"},
    "topk_moe + sphere grad": {"actor": "topk_moe", "method": ("sphere",), "sphere.mode": "grad"},
}
LONGEST_ROLLOUT = 256
SB3_MINIBATCH = 64


def make_envs(config: TrainConfig, threads: int) -> Any:
    return make_suite(config.suite).make(config.task_sequence[0], config.num_envs, 0, threads)


def own(config: TrainConfig, threads: int) -> Callable[[], None]:
    """One iteration of this package."""
    envs = make_envs(config, threads)
    agent = Agent(config, Spaces.of(envs), seed=0)
    collector = Collector(envs, agent.normalizer, agent.device)

    def iteration() -> None:
        torch.set_num_threads(threads)
        with two_lanes(threads):
            update(agent, collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator), config)

    return iteration


def plain(config: TrainConfig, threads: int) -> Callable[[], None]:
    """One iteration in plain PyTorch, all experts, as the authors' public code trains.

    Rollouts are this package's, and their rewards stand for advantages.
    """
    envs = make_envs(config, threads)
    agent = Agent(config, Spaces.of(envs), seed=0)
    collector, learner = Collector(envs, agent.normalizer, agent.device), Reference(agent.actor)

    def iteration() -> None:
        torch.set_num_threads(threads)
        rollout = collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator)
        batch = flatten(rollout, rollout.reward)
        for _ in range(config.num_epochs):
            for index in torch.randperm(len(batch)).split(config.minibatch_size):
                learner.minibatch(batch[index], sphere=True)

    return iteration


def peer(config: TrainConfig, threads: int, **changes: Any) -> Callable[[], None]:
    """One iteration of Stable-Baselines3."""
    model = make_ppo(config, make_envs(config, threads), **changes)

    def iteration() -> None:
        torch.set_num_threads(threads)
        model.learn(config.steps_per_iteration, reset_num_timesteps=False)

    return iteration


def measure(suite: str, threads: int, repeats: int, clock: str) -> str:
    config = preset(make_suite(suite))
    config = replace(config, num_steps=min(config.num_steps, LONGEST_ROLLOUT))
    iterations = {name: own(override(config, changes), threads) for name, changes in LEARNERS.items()}
    iterations["plain PyTorch + sphere grad"] = plain(override(config, LEARNERS["topk_moe"]), threads)
    iterations["sb3 dense"] = peer(config, threads)
    if config.minibatch_size != SB3_MINIBATCH:
        iterations[f"sb3 dense, its default minibatch {SB3_MINIBATCH}"] = peer(
            config, threads, batch_size=SB3_MINIBATCH
        )
    times = interleaved(iterations, repeats, 1, clock, warmup=1)
    rates = {name: config.steps_per_iteration / ms * 1e3 for name, ms in times.items()}
    rows = [(name, f"{rate:.0f}", f"{rate / rates['sb3 dense']:.2f}×") for name, rate in rates.items()]
    title = f"{suite}, {config.task_sequence[0]}, {config.num_envs} environments, minibatch {config.minibatch_size}"
    return f"{title}, {threads} threads\n\n{markdown(('learner', 'env steps/s', 'beside sb3 dense'), rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", nargs="+", default=["cw10", "h1"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    tune_process(max(given.threads))
    print(f"{machine()}\n")
    for suite in given.suite:
        for threads in given.threads:
            print(measure(suite, threads, given.repeats, given.clock))


if __name__ == "__main__":
    main()
