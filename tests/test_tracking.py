"""Measuring while a run trains: where it should, on the same states for everybody, and without a trace in the run."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from sphere_rl import protocol
from sphere_rl.config import TrainConfig, override, preset
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.spectrum import SPECTRAL_METRICS, measure
from sphere_rl.suites import make_suite
from sphere_rl.training.agent import Agent
from sphere_rl.training.probe import probe_batch, probe_observations, probe_tasks
from sphere_rl.training.tracker import Tracker

POSITION = {"global_step", "task_index", "task", "task_step"}


def train(config: TrainConfig, path: Path) -> RunFolder:
    with RunFolder(path) as folder:
        protocol.start(config, folder, lambda step: [])
    return folder


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Nested state as one dictionary."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{name}[{i}]").items()}
    return {name: state}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": ["sphere"], "normalize_observations": True, "tasks": ["Pendulum-v1"] * 2},
        # The hard cases: a forward pass in training mode iterates buffers, and units are replaced by their gradients.
        {"method": ["spectral_norm", "regrama"], "regrama": {"every": 1}, "network": {"width": 16, "depth": 2}},
    ],
    ids=["sphere", "spectral_norm+regrama"],
)
def test_training_is_bitwise_the_same_with_tracking_on_and_off(
    tiny: TrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = override(tiny, changes)
    on, off = (train(override(config, {"spectrum_every": every}), tmp_path / str(every)) for every in (256, -1))
    assert on.read("spectrum")
    assert not off.read("spectrum")
    assert (on.path / "eval.jsonl").read_bytes() == (off.path / "eval.jsonl").read_bytes()
    states = [found[1] for folder in (on, off) if (found := checkpoint.newest(folder))]
    one, two = (flat(state["agent"]) for state in states)
    assert one.keys() == two.keys()
    assert any(".critic_optimizer.state" in name for name in one)
    for name, value in one.items():
        same = torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        assert same, name


def test_rows_are_written_where_an_iteration_crosses_a_multiple(tiny: TrainConfig, tmp_path: Path) -> None:
    changes = {"tasks": ["Pendulum-v1"] * 2, "spectrum_every": 200, "eval_every": 10_000, "final_eval_episodes": 1}
    rows = train(override(tiny, changes), tmp_path / "run").read("spectrum")
    # Iterations of a task end at 128, 256, 384, 512; multiples of 200 are crossed in the second and the fourth.
    places = [(row["task_index"], row["task_step"], row["global_step"], row["batch"]) for row in rows]
    assert places == [
        (task, step, task * 512 + step, batch)
        for task in (0, 1)
        for step in (256, 512)
        for batch in ("probe", "rollout")
    ]
    for row in rows:
        assert set(row) == set(SPECTRAL_METRICS) | POSITION | {"batch"}
        assert len(row["expert_load"]) == tiny.network.num_experts
        assert row["churn"] > 0  # the update of that iteration moved the policy
        assert row["weight_change"] > 0
    assert rows[0]["r_e_K"] != rows[1]["r_e_K"]


def test_a_task_is_measured_twenty_times_the_last_time_at_its_end() -> None:
    """Also where whole iterations do not fill it, as CW10's 61 iterations of 16 384 steps do not fill a million."""
    for config, expected in ((TrainConfig(), 20), (TrainConfig(steps_per_task=10 * 16_384), 10)):
        steps = due_steps(config)
        assert len(steps) == expected
        assert steps[-1] == config.steps_of_task
    assert not due_steps(TrainConfig(spectrum_every=-1))


def due_steps(config: TrainConfig) -> list[int]:
    """Steps of a task after which a measurement is due."""
    small = override(config, {"network": {"width": 2, "depth": 1}})
    tracker, agent = Tracker(small), Agent(small, Spaces(3, 1, False), seed=0)
    found = []
    for iteration in range(config.iterations_per_task):
        tracker.begin_iteration(agent, iteration * config.steps_per_iteration)
        if tracker.due:
            found.append((iteration + 1) * config.steps_per_iteration)
    return found


def test_the_probe_batch_is_the_same_for_all_methods_and_seeds(tiny: TrainConfig) -> None:
    batches = []
    for changes in ({}, {"seed": 7, "method": ["redo"], "actor": "dense"}, {"protocol": "rl", "num_envs": 4}):
        config = override(tiny, changes)
        agent = Agent(config, Spaces(3, 1, False), seed=config.seed)
        batches.append(Tracker(config).probe(agent, "Pendulum-v1"))
    assert batches[0].shape == (256, 3)
    assert all(torch.equal(batches[0], batch) for batch in batches)


def test_the_probe_batch_is_drawn_from_what_the_policy_learns(tiny: TrainConfig) -> None:
    """The suite's own tasks whatever the run trains; in gym the run's tasks, in rl the one; never of another size."""
    cw10 = TrainConfig(tasks=("drawer-close",))
    assert np.array_equal(probe_batch(cw10, "drawer-close"), probe_batch(TrainConfig(protocol="rl"), "push"))
    assert len(np.unique(probe_batch(cw10, "drawer-close")[:, -3:], axis=0)) > 10  # goals of more than one task
    other = "InvertedLightPendulum-v0"
    gymnasium.register(other, "gymnasium.envs.classic_control.pendulum:PendulumEnv", 100, kwargs={"g": 5.0})
    tasks = ("Pendulum-v1", "MountainCarContinuous-v0", other, "Pendulum-v1")
    both = probe_observations(make_suite("gym"), ("Pendulum-v1", other))
    crl, rl = (override(tiny, {"tasks": tasks, "protocol": protocol}) for protocol in ("crl", "rl"))
    assert all(np.array_equal(probe_batch(crl, task), both) for task in ("Pendulum-v1", other))
    assert probe_batch(crl, "MountainCarContinuous-v0").shape == (256, 2)
    assert np.array_equal(probe_batch(rl, other), probe_observations(make_suite("gym"), (other,)))


@pytest.mark.parametrize(
    ("protocol", "tasks", "expected"),
    [
        ("rl", ("sit_simple", "reach"), ("stand", "walk", "pole", "slide", "run")),  # 51 numbers, as the sequence has
        ("rl", ("reach", "stand"), ("reach",)),  # 57
        ("crl", ("balance_hard", "balance_hard"), ("balance_hard",)),
    ],
)
def test_a_task_of_h1_is_measured_on_states_that_its_policy_can_see(
    protocol: str, tasks: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    config = override(preset(make_suite("h1")), {"protocol": protocol, "tasks": tasks})
    assert probe_tasks(config, tasks[0]) == expected
    with closing(make_suite("h1").make(tasks[0], 1, 0, 1)) as envs:
        spaces = Spaces.of(envs)
    agent = Agent(override(config, {"network": {"width": 8}}), spaces, seed=0)
    assert len(agent.actor(Tracker(config).probe(agent, tasks[0]))) == 256


def test_the_probe_batch_passes_the_agents_normaliser(tiny: TrainConfig) -> None:
    agent = Agent(override(tiny, {"normalize_observations": True}), Spaces(3, 1, False), seed=0)
    tracker = Tracker(tiny)
    raw = tracker.probe(Agent(tiny, Spaces(3, 1, False), seed=0), "Pendulum-v1")
    assert agent.normalizer is not None
    agent.normalizer.update(raw.double().numpy())
    seen = tracker.probe(agent, "Pendulum-v1")
    assert np.allclose(seen.mean(0), 0, atol=1e-5)
    assert np.allclose(seen.std(0, correction=0), 1, atol=1e-3)


@pytest.mark.parametrize("rows", [None, 5])
def test_a_row_is_what_measure_says_of_the_saved_policy(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    """Of a policy with more actions than K may have rows for its r_e(K) is that of fewer states: here 5 of 256."""
    if rows is not None:
        monkeypatch.setattr("sphere_rl.training.tracker.KERNEL_ROWS", rows)
    folder = train(tiny, tmp_path / "run")
    row = [row for row in folder.read("spectrum") if row["batch"] == "probe"][-1]
    found = checkpoint.newest(folder)
    assert found is not None
    state = found[1]
    agent = Agent(tiny, Spaces(**state["spaces"]), seed=1)
    agent.load_state_dict(state["agent"])
    assert row["task_step"] == 512
    found = measure(agent.actor, Tracker(tiny).probe(agent, "Pendulum-v1"), kernel_rows=rows)
    assert {name: row[name] for name in found} == found
