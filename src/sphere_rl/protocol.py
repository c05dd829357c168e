"""Reinforcement learning on a sequence of tasks: the only place that knows that tasks change.

``rl`` trains a fresh agent on each task, ``crl`` one agent through all: weights, optimisers and normaliser carry over,
the learning-rate schedule and the step counter start again at each task, and the agent is never told which task it is.

Training is cut into segments. EnvPool cannot save the state of its environments, so at every segment's start they are
made anew, from a seed that only (run seed, task, segment) decide, and at its end a checkpoint is written. A run that
was interrupted so continues bitwise as the run that was not. Environments that can save their state go on instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from sphere_rl import checkpoint
from sphere_rl.agent import Agent, Policy, Spaces
from sphere_rl.config import TrainConfig, from_dict, to_dict
from sphere_rl.errors import ConfigError, TrainingError
from sphere_rl.evaluation import evaluate, summarize
from sphere_rl.lanes import two_lanes
from sphere_rl.ppo import update
from sphere_rl.rollout import Collector, Rollout
from sphere_rl.runs import Logs, RunFolder
from sphere_rl.runtime import LaneChoice, threads, tune_process
from sphere_rl.seeding import derive_seed
from sphere_rl.suites import make_suite
from sphere_rl.tracking import Tracker


@runtime_checkable
class Monitor(Protocol):
    """Whoever watches a run: the progress display, TensorBoard."""

    def row(self, log: str, row: dict[str, Any]) -> None:
        """A line has been added to a log."""

    def close(self) -> None:
        """The run has stopped."""


@dataclass
class Progress:
    """Where a run stands; ``iteration`` and ``segment`` count within the task."""

    task_index: int = 0
    iteration: int = 0
    segment: int = 0
    global_step: int = 0


def check(config: TrainConfig) -> None:
    """Refuse what cannot be trained, before anything is written.

    Raises:
        ConfigError: a task that does not exist, a method or network size that cannot be, or a sequence for one agent
            whose tasks differ in their spaces.
    """
    suite, tasks = make_suite(config.suite), list(dict.fromkeys(config.task_sequence))
    known: dict[Spaces, str] = {}
    for task in tasks[:1] if suite.same_spaces else tasks:
        envs = suite.make(task, num_envs=1, seed=0, num_threads=1)
        spaces = Spaces.of(envs)
        envs.close()
        if config.protocol == "crl" and known and spaces not in known:
            same = f"{next(iter(known))} as {tasks[0]} has in protocol crl"
            raise ConfigError("tasks", task, f"a task with {same}, not {spaces}")
        known.setdefault(spaces, task)
    for spaces in known:
        Agent(config, spaces, seed=0)


def start(config: TrainConfig, folder: RunFolder, monitors: Callable[[int], list[Monitor]]) -> None:
    """Write a new run's configuration and train it to the end; `check` it first. The caller has locked the folder."""
    folder.create(to_dict(config))
    resume(folder, monitors)


def resume(folder: RunFolder, monitors: Callable[[int], list[Monitor]]) -> None:
    """Train from the newest checkpoint to the end; ``monitors(global_step)`` makes those who watch."""
    config = from_dict(folder.config())
    tune_process(min(2, threads("auto")) if config.torch_threads == "auto" else config.torch_threads)
    state = checkpoint.latest_run(folder)
    run = Run(config, folder, state, monitors)
    try:
        run.train()
    except KeyboardInterrupt:
        folder.set_status("interrupted", run.progress.global_step, run.task)
        raise
    except BaseException as error:
        folder.set_status("failed", run.progress.global_step, run.task, f"{type(error).__name__}: {error}")
        raise
    finally:
        run.close()
    folder.set_status("finished", run.progress.global_step, run.task)


class Run:
    """A run in progress."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        state: dict[str, Any] | None,
        monitors: Callable[[int], list[Monitor]],
    ) -> None:
        self.config, self.folder, self.suite = config, folder, make_suite(config.suite)
        self.tasks, self.state = config.task_sequence, state
        self.progress = Progress(**state["progress"]) if state else Progress()
        self.logs = Logs(folder, state["logs"] if state else {})
        self.monitors = monitors(self.progress.global_step)
        self.tracker = Tracker(config)
        self.lanes = LaneChoice(config.torch_threads)
        self.agent: Agent | None = None
        self.collector: Collector | None = None

    @property
    def task(self) -> str:
        """The present task; the last one after the end."""
        return self.tasks[min(self.progress.task_index, len(self.tasks) - 1)]

    @property
    def task_step(self) -> int:
        """Environment steps on the present task."""
        return self.progress.iteration * self.config.steps_per_iteration

    def train(self) -> None:
        """Train every task that is left, then look back at the earlier ones."""
        while self.progress.task_index < len(self.tasks):
            self.folder.set_status("running", self.progress.global_step, self.task)
            agent, collector = self._begin_segment()
            self._train_segment(agent, collector)
            self._end_segment(agent, collector)
        if self.config.protocol == "crl" and len(self.tasks) > 1:  # of one task the final episodes would come again
            self._evaluate_earlier_tasks(self.agent or self._restored_agent())

    def close(self) -> None:
        """Close logs, monitors and environments."""
        self.logs.close()
        for monitor in self.monitors:
            monitor.close()
        if self.collector is not None:
            self.collector.envs.close()

    def _begin_segment(self) -> tuple[Agent, Collector]:
        """The agent and environments of this segment: those in hand, restored ones, or new ones."""
        state, self.state = self.state, None
        seed = self._seed("train", self.progress.segment)
        collector = self.collector
        if collector is None:
            envs = self.suite.make(self.task, self.config.num_envs, seed, threads(self.config.env_threads))
        else:
            envs = collector.envs
        new = self.agent is None
        agent = self.agent = self.agent or Agent(self.config, Spaces.of(envs), self._seed("agent"))
        if new and state is not None and state["agent"] is not None:
            agent.load_state_dict(state["agent"])
        if self.progress.iteration == 0:
            self._begin_task(agent)
        if collector is None:
            collector = self.collector = Collector(envs, agent.normalizer, agent.device, agent.reward_normalizer)
            if state is not None and state["collector"] is not None:
                collector.load_state_dict(state["collector"])
        return agent, collector

    def _begin_task(self, agent: Agent) -> None:
        self.lanes.renew()
        agent.set_learning_rate(self.config.learning_rate)
        for method in agent.methods:
            method.on_task_start(agent, self.progress.task_index if self.config.protocol == "crl" else 0)

    def _train_segment(self, agent: Agent, collector: Collector) -> None:
        config, progress = self.config, self.progress
        length = max(1, config.checkpoint_every // config.steps_per_iteration)
        for _ in range(min(length, config.iterations_per_task - progress.iteration)):
            began = perf_counter()
            if config.learning_rate_schedule == "linear":
                share = progress.iteration / config.iterations_per_task
                rate = config.learning_rate + share * (config.learning_rate_end - config.learning_rate)
                agent.set_learning_rate(rate)
            try:
                self.tracker.begin_iteration(agent, self.task_step)
                with two_lanes(self.lanes.threads if agent.device.type == "cpu" else 1):
                    rollout = collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator)
                    statistics = update(agent, rollout, config)
            except TrainingError as error:
                raise TrainingError(f"task {self.task}, iteration {progress.iteration + 1}: {error}") from None
            progress.iteration += 1
            progress.global_step += config.steps_per_iteration
            seconds = perf_counter() - began
            self.lanes.took(seconds)
            self._log_iteration(agent, rollout, statistics, seconds)
            for row in self.tracker.measurements(agent, rollout, self.task):
                self._log("spectrum", self._position() | row)
            self._evaluate_if_due(agent)

    def _end_segment(self, agent: Agent, collector: Collector) -> None:
        """Write the checkpoint; let go of what the next segment makes anew."""
        progress = self.progress
        progress.segment += 1
        if task_over := progress.iteration == self.config.iterations_per_task:
            self._save_policy(agent)
            progress.task_index, progress.iteration, progress.segment = progress.task_index + 1, 0, 0
            if self.config.protocol == "rl":
                self.agent = None
        environments = None if task_over else collector.state_dict()
        if environments is None:
            collector.envs.close()
            self.collector = None
        state = {
            "progress": asdict(progress),
            "agent": agent.state_dict() if self.agent else None,
            "spaces": asdict(agent.spaces),
            "collector": environments,
            "logs": self.logs.lengths(),
        }
        checkpoint.save_run(self.folder, progress.global_step, state)

    def _save_policy(self, agent: Agent) -> None:
        state = agent.state_dict()
        policy = {key: state[key] for key in ("actor", "normalizer", "methods")}
        path = self.folder.checkpoints / f"task-{self.progress.task_index:02d}-{self.task.replace('/', '_')}.pt"
        checkpoint.save(path, {"agent": policy, "spaces": asdict(agent.spaces), "progress": asdict(self.progress)})

    def _restored_agent(self) -> Agent:
        """The agent of a run that was stopped after its last task."""
        assert self.state is not None
        agent = Agent(self.config, Spaces(**self.state["spaces"]), seed=0)
        agent.load_state_dict(self.state["agent"])
        return agent

    def _log_iteration(self, agent: Agent, rollout: Rollout, statistics: dict[str, float], seconds: float) -> None:
        row = self._position() | {"iteration": self.progress.iteration, "learning_rate": agent.learning_rate}
        row |= statistics
        for method in agent.methods:
            row |= {name: float(value) for name, value in method.metrics().items()}
        if rollout.episodes:
            row |= summarize(rollout.episodes).row()
        row["steps_per_second"] = self.config.steps_per_iteration / seconds
        self._log("train", row)

    def _evaluate_if_due(self, agent: Agent) -> None:
        """Evaluate where this iteration crossed a multiple of ``eval_every``, and at the end of the task."""
        config, step = self.config, self.task_step
        if self.progress.iteration == config.iterations_per_task:
            self._evaluate(agent, self.progress.task_index, "final", config.final_eval_episodes)
        elif step // config.eval_every > (step - config.steps_per_iteration) // config.eval_every:
            self._evaluate(agent, self.progress.task_index, "train", config.eval_episodes)

    def _evaluate_earlier_tasks(self, agent: Agent) -> None:
        for index in range(len(self.tasks)):
            self._evaluate(agent, index, "retention", self.config.final_eval_episodes)

    def _evaluate(self, agent: Agent, task_index: int, phase: str, episodes: int) -> None:
        task, policy = self.tasks[task_index], Policy(agent.actor, agent.normalizer)
        seed = derive_seed(self.config.seed, "eval", task, self.progress.global_step)
        result = evaluate(policy, self.suite, task, episodes, seed, threads(self.config.env_threads))
        row = self._position() | {"task_index": task_index, "task": task, "phase": phase}
        if phase == "retention":
            row["task_step"] = self.config.iterations_per_task * self.config.steps_per_iteration
        self._log("eval", row | result.row())

    def _position(self) -> dict[str, Any]:
        return {
            "global_step": self.progress.global_step,
            "task_index": self.progress.task_index,
            "task": self.task,
            "task_step": self.task_step,
        }

    def _log(self, log: str, row: dict[str, Any]) -> None:
        self.logs.append(log, row)
        for monitor in self.monitors:
            monitor.row(log, row)

    def _seed(self, purpose: str, *parts: int) -> int:
        """A seed of the present task: its name and how often it came before, not its place in the sequence.

        So the first task of a sequence and the same task alone are the same run.
        """
        earlier = self.tasks[: self.progress.task_index].count(self.task)
        return derive_seed(self.config.seed, purpose, self.task, earlier, *parts)
