"""Observations and actions of more kinds than a flat box: made one, chosen several at once, learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_envs
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from gymnasium.vector import VectorEnv
from torch.distributions import Categorical, kl_divergence
from toy_runs import GYM, config, train

import sphere_rl as sp
from sphere_rl.cli import main
from sphere_rl.experts.heads import MultiCategoricalHead
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.runs import checkpoint
from sphere_rl.suites.spaces import LARGEST, action_sender

BRANCHES = (2, 3, 1, 4)


def test_several_choices_at_once_are_independent_ones() -> None:
    head, generator = MultiCategoricalHead(BRANCHES), torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 50, 10, generator=generator, dtype=torch.float64)
    action = head.sample(logits, generator)
    ours = [Categorical(logits=part) for part in logits.split(BRANCHES, 1)]
    theirs = [Categorical(logits=part) for part in other.split(BRANCHES, 1)]
    expected = sum(one.log_prob(action[:, i]) for i, one in enumerate(ours))
    torch.testing.assert_close(head.log_prob(logits, action), expected)
    torch.testing.assert_close(head.entropy(logits), sum(one.entropy() for one in ours))
    divergence = sum(kl_divergence(one, two) for one, two in zip(theirs, ours, strict=True))
    torch.testing.assert_close(head.kl(head.parameters_of(other), logits), divergence)
    assert head.mode(logits).tolist() == torch.stack([one.probs.argmax(1) for one in ours], 1).tolist()
    many = head.sample(logits[:1].expand(20_000, -1), generator)
    for i, one in enumerate(ours):
        share = torch.bincount(many[:, i], minlength=BRANCHES[i]).double() / len(many)
        torch.testing.assert_close(share, one.probs[0], atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "space",
    [
        spaces.MultiDiscrete([2, 3], start=[0, 5]),
        spaces.MultiDiscrete(np.array([[2, 2], [3, 4]]), np.int32),
        spaces.MultiBinary([2, 3]),
    ],
)
def test_sent_choices_belong_to_the_space(space: Any) -> None:
    sizes = space.nvec.flatten() if isinstance(space, spaces.MultiDiscrete) else np.full(6, 2)
    actions = torch.stack([torch.zeros(len(sizes), dtype=torch.long), torch.as_tensor(sizes) - 1])
    low, high = action_sender(space)(actions)
    assert space.contains(low)
    assert space.contains(high)
    start = getattr(space, "start", np.zeros(space.shape))
    np.testing.assert_array_equal(low, start)
    np.testing.assert_array_equal(high, start + sizes.reshape(space.shape) - 1)


def test_observations_are_flattened_as_gymnasium_does() -> None:
    toy_envs.Paired.shown.clear()
    envs = GYM.make("Paired-v0", 1, 0, 1)
    space = toy_envs.Paired.observation_space
    assert Spaces.of(envs).observation_dim == 2 + 6 + 4 + 3 + 2
    seen = [envs.reset()[0]] + [envs.step(envs.action_space.sample())[0] for _ in range(5)]
    for one, shown in zip(seen, toy_envs.Paired.shown, strict=True):
        np.testing.assert_array_equal(one[0], flatten(space, shown))
    one_hot = GYM.make("Numbered-v0", 3, 0, 1).reset()[0]
    assert one_hot.shape == (3, 5)
    assert (one_hot.sum(1) == 1).all()


@pytest.mark.parametrize(("task", "best"), [("Several", 16.0), ("Switches", 24.0)])
def test_right_choices_are_learned(task: str, best: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = {"num_steps": 32, "minibatch_size": 64, "num_epochs": 4, "learning_rate": 3e-2}
    run = train(config(task, steps_per_task=1280, checkpoint_every=1280, **fast), tmp_path / "run")
    assert run.read("eval")[-1]["mean_return"] >= 0.8 * best  # by chance 0.42 of it and 0
    assert np.isfinite([row["kl"] for row in run.read("train")]).all()
    path = str(run.path)
    assert main(["play", path, "--out", str(tmp_path / "film.gif")]) == 0
    assert main(["diagnose", path, "--proxy", "--batches", "1"]) == 0
    policy = sp.load_policy(path)
    assert policy(np.zeros(3)).shape == ({"Several": 5, "Switches": 12}[task],)
    saved = checkpoint.load(checkpoint.find(run, "latest"))["spaces"]
    assert Spaces(**saved).branches == {"Several": (2, 3), "Switches": (2,) * 6}[task]


@pytest.mark.parametrize("task", ["Named", "Numbered", "Paired"])
def test_such_observations_are_trained_on(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(config(task, normalize_observations=True, spectrum_every=32), tmp_path / "run")
    assert run.status()["state"] == "finished"
    assert all(row["r_e_K"] >= 1 for row in run.read("spectrum"))
    assert main(["play", str(run.path), "--out", str(tmp_path / "film.gif")]) == 0
    assert main(["evaluate", str(run.path), "--episodes", "2"]) == 0


@pytest.mark.parametrize("method", ["c_chain", "redo", "load_balance"])
def test_methods_take_several_choices(method: str, tmp_path: Path) -> None:
    run = train(config("Several", method=[method]), tmp_path / "run")
    assert run.status()["state"] == "finished"


def test_one_agent_needs_the_same_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "--suite",
        "gym",
        "--tasks",
        "toy_envs:Several-v0",
        "toy_envs:Switches-v0",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) == 2
    expected = "expected a task with 3 observations and 2 discrete actions of 2, 3 values as toy_envs:Several-v0 has"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_box_of_actions_keeps_its_bounds_and_an_open_side_is_a_number(dtype: type) -> None:
    """So that a checkpoint's and an export's are plain numbers; agents go from one box to another."""
    box = spaces.Box(np.array([-0.5, -np.inf], dtype), np.array([2.0, np.inf], dtype), dtype=dtype)
    envs: Any = VectorEnv()
    envs.single_action_space, envs.single_observation_space = box, spaces.Box(-1, 1, (3,))
    found = Spaces.of(envs)
    assert (found.low, found.high) == ((-0.5, -LARGEST), (2.0, LARGEST))
    assert found == Spaces(3, 2, discrete=False)
    assert found.box == (found.low, found.high)
    assert Spaces(3, 2, discrete=True).box is None
