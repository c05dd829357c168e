"""Task changes, logs, and the promise that an interrupted run ends as the run that was never interrupted."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import run_difference, timeless
from killing import resume_until_finished
from stopping import StopAfter, Stopped
from toy_runs import config

from sphere_rl import protocol
from sphere_rl.config import TrainConfig, override, to_dict
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.suites.guard import make_envs
from sphere_rl.training import evaluation
from sphere_rl.training.agent import Agent
from sphere_rl.training.policies import load_policy


def train(config: TrainConfig, path: Path) -> RunFolder:
    with RunFolder(path) as folder:
        protocol.start(config, folder, lambda step: [])
    return folder


def test_a_run_writes_the_folder_that_others_read(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = train(override(tiny, {"tasks": ["Pendulum-v1", "Pendulum-v1"]}), tmp_path / "run")
    assert folder.status() == {"state": "finished", "global_step": 1024, "task": "Pendulum-v1", "error": None}
    rows = folder.read("train")
    assert [row["global_step"] for row in rows] == list(range(128, 1025, 128))
    assert [row["task_index"] for row in rows] == [0] * 4 + [1] * 4
    assert [row["task_step"] for row in rows] == [128, 256, 384, 512] * 2
    evaluations = folder.read("eval")
    assert [(row["task_index"], row["phase"], row["task_step"]) for row in evaluations] == [
        (0, "train", 256), (0, "final", 512), (1, "train", 256), (1, "final", 512),
        (0, "retention", 512), (1, "retention", 512),
    ]  # fmt: skip
    columns = (
        "global_step task_index task task_step episodes success_final success_once mean_return std_return mean_length"
    )
    assert set(columns.split()) < set(evaluations[0])
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names[-2:] == ["task-00-Pendulum-v1.pt", "task-01-Pendulum-v1.pt"]
    assert len(names) == 4


def test_environments_are_gone_before_others_are_made(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def counted(*given: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        envs = make_envs(*given)
        made.append(weakref.ref(envs))
        return envs

    for module in (protocol, evaluation):
        monkeypatch.setattr(module, "make_envs", counted)
    train(override(tiny, {"tasks": ["Pendulum-v1"] * 2}), tmp_path / "run")
    assert len(alive) == 14  # of each iteration and evaluation: Gymnasium's cannot be kept over a checkpoint
    assert not any(alive)


def test_an_iteration_is_told_after_what_was_measured_in_it(tiny: TrainConfig, tmp_path: Path) -> None:
    """So that its line in the display has its ranks, and not those before."""
    told: list[tuple[str, int]] = []

    class Listener:
        def row(self, log: str, row: dict[str, Any]) -> None:
            told.append((log, row["task_step"]))

        def close(self) -> None:
            pass

    with RunFolder(tmp_path / "run") as folder:
        protocol.start(override(tiny, {"spectrum_every": 256}), folder, lambda step: [Listener()])
    assert [log for log, step in told if step == 256][:4] == ["spectrum", "spectrum", "train", "eval"]


def test_a_single_task_is_not_evaluated_twice_at_its_end(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = train(override(tiny, {"tasks": ["Pendulum-v1"]}), tmp_path / "run")
    assert [row["phase"] for row in folder.read("eval")] == ["train", "final"]


def test_learning_rate_falls_over_a_task_and_restarts_with_the_next(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = train(override(tiny, {"tasks": ["Pendulum-v1"] * 2}), tmp_path / "run")
    rates = [row["learning_rate"] for row in folder.read("train")]
    assert rates == pytest.approx([3e-4, 2.5e-4, 2e-4, 1.5e-4] * 2)


def test_crl_carries_everything_over_and_rl_starts_afresh(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Agent] = []
    original = Agent.__init__

    def record(self: Agent, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Agent, "__init__", record)
    config = override(tiny, {"tasks": ["Pendulum-v1"] * 2, "normalize_observations": True})
    train(override(config, {"protocol": "crl"}), tmp_path / "crl")
    assert len(made) == 1
    assert made[0].normalizer is not None
    assert made[0].normalizer.count == 1024
    steps = {float(state["step"]) for state in made[0].actor_optimizer.state.values()}
    assert steps == {8 * 2 * 4.0}  # iterations x epochs x minibatches: Adam never restarted
    made.clear()
    folder = train(override(config, {"protocol": "rl"}), tmp_path / "rl")
    assert len(made) == 2
    assert [agent.normalizer.count for agent in made if agent.normalizer] == [512, 512]
    assert [row["phase"] for row in folder.read("eval")] == ["train", "final"] * 2


def test_the_first_task_of_a_sequence_is_the_same_run_as_the_task_alone(tiny: TrainConfig, tmp_path: Path) -> None:
    alone = train(override(tiny, {"protocol": "rl"}), tmp_path / "alone")
    sequence = train(override(tiny, {"tasks": ["Pendulum-v1"] * 2}), tmp_path / "sequence")
    assert timeless(sequence.read("train")[:4]) == timeless(alone.read("train"))
    assert sequence.read("eval")[:2] == alone.read("eval")
    assert timeless(sequence.read("train")[4:]) != timeless(alone.read("train"))


def test_equal_seeds_are_equal_runs_and_others_differ(tiny: TrainConfig, tmp_path: Path) -> None:
    one, two = (train(tiny, tmp_path / name) for name in ("one", "two"))
    assert run_difference(one, two) is None
    other = train(override(tiny, {"seed": 1}), tmp_path / "other")
    assert timeless(other.read("train")) != timeless(one.read("train"))


@pytest.mark.parametrize("method", ["none", "sphere"])
def test_a_second_thread_changes_nothing(method: str, tiny: TrainConfig, tmp_path: Path) -> None:
    """Networks of the size that is used; ``auto`` goes from two to one and to what was faster."""
    sizes = {"network.width": 256, "minibatch_size": 256, "num_envs": 8}
    config = override(tiny, {"method": [method], **sizes})
    one, *others = (train(override(config, {"torch_threads": n}), tmp_path / str(n)) for n in (1, 2, "auto"))
    assert [run_difference(one, other) for other in others] == [None, None]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": ["sphere"], "normalize_observations": True},
        {"protocol": "rl", "tasks": ["Pendulum-v1", "MountainCarContinuous-v0"], "final_eval_episodes": 1},
        {"tasks": ["CartPole-v1"], "actor": "ds_moe", "learning_rate_schedule": "kl"},
    ],
    ids=["plain", "sphere, normalised", "rl, two tasks", "discrete, kl"],
)
def test_a_run_stopped_at_every_row_ends_bitwise_as_one_that_was_not(
    tiny: TrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = override(tiny, changes)
    whole = train(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with RunFolder(stopped) as folder:
        folder.create(to_dict(config))
        stops = 0
        while folder.status().get("state") != "finished":
            # one row further each time: every row after the last checkpoint is cut off once and written again
            with contextlib.suppress(Stopped):
                protocol.resume(folder, lambda step, rows=stops + 1: [StopAfter(rows)])
            stops += 1
        assert stops > 2
    assert run_difference(whole, RunFolder(stopped)) is None


def test_a_run_killed_at_random_moments_ends_bitwise_as_one_that_was_not(tiny: TrainConfig, tmp_path: Path) -> None:
    """SIGKILL from outside, at moments that no code has chosen."""
    config = override(tiny, {"steps_per_task": 1024, "method": ["sphere"], "normalize_observations": True})
    whole = train(config, tmp_path / "whole")
    folder = RunFolder(tmp_path / "killed")
    with folder:
        folder.create(to_dict(config))
    kills = resume_until_finished(folder, seconds=0.5)
    assert kills > 2
    assert run_difference(whole, folder) is None


def wait_for_progress(process: subprocess.Popen[str], path: Path) -> None:
    """Until the process has added to a log, or has ended."""
    log = path / "train.jsonl"
    before = log.read_bytes() if log.exists() else b""
    while process.poll() is None and (not log.exists() or log.read_bytes() in (before, b"")):
        time.sleep(0.01)


@pytest.mark.slow
def test_metaworld_resumes_bitwise(tmp_path: Path) -> None:
    config = override(
        TrainConfig(),
        {"tasks": ["reach", "drawer-close"], "num_envs": 2, "num_steps": 256, "steps_per_task": 1536,
         "num_epochs": 2, "checkpoint_every": 512, "eval_every": 1024, "spectrum_every": 1024,
         "eval_episodes": 1, "final_eval_episodes": 1, "method": ["sphere"], "network": {"width": 32}},
    )  # fmt: skip
    whole = train(config, tmp_path / "whole")
    with RunFolder(tmp_path / "stopped") as folder:
        folder.create(to_dict(config))
        for rows in (2, 3):
            with pytest.raises(Stopped):
                protocol.resume(folder, lambda step, rows=rows: [StopAfter(rows)])
        protocol.resume(folder, lambda step: [])
    assert run_difference(whole, folder) is None


def test_ctrl_c_leaves_a_run_that_can_be_continued(tiny: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = override(tiny, {"steps_per_task": 64_000})
    with RunFolder(path) as folder:
        folder.create(to_dict(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "sphere_rl.cli", "resume", str(path), "--quiet"], stderr=subprocess.PIPE, text=True
    )
    wait_for_progress(process, path)
    while not list((path / "checkpoints").glob("step-*.pt")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert f"sphere resume {path}" in errors
    assert json.loads((path / "status.json").read_text())["state"] == "interrupted"


def test_a_failed_run_says_why(tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An infinite learning signal: weights from a rate so large that the first update destroys the policy."""
    from sphere_rl.cli import main

    path = tmp_path / "run"
    with RunFolder(path) as folder:
        folder.create(to_dict(override(tiny, {"learning_rate": 1e30, "max_grad_norm": 1e30})))
    assert main(["resume", str(path), "--quiet"]) == 3
    status = RunFolder(path).status()
    assert status["state"] == "failed"
    assert status["error"].startswith("TrainingError: task Pendulum-v1, iteration 1: minibatch ")
    assert capsys.readouterr().err.count("\n") == 1


def test_load_policy_gives_the_trained_policy(tiny: TrainConfig, tmp_path: Path) -> None:
    folder = train(override(tiny, {"normalize_observations": True, "protocol": "rl"}), tmp_path / "run")
    final, task = load_policy(folder.path), load_policy(folder.path, "task-00-Pendulum-v1")
    observation = torch.randn(4, 3)
    torch.testing.assert_close(final(observation), task(observation))
    state = checkpoint.load(checkpoint.find(folder, "task-00-Pendulum-v1"))["agent"]
    torch.testing.assert_close(final.mean, state["normalizer"]["mean"])
    for name, parameter in final.actor.named_parameters():
        assert torch.equal(parameter, state["actor"][name])


def test_a_run_that_is_stopped_while_it_is_restored_says_so(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status was that of the process that was killed before."""
    from sphere_rl.cli import main

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with RunFolder(tmp_path / "run") as folder:
        folder.create(to_dict(tiny))
        folder.set_status("running", 128, "Pendulum-v1", rollbacks=["nan"])
    monkeypatch.setattr(checkpoint, "newest", stopped)
    assert main(["resume", str(folder.path), "--quiet"]) == 130
    assert folder.status() == {
        "state": "interrupted", "global_step": 128, "task": "Pendulum-v1", "error": None, "rollbacks": ["nan"],
    }  # fmt: skip


def test_versions_that_a_run_goes_on_with_are_told_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.create(to_dict(config("Drawing")))
        before, text = folder.record(), folder.config_path.read_text()
        folder.tell_changes()
        assert (folder.config_path.read_text(), capsys.readouterr().err) == (text, "")
        data = before | {"versions": before["versions"] | {"torch": "1.0"}, "commit": "0" * 40}
        folder.config_path.write_text(json.dumps(data))
        protocol.resume(folder, lambda step: [])
        (line,) = capsys.readouterr().err.splitlines()
        torch_now, commit = before["versions"]["torch"], before["commit"] or "unknown"
        assert line.endswith(f"run goes on with torch {torch_now} (was 1.0), commit {commit} (was {'0' * 40})")
        assert folder.record() == data | {"continued": [{name: before[name] for name in ("versions", "commit")}]}
        protocol.resume(folder, lambda step: [])
        assert capsys.readouterr().err == ""
