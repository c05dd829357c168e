"""Where the time of training goes: a table of an iteration, each part without the parts inside it, and one of a step.

python benchmarks/breakdown.py --suite cw10 --method sphere

The learner runs on one lane: on two, parts overlap. ``--threads`` are those of the environments. An epoch
without autograd is one call of TorchScript; what it does is PyTorch's profiler's account, which weighs small operations
too heavily.
(A file called profile.py would hide the standard library's from every script in this folder.)
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from measure import CLOCKS, machine, markdown

from sphere_rl.config import TrainConfig, override, preset
from sphere_rl.experts.layers import RoutedFeatures
from sphere_rl.learner import policy_step as direct
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.minibatch import flatten
from sphere_rl.learner.rollout import Collector, Rollout
from sphere_rl.runtime import threads, tune_process
from sphere_rl.suites import make_suite
from sphere_rl.training import ppo, step
from sphere_rl.training.agent import Agent


class Stopwatch:
    """Wraps functions in place; the time of a wrapped call is taken from the one around it."""

    def __init__(self, clock: str) -> None:
        self.now = CLOCKS[clock]
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.phase = ""
        self._inner = [0.0]

    def wrap(self, owner: Any, attribute: str, part: str) -> None:
        setattr(owner, attribute, self.timed(getattr(owner, attribute), part))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = self.now()
            result = function(*args, **kwargs)
            elapsed = self.now() - start
            inside = self._inner.pop()
            self._inner[-1] += elapsed
            self.seconds[f"{self.phase}: {part}"] += elapsed - inside
            self.calls[f"{self.phase}: {part}"] += 1
            return result

        return timed

    def reset(self) -> None:
        self.seconds.clear()
        self.calls.clear()


def instrument(watch: Stopwatch, agent: Agent, collector: Collector) -> None:
    watch.wrap(collector.envs, "step", "environments")
    watch.wrap(agent.actor, "forward", "actor forward")
    watch.wrap(agent.critic, "forward", "critic forward")
    watch.wrap(agent.actor, "trace", "actor forward with features")
    watch.wrap(agent.critic, "trace", "critic forward with features")
    watch.wrap(agent.actor.head, "sample", "sample actions")
    watch.wrap(torch.autograd, "grad", "backward")
    watch.wrap(ppo, "total_norm", "gradient norm")
    watch.wrap(RoutedFeatures, "sphere_penalty", "SPHERE penalty")
    watch.wrap(direct, "_improve_on", "steps of actor and critic, one call an epoch")
    for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
        watch.wrap(optimizer, "step", "Adam")
    for method in agent.methods:
        watch.wrap(method, "actor_gradients", "method's gradient rule")


def profile(config: TrainConfig, task: str, iterations: int, clock: str) -> str:
    envs = make_suite(config.suite).make(task, config.num_envs, 0, threads(config.env_threads))
    agent = Agent(config, Spaces.of(envs), seed=0)
    collector = Collector(envs, agent.normalizer, agent.device)
    watch = Stopwatch(clock)
    instrument(watch, agent, collector)
    train = watch.timed(ppo.update, "losses, minibatches, the rest")
    collect = watch.timed(collector.collect, "the rest")
    start, rollouts = 0.0, list[Rollout]()
    for iteration in range(iterations + 1):
        if iteration == 1:  # the first one warms up
            watch.reset()
            start = watch.now()
        watch.phase = "rollout"
        rollouts.append(collect(agent.actor, agent.critic, config.num_steps, agent.generator))
        watch.phase = "learner"
        train(agent, rollouts[-1], config)
    total = watch.now() - start
    envs.close()
    rows = [
        (part, watch.calls[part] // iterations, f"{1e3 * s / iterations:.0f}", f"{100 * s / total:.1f} %")
        for part, s in sorted(watch.seconds.items(), key=lambda item: -item[1])
    ]
    rate = iterations * config.steps_per_iteration / total
    title = f"{config.suite}, {task}, {config.actor}, {'+'.join(config.method)}: {rate:.0f} env steps/s"
    table = markdown(("part", "calls", "ms an iteration", "share"), rows)
    return f"{title}\n\n{table}\n\n{operations(agent, rollouts[-1], config)}\n"


def operations(agent: Agent, rollout: Rollout, config: TrainConfig, count: int = 16) -> str:
    """PyTorch's operations in as many minibatches, each without those inside it."""
    batch, order = flatten(rollout, rollout.reward), [torch.arange(config.minibatch_size)] * count
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step.minibatch_steps(agent, batch, order, config)
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    rows = [
        (event.key, f"{event.count / count:g}", f"{event.self_cpu_time_total / count:.0f}",
         f"{100 * event.self_cpu_time_total / total:.1f} %")
        for event in found[:12]
    ]  # fmt: skip
    return markdown(("operation in a minibatch", "calls", "µs", "share"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="cw10")
    parser.add_argument("--task", default="")
    parser.add_argument("--actor", default="topk_moe")
    parser.add_argument("--method", nargs="+", default=["sphere"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="steps of each environment in a rollout; 0: the preset's")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    tune_process(1)
    changes = {"actor": given.actor, "method": tuple(given.method), "env_threads": given.threads}
    config = override(preset(make_suite(given.suite)), changes | ({"num_steps": given.steps} if given.steps else {}))
    print(f"{machine()}\n")
    print(profile(config, given.task or config.task_sequence[0], given.iterations, given.clock))


if __name__ == "__main__":
    main()
