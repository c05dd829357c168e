"""Reinforcement learning on a sequence of tasks: what happens when, from the first task to the last evaluation.

``rl`` trains a fresh agent on each task, ``crl`` one agent through all: weights, optimisers and normaliser carry over,
the learning-rate schedule and the step counter start again at each task, and the agent is never told which task it is.

Training is cut into segments. EnvPool cannot save the state of its environments, so at every segment's start they are
made anew, from a seed that only (run seed, task, segment) decide, and at its end a checkpoint is written. A run that
was interrupted so continues bitwise as the run that was not. Environments that can save their state go on instead.
An evaluation that is due at a segment's end comes after the checkpoint, with which a resumed run begins: it says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.errors import ConfigError, OutsideError, RunFolderError, StorageError, TrainingError, described
from sphere_rl.kernels.threads import two_lanes
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.learner.rollout import Collector, Rollout
from sphere_rl.runs import LOGS, Logs, RunFolder, checkpoint, file_name
from sphere_rl.runtime import LaneChoice, check_device, release_memory, threads, tune_process
from sphere_rl.seeding import derive_seed, global_streams, seed_globals
from sphere_rl.suites import make_suite
from sphere_rl.suites.guard import call_limit, make_envs
from sphere_rl.suites.spaces import check_envs
from sphere_rl.training.agent import Agent, Policy
from sphere_rl.training.evaluation import ToldSuccess, evaluate, summarize
from sphere_rl.training.finite import bad_agent, bad_number, check_agent
from sphere_rl.training.monitors import Host, Monitor
from sphere_rl.training.policies import load_policy
from sphere_rl.training.ppo import update
from sphere_rl.training.progress import Due, Progress, progress_of, record_of
from sphere_rl.training.saved import config_of
from sphere_rl.training.sizes import check_memory
from sphere_rl.training.tracker import Tracker


def check(config: TrainConfig) -> None:
    """Refuse what cannot be trained, before anything is written.

    Raises:
        ConfigError: a device that cannot be used here, a task that does not exist, a method or network size that
            cannot be, or a sequence for one agent whose tasks differ in their spaces.
    """
    check_device(config.device)
    tune_process(config.torch_threads)  # threads of an environment made before would keep memory of their own
    suite, tasks = make_suite(config.suite), list(dict.fromkeys(config.task_sequence))
    known: dict[Spaces, str] = {}
    for task in tasks[:1] if suite.same_spaces else tasks:
        with call_limit(config.env_timeout):
            envs = make_envs(suite, task, 1, 0, 1, config.environment)
        check_envs(task, envs)
        spaces = Spaces.of(envs)
        envs.close()
        if config.protocol == "crl" and known and spaces not in known:
            same = f"{next(iter(known))} as {tasks[0]} has in protocol crl"
            raise ConfigError("tasks", task, f"a task with {same}, not {spaces}")
        known.setdefault(spaces, task)
    for spaces in known:
        check_memory(config, spaces)
        Agent(config, spaces, seed=0)


def start(config: TrainConfig, folder: RunFolder, monitors: Callable[[int], list[Monitor]]) -> None:
    """Write a new run's configuration and train it to the end; `check` it first. The caller has locked the folder."""
    folder.create(to_dict(config))
    resume(folder, monitors)


def resume(folder: RunFolder, monitors: Callable[[int], list[Monitor]]) -> None:
    """Train from the newest checkpoint to the end; ``monitors(global_step)`` makes those who watch."""
    config = config_of(folder)
    try:
        check_device(config.device)
    except ConfigError as error:  # of the machine that the run was started on
        raise RunFolderError(f"{folder.config_path}: {error}") from None
    tune_process(config.torch_threads)
    run = Run(config, folder, checkpoint.newest(folder), monitors)
    while (error := carry_on(run)) is not None:  # bad numbers, and it is to go back
        found = checkpoint.newest(folder)
        rollbacks = [*run.rollbacks, str(error)]
        if config.on_nan == "stop" or len(rollbacks) - len(rollbacks_of(found)) > ROLLBACKS:
            run.set_status("failed", error)
            raise error
        run = Run(config, folder, found, monitors, rollbacks)
        print(f"sphere: {error}; back to step {run.progress.global_step:,} with new seeds (on_nan)", file=sys.stderr)


def carry_on(run: Run) -> TrainingError | None:
    """Train to the end and write how that went; bad numbers, which may be gone back from, are returned."""
    try:
        with global_streams(run.config.seed), call_limit(run.config.env_timeout):
            run.train()
        run.close()
        run.set_status("finished")
    except KeyboardInterrupt:
        run.set_status("interrupted")
        raise
    except BaseException as error:
        if isinstance(error, TrainingError) and not isinstance(error, OutsideError):
            return error
        with suppress(StorageError):  # the error itself is what has to be said
            run.set_status("failed", error)
        raise
    finally:
        with suppress(OSError):  # of a disk that is full, which has been said
            run.close()
    return None


ROLLBACKS = 3
"""How often a run goes back to the same checkpoint; then it fails."""


def rollbacks_of(found: tuple[Path, dict[str, Any]] | None) -> list[str]:
    """What a checkpoint's run had gone back for before it was written."""
    return list(found[1].get("rollbacks", ())) if found else []


class Run:
    """A run in progress."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        found: tuple[Path, dict[str, Any]] | None,
        monitors: Callable[[int], list[Monitor]],
        rollbacks: list[str] | None = None,
    ) -> None:
        """Restore the checkpoint ``found``; ``rollbacks``: those of the run, where there were some since then."""
        self.config, self.folder, self.suite = config, folder, make_suite(config.suite)
        self.tasks, self.state = config.task_sequence, found[1] if found else None
        self.progress, lengths = Progress(), dict[str, int]()
        self.due: Due | None = None
        self.agent: Agent | None = None
        self.rollbacks: list[str] = []
        if found is not None:
            with checkpoint.fitting(found[0]):
                self.agent, lengths = self._restore(found[1])
                self.rollbacks = rollbacks_of(found)
        if rollbacks is not None:
            self.rollbacks = rollbacks
            if found is not None and self.agent is not None:
                self.agent.generator.manual_seed(self._seed("training"))
                found[1]["collector"] = None  # it would go on with the random streams of before
        self.logs = Logs(folder, lengths)  # the first that changes anything in the folder
        self.told = ToldSuccess(folder.read("train") + folder.read("eval"))
        try:
            self.monitors = monitors(self.progress.global_step)
        except BaseException:
            self.logs.close()
            raise
        self.hosts = [monitor for monitor in self.monitors if isinstance(monitor, Host)]
        self.tracker = Tracker(config)
        self.lanes = LaneChoice(config.torch_threads)
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
        """Train every task that is left, then evaluate all of them again."""
        self.set_status("running")
        self.folder.tell_changes()
        if self.due is not None:
            self._evaluate(self._restored_policy(self.due), self.due)
        while self.progress.task_index < len(self.tasks):
            self.set_status("running")
            agent, collector = self._begin_segment()
            self._train_segment(agent, collector)
            self._end_segment(agent, collector)
            del collector  # closed environments go before an evaluation or the next segment makes others
            if self.due is not None:
                self._evaluate(Policy(agent.actor, agent.normalizer), self.due)
        if self.config.protocol == "crl" and len(self.tasks) > 1:  # of one task the final episodes would come again
            assert self.agent is not None
            self._evaluate_all_tasks(self.agent)

    def close(self) -> None:
        """Close logs, monitors and environments, all of them whatever becomes of one."""
        with ExitStack() as stack:
            stack.callback(self.logs.close)
            while self.monitors:
                stack.callback(self.monitors.pop().close)
            if self.collector is not None:
                stack.callback(self.collector.envs.close)
                self.collector = None

    def set_status(self, state: str, error: BaseException | None = None) -> None:
        """Write where the run stands."""
        text = None if error is None else f"{type(error).__name__}: {error}"
        self.folder.set_status(state, self.progress.global_step, self.task, text, self.rollbacks)

    def _begin_segment(self) -> tuple[Agent, Collector]:
        """The agent and environments of this segment: those in hand, restored ones, or new ones."""
        state, self.state = self.state, None
        seed = self._seed("train", self.progress.segment)
        seed_globals(self._seed("globals", self.progress.segment))
        collector = self.collector
        if collector is None:
            release_memory()
            config = self.config
            number, count = threads(config.env_threads), config.num_envs
            envs = make_envs(self.suite, self.task, count, seed, number, config.environment)
        else:
            envs = collector.envs
        agent = self.agent = self.agent or Agent(self.config, Spaces.of(envs), self._seed("agent"))
        while self.hosts:  # those who want to know who is trained, and hear it once
            self.hosts.pop(0).begin(agent)
        if self.progress.iteration == 0:
            self._begin_task(agent)
        if collector is None:
            with self._place(agent, self.progress.iteration + 1):
                collector = Collector(envs, agent.normalizer, agent.device, agent.reward_normalizer)
            self.collector = collector
            if state is not None and state["collector"] is not None:
                collector.load_state_dict(state["collector"])
        return agent, collector

    @contextmanager
    def _place(self, agent: Agent, iteration: int) -> Iterator[None]:
        """Say of what goes wrong where it did; what numbers that are none make others raise is their fault."""
        place = f"task {self.task}, iteration {iteration}"
        try:
            yield
        except TrainingError as error:
            raise type(error)(f"{place}: {error}") from error
        except (ArithmeticError, RuntimeError, ValueError) as error:
            if (found := bad_agent(agent)) is None:
                raise
            raise TrainingError(f"{place}: {found} ({described(error)})") from error

    def _begin_task(self, agent: Agent) -> None:
        self.lanes.renew()
        agent.begin_task(self.progress.task_index if self.config.protocol == "crl" else 0)

    def _train_segment(self, agent: Agent, collector: Collector) -> None:
        config, progress = self.config, self.progress
        length = max(1, config.checkpoint_every // config.steps_per_iteration)
        for left in reversed(range(min(length, config.iterations_per_task - progress.iteration))):
            began = perf_counter()
            if config.learning_rate_schedule == "linear":
                share = progress.iteration / config.iterations_per_task
                rate = config.learning_rate + share * (config.learning_rate_end - config.learning_rate)
                agent.set_learning_rate(rate)
            with self._place(agent, progress.iteration + 1):
                self.tracker.begin_iteration(agent, self.task_step)
                with two_lanes(self.lanes.threads if agent.device.type == "cpu" else 1):
                    rollout = collector.collect(agent.actor, agent.critic, config.num_steps, agent.generator)
                    statistics = update(agent, rollout, config)
                check_agent(agent)
            progress.iteration += 1
            progress.global_step += config.steps_per_iteration
            seconds = perf_counter() - began
            self.lanes.took(seconds)
            with self._place(agent, progress.iteration):
                for row in self.tracker.measurements(agent, rollout, self.task):
                    self._log("spectrum", self._position() | row)  # first: for the display of the iteration
                self._log_iteration(agent, rollout, statistics, seconds)
            self.due = self._due_evaluation()
            if self.due is not None and left:  # the last iteration's waits for the checkpoint
                self._evaluate(Policy(agent.actor, agent.normalizer), self.due)

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
            "due": asdict(self.due) if self.due else None,
            "logs": self.logs.lengths(),
        }
        if self.rollbacks:
            state["rollbacks"] = self.rollbacks
        checkpoint.save_run(self.folder, progress.global_step, state)

    def _save_policy(self, agent: Agent) -> None:
        state = agent.state_dict()
        policy = {key: state[key] for key in ("actor", "normalizer", "methods")}
        path = self.folder.checkpoints / f"{self._policy_name(self.progress.task_index)}.pt"
        checkpoint.save(path, {"agent": policy, "spaces": asdict(agent.spaces), "progress": asdict(self.progress)})

    def _policy_name(self, task_index: int) -> str:
        return f"task-{task_index:02d}-{file_name(self.tasks[task_index])}"

    def _restored_policy(self, due: Due) -> Policy:
        """The policy that a checkpoint says must be evaluated; between two tasks of protocol rl its agent is gone."""
        if self.agent is None:
            return load_policy(self.folder.path, self._policy_name(due.task_index), self.config.device)
        return Policy(self.agent.actor, self.agent.normalizer)

    def _restore(self, state: dict[str, Any]) -> tuple[Agent | None, dict[str, int]]:
        """The agent of a checkpoint (in rl none between two tasks), and the lengths of its logs."""
        self.progress = progress_of(state["progress"], self.config)
        self.due = record_of(Due, state["due"]) if state.get("due") else None
        lengths = {log: state["logs"][log] for log in LOGS}
        if not all(type(length) is int and length >= 0 for length in lengths.values()):
            raise ValueError(f"lengths of its logs are {lengths}")
        if state["agent"] is None:
            return None, lengths
        agent = Agent(self.config, record_of(Spaces, state["spaces"]), self._seed("agent"))
        agent.load_state_dict(state["agent"])
        if found := bad_agent(agent):
            raise ValueError(found)
        return agent, lengths

    def _log_iteration(self, agent: Agent, rollout: Rollout, statistics: dict[str, float], seconds: float) -> None:
        row = self._position() | {"iteration": self.progress.iteration, "learning_rate": agent.learning_rate}
        row |= statistics
        if rollout.episodes:
            row |= summarize(rollout.episodes).row()
        if self.rollbacks:
            row["rollbacks"] = len(self.rollbacks)
        row["steps_per_second"] = self.config.steps_per_iteration / seconds
        agent.add_metrics(row)
        self._log("train", row)

    def _due_evaluation(self) -> Due | None:
        """Evaluate where this iteration crossed a multiple of ``eval_every``, and at the end of the task."""
        config, step = self.config, self.task_step
        if self.progress.iteration == config.iterations_per_task:
            return Due("final", self.progress.task_index, step)
        if step // config.eval_every > (step - config.steps_per_iteration) // config.eval_every:
            return Due("train", self.progress.task_index, step)
        return None

    def _evaluate_all_tasks(self, agent: Agent) -> None:
        for index in range(len(self.tasks)):
            due = Due("retention", index, self.config.steps_of_task)
            self._evaluate(Policy(agent.actor, agent.normalizer), due)

    def _evaluate(self, policy: Policy, due: Due) -> None:
        config, task, step = self.config, self.tasks[due.task_index], self.progress.global_step
        result = evaluate(
            policy,
            self.suite,
            task,
            config.eval_episodes if due.phase == "train" else config.final_eval_episodes,
            derive_seed(config.seed, "eval", task, step),
            threads(config.env_threads),
            arguments=config.environment,
            max_steps=config.eval_max_steps,
            phase=f"{due.phase} evaluation",
        )
        place = {"global_step": step, "task_index": due.task_index, "task": task, "task_step": due.task_step}
        self._log("eval", place | {"phase": due.phase} | result.row())

    def _position(self) -> dict[str, Any]:
        return {
            "global_step": self.progress.global_step,
            "task_index": self.progress.task_index,
            "task": self.task,
            "task_step": self.task_step,
        }

    def _log(self, log: str, row: dict[str, Any]) -> None:
        if found := bad_number(row):
            raise TrainingError(f"{found} in {log}.jsonl")
        self.logs.append(log, row := self.told.complete(row))
        for monitor in self.monitors:
            monitor.row(log, row)

    def _seed(self, purpose: str, *parts: int) -> int:
        """A seed of the present task: its name and how often it came before, not its place in the sequence.

        So the first task of a sequence and the same task alone are the same run. Each rollback has seeds of its own.
        """
        earlier = self.tasks[: self.progress.task_index].count(self.task)
        branch = ("rollback", len(self.rollbacks)) if self.rollbacks else ()
        return derive_seed(self.config.seed, purpose, self.task, earlier, *parts, *branch)
