"""A number that is not finite, wherever it arises, stops the run there, or takes it back; no log has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import toy_envs
from comparing import run_difference
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stopping import train_in_pieces
from toy_runs import WORDS, config, train

from sphere_rl import protocol
from sphere_rl.cli import main
from sphere_rl.errors import TrainingError
from sphere_rl.runs import LOGS, RunFolder, checkpoint
from sphere_rl.training.agent import Agent
from sphere_rl.training.finite import bad_number

UPDATE: Any = vars(protocol)["update"]


def read_all(folder: RunFolder) -> list[dict[str, Any]]:
    """Every line, by a parser that refuses NaN."""
    return [row for log in LOGS for row in folder.read(log)]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1.0, {"b": float("nan")}]}, "a[1].b is nan"),
        ({"a": torch.tensor([[1.0, 2.0], [3.0, -float("inf")]])}, "a[1, 1] is -inf"),
        ({"a": np.array([1.0, np.inf])}, "a[1] is inf"),
        ({"a": torch.tensor(float("nan"))}, "a is nan"),
        ({"a": (1, True, "nan", None, torch.tensor([3]), torch.zeros(0), np.zeros(2, np.uint8))}, None),
    ],
)
def test_the_first_bad_number_is_named(state: Any, message: str | None) -> None:
    assert bad_number(state) == message


def poison(place: str, value: float, at: int) -> Any:
    """An ``update`` that leaves such a number in one part of the agent, after so many calls."""
    original, calls = UPDATE, 0

    def update(agent: Agent, *args: Any) -> dict[str, float]:
        nonlocal calls
        found = original(agent, *args)
        calls += 1
        if calls == at:
            with torch.no_grad():
                if place == "optimizer":
                    next(iter(agent.critic_optimizer.state.values()))["exp_avg"].view(-1)[1] = value
                else:
                    list(getattr(agent, place).parameters())[-1].view(-1)[0] = value
        return found

    return update


PLACES = {"actor": r"actor\.\S+", "critic": r"critic\.\S+", "optimizer": r"critic_optimizer\.state\.\S+"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_weights_and_moments_are_looked_at_before_anything_is_logged(
    place: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "update", poison(place, value, at=4))
    folder = RunFolder(tmp_path / "run")
    message = rf"^task toy_envs:Drawing-v0, iteration 4: after the update {PLACES[place]}(\[.*\])? is {value}$"
    with pytest.raises(TrainingError, match=message):
        train(config("Drawing", steps_per_task=160), folder.path)
    assert [row["iteration"] for row in folder.read("train")] == [1, 2, 3]
    assert folder.status()["state"] == "failed"
    assert folder.status()["global_step"] == 96
    for path in checkpoint.run_checkpoints(folder):
        assert bad_number(checkpoint.load(path)) is None
    monkeypatch.undo()
    with folder:  # what was left is as good as ever
        protocol.resume(folder, lambda step: [])
    assert run_difference(train(config("Drawing", steps_per_task=160), tmp_path / "whole"), folder) is None


def test_what_bad_weights_make_others_raise_is_said_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that decomposes matrices meets the NaN before any check of this library does."""

    def update(agent: Agent, *args: Any) -> Any:
        with torch.no_grad():
            next(agent.actor.parameters()).fill_(float("nan"))
        return torch.linalg.eigvalsh(torch.full((3, 3), float("nan")))

    monkeypatch.setattr(protocol, "update", update)
    with pytest.raises(TrainingError, match=r"iteration 1: actor\.\S+\[0.*\] is nan \(.*LinAlgError"):
        train(config("Drawing"), tmp_path / "run")


def test_lists_in_logs_are_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"expert_load": [0.5, float("nan")]}

    monkeypatch.setattr("sphere_rl.training.tracker.measure", measure)
    with pytest.raises(TrainingError, match=r"iteration 2: expert_load\[1\] is nan in spectrum.jsonl"):
        train(config("Drawing", spectrum_every=64), tmp_path / "run")
    assert [row["iteration"] for row in read_all(RunFolder(tmp_path / "run"))] == [1]


# Going back


def test_a_run_goes_back_to_its_last_checkpoint_with_new_seeds_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "update", poison("actor", float("nan"), at=4))
    run = tmp_path / "run"
    words = ["train", *WORDS, "--steps-per-task", "160", "--checkpoint-every", "64", "--tasks", "toy_envs:Drawing-v0"]
    assert main([*words, "--on-nan", "rollback", "--out", str(run), "--quiet"]) == 0
    folder = RunFolder(run)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sphere: task toy_envs:Drawing-v0, iteration 4: after the update actor.")
    assert line.endswith(" is nan; back to step 64 with new seeds (on_nan)")
    status = folder.status()
    assert (status["state"], len(status["rollbacks"])) == ("finished", 1)
    assert line == f"sphere: {status['rollbacks'][0]}; back to step 64 with new seeds (on_nan)"
    rows = folder.read("train")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]  # the two after the checkpoint were made again
    assert [row.get("rollbacks") for row in rows] == [None, None, 1, 1, 1]
    monkeypatch.undo()
    whole = train(config("Drawing", steps_per_task=160, checkpoint_every=64), tmp_path / "whole").read("train")
    same = [a["value_loss"] == b["value_loss"] for a, b in zip(rows, whole, strict=True)]
    assert same == [True, True, False, False, False]
    for row in read_all(folder):
        json.dumps(row, allow_nan=False)


def test_a_run_that_meets_the_same_again_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = UPDATE
    calls = 0

    def update(agent: Agent, *args: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if len(folder.read("train")) == 2:
            raise TrainingError("minibatch 1 of 1: policy_loss = nan")
        return original(agent, *args)

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(protocol, "update", update)
    with pytest.raises(TrainingError, match="iteration 3: minibatch 1 of 1: policy_loss = nan"):
        train(config("Drawing", on_nan="rollback", steps_per_task=160, checkpoint_every=64), folder.path)
    assert calls == 2 + 1 + protocol.ROLLBACKS
    status = folder.status()
    assert (status["state"], len(status["rollbacks"])) == ("failed", protocol.ROLLBACKS)
    assert [row["iteration"] for row in folder.read("train")] == [1, 2]


def test_a_fault_of_the_environment_is_no_reason_to_go_back(tmp_path: Path) -> None:
    class Raises(toy_envs.Toy):
        def step(self, action: Any) -> Any:
            raise RuntimeError("no")

    make: Any = Raises
    gymnasium.register("Raises-v0", entry_point=make)
    try:
        with pytest.raises(TrainingError, match="step raised RuntimeError: no"):
            train(config("x", tasks=["Raises-v0"], on_nan="rollback"), tmp_path / "run")
    finally:
        del gymnasium.registry["Raises-v0"]
    assert "rollbacks" not in RunFolder(tmp_path / "run").status()


def test_a_run_that_went_back_is_resumed_bitwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows at which the first branch broke break it again, so an interruption before the next checkpoint is
    gone back from twice, to the same seeds."""
    original = UPDATE
    settings = config("Drawing", on_nan="rollback", steps_per_task=256, checkpoint_every=64)

    def update(agent: Agent, rollout: Any, *args: Any) -> dict[str, float]:
        if float(rollout.observation[0, 0, 0]) in broken:
            raise TrainingError("minibatch 1 of 1: policy_loss = nan")
        seen.append(float(rollout.observation[0, 0, 0]))
        return original(agent, rollout, *args)

    broken, seen = set[float](), list[float]()
    monkeypatch.setattr(protocol, "update", update)
    train(settings, tmp_path / "first")
    broken = {seen[2], seen[5]}
    whole = train(settings, tmp_path / "whole")
    assert len(whole.status()["rollbacks"]) >= 1
    folder, begun = train_in_pieces(settings, tmp_path / "stopped")
    assert begun > 2
    assert run_difference(whole, folder) is None


class Saved(VectorEnv):
    """Saves its stream; a reward is nan whenever that draws so, whatever the actions."""

    def __init__(self, num_envs: int, seed: int) -> None:
        self.num_envs, self.generator = num_envs, np.random.default_rng(seed)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space, self.single_action_space = Box(-1, 1, (3,)), Box(-1, 1, (2,))
        self.observation_space, self.action_space = (
            batch_space(space, num_envs) for space in (self.single_observation_space, self.single_action_space)
        )

    def reset(self, **_: Any) -> Any:
        return self.generator.uniform(-1, 1, (self.num_envs, 3)).astype(np.float32), {}

    def step(self, actions: Any) -> Any:
        none = np.zeros(self.num_envs, bool)
        reward = np.full(self.num_envs, np.nan if self.generator.random() < 1 / 60 else 1.0)
        return self.reset()[0], reward, none, none, {}

    def get_state(self) -> Any:
        return self.generator.bit_generator.state

    def set_state(self, state: Any) -> None:
        self.generator.bit_generator.state = state


def test_environments_that_save_their_streams_begin_new_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the old streams the same nan would come back each time."""

    def make(suite: Any, task: str, num_envs: int, seed: int, *_: Any, **__: Any) -> Any:
        return Saved(num_envs, seed)

    monkeypatch.setattr(protocol, "make_envs", make)
    monkeypatch.setattr(protocol.Run, "_evaluate", lambda *_: None)
    settings = [config("Drawing", on_nan="rollback", steps_per_task=128, seed=seed) for seed in range(6)]
    found = [train(one, tmp_path / str(one.seed)).status() for one in settings]
    assert {status["state"] for status in found} == {"finished"}
    assert sum(len(status.get("rollbacks", ())) for status in found) > 3
