"""Environments that give what is no number, or draw from the random streams of the process."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_envs
from comparing import run_difference
from stopping import train_in_pieces
from toy_runs import CPU, GYM, WORDS, config, networks, train

from sphere_rl import protocol
from sphere_rl.cli import main
from sphere_rl.config import override
from sphere_rl.errors import TrainingError
from sphere_rl.learner.rollout import Collector
from sphere_rl.runs import RunFolder
from sphere_rl.seeding import global_streams
from sphere_rl.suites.spaces import check_numbers
from sphere_rl.training.agent import Policy
from sphere_rl.training.evaluation import evaluate

# Numbers that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_fault_of_the_environment_is_said_as_that(
    what: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    words = ["--tasks", "toy_envs:Broken-v0", "--env-args", f"what={what}", "at=5", "value=0.5"]
    assert main(["train", *WORDS, *words, "--out", run, "--quiet"]) == 0
    monkeypatch.setattr(toy_envs.Broken, "__init__", _broken(what, value))
    capsys.readouterr()
    assert main(["evaluate", run, "--json"]) == 3
    place = {"observation": "the observation[1]", "reward": "the reward"}[what]
    fault = f"environment 0: {place} is {value}, not a finite float32 number"
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"sphere: task toy_envs:Broken-v0, evaluation, step 5: {fault}\n")

    assert main(["train", *WORDS, *words, "--out", f"{run}2", "--quiet"]) == 3
    line = f"task toy_envs:Broken-v0, iteration 1: rollout step 5 of 16: {fault}"
    assert capsys.readouterr().err == f"sphere: {line}\n"
    assert RunFolder(f"{run}2").status()["error"] == f"TrainingError: {line}"


def _broken(what: str, value: float) -> Any:
    def init(self: toy_envs.Broken, **kwargs: Any) -> None:
        toy_envs.Toy.__init__(self)
        self.what, self.value, self.at = what, value, 5

    return init


@pytest.mark.parametrize("phase", ["train", "final", "retention"])
def test_a_fault_in_an_evaluation_names_its_phase(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = evaluate

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if kwargs["phase"] == f"{phase} evaluation":
            kwargs["arguments"] = {"what": "reward", "value": float("inf")}
        return original(*args, **kwargs)

    monkeypatch.setattr(protocol, "evaluate", breaks)
    arguments = {"what": "reward", "value": 1.0}
    settings = config("Broken", env_args=arguments, eval_every=32, eval_episodes=1)
    with pytest.raises(TrainingError, match=f"task toy_envs:Broken-v0, {phase} evaluation, step 5: .*reward is inf"):
        train(override(settings, {"tasks": settings.tasks * 2}), tmp_path / "run")  # one task has no retention


def test_the_environment_at_fault_is_named() -> None:
    values = np.zeros((4, 3))
    check_numbers("x", values)
    values[2, 1] = -np.inf
    with pytest.raises(TrainingError, match=r"environment 2: x\[1\] is -inf"):
        check_numbers("x", values)
    with pytest.raises(TrainingError, match=r"environment 7: x\[1\] is -inf"):
        check_numbers("x", values, np.array([0, 3, 7, 9]))
    check_numbers("x", np.array([0, 255], np.uint8))
    check_numbers("x", np.array([True]))


@pytest.mark.filterwarnings("ignore:.*within the observation space", "ignore:.*NaN")
def test_a_last_observation_at_fault_is_named_with_its_environment() -> None:
    envs = GYM.make("Broken-v0", 2, 0, 1, what="observation", value=float("nan"), at=toy_envs.LENGTH)
    collector = Collector(envs, None, CPU)
    with pytest.raises(TrainingError, match=r"step 8 of 16: environment 0: the last observation of an episode\[1\]"):
        collector.collect(*networks(2), 16, torch.Generator())
    with pytest.raises(TrainingError, match=r"environment 0: the observation of the reset\[1\] is nan"):
        Collector(GYM.make("Broken-v0", 2, 0, 1, what="observation", value=float("nan"), at=0), None, CPU)


@pytest.mark.parametrize("protocol_changes", [{}, {"method": ["sphere"]}, {"learning_rate_schedule": "kl"}], ids=str)
def test_a_standard_deviation_that_explodes_is_said_as_that(protocol_changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {"entropy_coefficient": 1e3, "learning_rate": 1.0, "steps_per_task": 3200, "max_episode_steps": 50}
    changes |= {"learning_rate_end": 1.0, "learning_rate_bounds": [0.5, 1.0], "checkpoint_every": 3200}
    with pytest.raises(TrainingError, match="the policy's standard deviation has exploded") as error:
        train(config("Wide", **changes | protocol_changes), tmp_path / "run")
    assert "log σ = " in str(error.value)
    assert "\n" not in str(error.value)


# Random streams of the process


def numpy_stream() -> list[int]:
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].tolist()


def test_runs_of_environments_that_draw_from_global_streams_are_repeated_and_resumed_bitwise(tmp_path: Path) -> None:
    settings = config(
        "Drawing", steps_per_task=128, checkpoint_every=64, eval_every=32, eval_episodes=1, spectrum_every=32
    )
    before = numpy_stream()
    whole = train(settings, tmp_path / "whole")
    assert numpy_stream() == before
    np.random.rand(17)  # noqa: NPY002
    torch.rand(3)
    assert run_difference(whole, train(settings, tmp_path / "again")) is None
    unmeasured = train(override(settings, {"spectrum_every": -1}), tmp_path / "unmeasured")
    assert [row["mean_return"] for row in unmeasured.read("eval")] == [row["mean_return"] for row in whole.read("eval")]
    assert [row["value_loss"] for row in unmeasured.read("train")] == [row["value_loss"] for row in whole.read("train")]
    other = train(override(settings, {"seed": 1}), tmp_path / "other")
    assert other.read("train")[0]["value_loss"] != whole.read("train")[0]["value_loss"]
    folder, begun = train_in_pieces(settings, tmp_path / "stopped")
    assert begun > 3
    assert run_difference(whole, folder) is None


def test_an_evaluation_repeats_and_leaves_the_global_streams_as_they_were() -> None:
    policy, seen = Policy(networks(2)[0], None), []
    for draws in range(2):
        np.random.rand(draws)  # noqa: NPY002
        torch.rand(draws)
        before = numpy_stream(), torch.get_rng_state().tolist()
        seen.append(evaluate(policy, GYM, "Drawing-v0", 3, seed=5))
        assert before == (numpy_stream(), torch.get_rng_state().tolist())
    assert seen[0] == seen[1]


def test_global_streams_take_every_seed_that_a_run_may_have() -> None:
    """NumPy's own reads 32 bits."""
    drawn = set()
    for seed in (0, 2**32 - 1, 2**32 + 1, 2**63 - 1):
        with global_streams(seed):
            drawn.add((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002
    assert len(drawn) == 4


def test_all_three_global_streams_are_seeded_and_restored() -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    inside = []
    for _ in range(2):
        before = random.getstate(), numpy_stream(), torch.get_rng_state().tolist()
        with global_streams(7):
            inside.append(drawn())
        after = random.getstate(), numpy_stream(), torch.get_rng_state().tolist()
        assert before == after
        drawn()
    assert inside[0] == inside[1]
    with global_streams(8):
        assert not set(drawn()) & set(inside[0])


def test_the_command_line_may_be_called_from_any_thread(tmp_path: Path) -> None:
    codes: list[int] = []
    words = ["train", *WORDS, "--tasks", "toy_envs:Drawing-v0", "--out", str(tmp_path / "run"), "--quiet"]
    thread = threading.Thread(target=lambda: codes.append(main(words)))
    thread.start()
    thread.join()
    assert codes == [0]
    assert RunFolder(tmp_path / "run").status()["state"] == "finished"
