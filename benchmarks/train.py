"""Environment steps a second of whole training, presets cw10 and h1, beside Stable-Baselines3's PPO on the same envs.

    python benchmarks/train.py --suite cw10 --threads 1 2

An iteration is a rollout and all its epochs; learners take turns. Stable-Baselines3 trains MLPs of the same sizes
without experts, with the preset's numbers. Rollouts are shortened where the preset's are long: the work of a step
stays the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from measure import CLOCKS, interleaved, machine, markdown
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv

from sphere_rl.agent import Agent, Spaces
from sphere_rl.config import TrainConfig, override, preset
from sphere_rl.ppo import update
from sphere_rl.rollout import Collector
from sphere_rl.runtime import tune_process
from sphere_rl.suites import make_suite

LEARNERS: dict[str, dict[str, object]] = {
    "dense": {"actor": "dense"},
    "topk_moe": {"actor": "topk_moe"},
    "topk_moe + sphere loss": {"actor": "topk_moe", "method": ("sphere",), "sphere.mode": "loss"},
    "topk_moe + sphere grad": {"actor": "topk_moe", "method": ("sphere",), "sphere.mode": "grad"},
}
LONGEST_ROLLOUT = 256


class Adapter(VecEnv):
    """A Gymnasium vector environment in same-step autoreset mode, as Stable-Baselines3 takes it."""

    def __init__(self, envs: Any) -> None:
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.envs = envs

    def reset(self) -> np.ndarray:
        return self.envs.reset()[0].astype(np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        observation, reward, terminated, truncated, info = self.envs.step(self.actions)
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in done]
        for i in np.flatnonzero(done):
            infos[i] = {"terminal_observation": info["final_obs"][i].astype(np.float32)}
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
        return observation.astype(np.float32), reward.astype(np.float32), done, infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def make_envs(config: TrainConfig, threads: int) -> Any:
    return make_suite(config.suite).make(config.task_sequence[0], config.num_envs, 0, threads)


def own(config: TrainConfig, threads: int) -> Callable[[], None]:
    """One iteration of this package."""
    envs = make_envs(config, threads)
    agent = Agent(config, Spaces.of(envs), seed=0)
    collector = Collector(envs, agent.normalizer, agent.device)

    def iteration() -> None:
        torch.set_num_threads(threads)
        update(agent, collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator), config)

    return iteration


def peer(config: TrainConfig, threads: int) -> Callable[[], None]:
    """One iteration of Stable-Baselines3."""
    architecture = {"net_arch": {"pi": [256] * 3, "vf": [256] * 3}, "activation_fn": torch.nn.ReLU}
    model = PPO(
        "MlpPolicy",
        Adapter(make_envs(config, threads)),
        n_steps=config.num_steps,
        batch_size=config.minibatch_size,
        n_epochs=config.num_epochs,
        policy_kwargs=architecture,
        device="cpu",
    )

    def iteration() -> None:
        torch.set_num_threads(threads)
        model.learn(config.steps_per_iteration, reset_num_timesteps=False)

    return iteration


def measure(suite: str, threads: int, repeats: int, clock: str) -> str:
    config = preset(make_suite(suite))
    config = replace(config, num_steps=min(config.num_steps, LONGEST_ROLLOUT))
    iterations = {name: own(override(config, changes), threads) for name, changes in LEARNERS.items()}
    iterations["sb3 dense"] = peer(config, threads)
    times = interleaved(iterations, repeats, 1, clock, warmup=1)
    rates = {name: config.steps_per_iteration / ms * 1e3 for name, ms in times.items()}
    rows = [(name, f"{rate:.0f}", f"{rate / rates['sb3 dense']:.2f}×") for name, rate in rates.items()]
    title = f"{suite}, {config.task_sequence[0]}, {config.num_envs} environments, minibatch {config.minibatch_size}"
    return f"{title}, {threads} threads\n\n{markdown(('learner', 'env steps/s', 'beside sb3 dense'), rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", nargs="+", default=["cw10", "h1"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    tune_process(max(given.threads))
    print(f"{machine()}\n")
    for suite in given.suite:
        for threads in given.threads:
            print(measure(suite, threads, given.repeats, given.clock))


if __name__ == "__main__":
    main()
