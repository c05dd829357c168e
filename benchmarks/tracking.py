"""The share of a run that spectral tracking takes at its default rate, twenty measurements a task.

    python benchmarks/tracking.py [--suite h1] [--method sphere]

Processor time of one thread, so that a busy machine does not bend the share. Iterations with a shorter rollout and the
measurements after them take turns; an iteration's time is proportional to its environment steps, which scales it to the
preset's task. Evaluations and checkpoints would make the share smaller and are left out.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from measure import machine, markdown

from sphere_rl.config import TrainConfig, override, preset
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.rollout import Collector
from sphere_rl.runtime import threads, tune_process
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent
from sphere_rl.training.ppo import update
from sphere_rl.training.tracker import PER_TASK, Tracker

WANTED = 0.02


def seconds(config: TrainConfig, turns: int) -> tuple[float, float]:
    """Medians of an iteration's and of a measurement's processor time; the first turn warms up."""
    task = config.task_sequence[0]
    envs = make_suite(config.suite).make(task, config.num_envs, 0, threads(config.env_threads))
    agent, tracker = Agent(config, Spaces.of(envs), seed=0), Tracker(config)
    collector = Collector(envs, agent.normalizer, agent.device)
    iterations, measurements = [], []
    for _ in range(turns + 1):
        start = time.process_time()
        tracker.begin_iteration(agent, 0)
        copied = time.process_time()
        rollout = collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator)
        update(agent, rollout, config)
        trained = time.process_time()
        rows = list(tracker.measurements(agent, rollout, task))
        measured = time.process_time()
        assert len(rows) == 2
        iterations.append(trained - copied)
        measurements.append(measured - trained + copied - start)
    envs.close()
    return median(iterations[1:]), median(measurements[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="cw10")
    parser.add_argument("--method", nargs="+", default=["none"])
    parser.add_argument("--shorter", type=int, default=8, help="divides the steps of a rollout")
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    tune_process(1)
    full = override(preset(make_suite(given.suite)), {"method": tuple(given.method)})
    config = override(full, {"num_steps": max(1, full.num_steps // given.shorter), "spectrum_every": 1})
    iteration, measurement = seconds(config, given.turns)
    training = iteration / config.steps_per_iteration * full.steps_per_task
    share = PER_TASK * measurement / (training + PER_TASK * measurement)
    print(f"{machine()}\n")
    print(f"{given.suite}, {config.actor}, {'+'.join(config.method)}: {full.steps_per_task:,} steps a task\n")
    rows = [
        ("training", f"{config.steps_per_iteration / iteration:.0f} steps/s", f"{training:.0f}"),
        ("tracking, both batches", f"{PER_TASK} × {measurement:.2f} s", f"{PER_TASK * measurement:.0f}"),
    ]
    print(markdown(("part", "processor time", "seconds a task"), rows))
    print(f"\ntracking takes {share:.2%} of a run (wanted: under {WANTED:.0%})")


if __name__ == "__main__":
    main()
