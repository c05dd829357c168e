"""Environments as users bring them: by module, with arguments, without an end, with faults, with random streams of
the process. What goes right is right, and what goes wrong is said in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import toy_envs
from comparing import run_difference
from gymnasium import spaces
from toy_runs import CPU, GYM, WORDS, config, networks, train

from sphere_rl import protocol
from sphere_rl.cli import main
from sphere_rl.config import from_dict, override, to_dict
from sphere_rl.errors import ConfigError
from sphere_rl.learner.rollout import Collector
from sphere_rl.runs import RunFolder, checkpoint, file_name
from sphere_rl.seeding import seed_globals
from sphere_rl.suites import check_arguments, suites
from sphere_rl.suites.env_args import taken_from, value_of, word_of
from sphere_rl.suites.spaces import action_sender
from sphere_rl.training.agent import Policy
from sphere_rl.training.evaluation import MAX_STEPS, evaluate

# Evaluation that has no end


def test_an_evaluation_without_an_end_is_ended_and_counted(capfd: pytest.CaptureFixture[str]) -> None:
    policy = Policy(networks(2)[0], None)
    first, second = (evaluate(policy, GYM, "Endless-v0", 23, seed=3, max_steps=41) for _ in range(2))
    assert first == second
    assert (first.episodes, first.mean_return, first.std_return, first.mean_length) == (23, 41.0, 0.0, 41.0)
    assert (first.success_final, first.success_once) == (1.0, 1.0)
    said = capfd.readouterr().err
    assert said == "sphere: Endless-v0: an episode was ended after 41 steps (eval_max_steps)\n"  # once
    assert evaluate(policy, GYM, "Drawing-v0", 3, seed=3, max_steps=toy_envs.LENGTH).mean_length == toy_envs.LENGTH
    assert capfd.readouterr().err == ""  # these ended by themselves
    assert evaluate(policy, GYM, "Endless-v0", 2, seed=3, max_steps=2).success_once == 0.0


def test_episodes_after_one_that_was_ended_begin_with_a_reset() -> None:
    class Resets(toy_envs.Toy):
        seen: list[int] = []  # noqa: RUF012

        def reset(self, **kwargs: Any) -> Any:
            self.seen.append(self.steps)
            return super().reset(**kwargs)

        def ends(self) -> bool:
            return False

    make: Any = Resets
    gymnasium.register("Resets-v0", entry_point=make)
    try:
        evaluate(Policy(networks(2)[0], None), GYM, "Resets-v0", 21, seed=0, max_steps=5)
    finally:
        del gymnasium.registry["Resets-v0"]
    assert len(Resets.seen) == 21  # ten environments, ten more, and one


def test_no_task_is_as_long_as_an_evaluation_may_be() -> None:
    longest = max(spec.max_episode_steps or 0 for spec in gymnasium.registry.values())
    assert max(longest, 1000) < MAX_STEPS


class Killed(Exception):
    """What a hanging evaluation is stopped by."""


@pytest.mark.parametrize(
    ("protocol_name", "phase"),
    [("rl", "train"), ("rl", "final"), ("crl", "train"), ("crl", "final"), ("crl", "retention")],
)
def test_the_checkpoint_comes_before_the_evaluation(
    protocol_name: str, phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("Drawing", eval_every=32, eval_episodes=1, protocol=protocol_name)
    settings = override(settings, {"tasks": settings.tasks * (2 if phase == "retention" else 1)})
    whole = train(settings, tmp_path / "whole")
    original = evaluate

    def hang(*args: Any, **kwargs: Any) -> Any:
        if kwargs["phase"] == f"{phase} evaluation":
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(protocol, "evaluate", hang)
    folder = RunFolder(tmp_path / "killed")
    with pytest.raises(Killed):
        train(settings, folder.path)
    step = {"train": 32, "final": 64, "retention": 128}[phase]
    assert checkpoint.run_checkpoints(folder)[-1].stem == f"step-{step:012d}"
    assert folder.status()["state"] == "failed"
    with folder, pytest.raises(Killed):  # still the same, and nothing is lost
        protocol.resume(folder, lambda step: [])
    assert len(folder.read("train")) == step // 32
    monkeypatch.undo()
    with folder:
        protocol.resume(folder, lambda step: [])
    assert run_difference(whole, folder) is None


def test_a_run_of_an_endless_task_finishes_and_can_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["train", *WORDS, "--tasks", "toy_envs:Endless-v0", "--out", run, "--quiet"]) == 0
    rows = RunFolder(run).read("eval")
    assert [(row["phase"], row["mean_length"], row["episodes"]) for row in rows] == [("final", 40.0, 3)]
    assert Path(run, "checkpoints", "task-00-toy_envs_Endless-v0.pt").is_file()
    capsys.readouterr()
    for words, length in ([], 40.0), (["--eval-max-steps", "15"], 15.0), (["--max-steps", "1e1"], 10.0):
        assert main(["evaluate", run, "--episodes", "2", "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["mean_length"] == length
    assert main(["play", run, "--out", str(tmp_path / "film.gif"), "--max-steps", "30"]) == 0
    assert "30 steps" in capsys.readouterr().out


# Actions and observations as they are


def test_discrete_actions_count_from_their_start(tmp_path: Path) -> None:
    sent = toy_envs.FromMinusOne.sent
    actor, critic = networks(3, discrete=True)
    sent.clear()
    collector = Collector(GYM.make("FromMinusOne-v0", 2, 0, 1), None, CPU)
    rollout = collector.collect(actor, critic, 64, torch.Generator().manual_seed(0))
    assert sent == (rollout.action.flatten() - 1).tolist()
    assert set(sent) == {-1, 0, 1}
    assert rollout.reward.flatten().tolist() == sent
    sent.clear()
    actor.experts.head.bias.data[..., 0] = 100.0
    result = evaluate(Policy(actor, None), GYM, "FromMinusOne-v0", 2, seed=0)
    assert (set(sent), result.mean_return) == ({-1}, -8.0)
    run = train(config("FromMinusOne"), tmp_path / "run")
    assert main(["play", str(run.path), "--out", str(tmp_path / "film.gif")]) == 0
    assert main(["diagnose", str(run.path), "--proxy", "--batches", "1"]) == 0


def test_actions_are_inside_the_box_and_of_its_dtype() -> None:
    toy_envs.Wide.sent.clear()
    actor, critic = networks(3)
    collector = Collector(GYM.make("Wide-v0", 2, 0, 1), None, CPU)
    rollout = collector.collect(actor, critic, 64, torch.Generator().manual_seed(0))
    sent = np.stack(toy_envs.Wide.sent)  # each was in the space, or the environment had refused it
    assert sent.dtype == np.float64
    np.testing.assert_array_equal(sent[:, 0], rollout.action[..., 0].flatten().double())
    assert (sent[:, 1].min(), sent[:, 1].max(), sent[:, 2].min()) == (0.0, 0.3, -0.1)
    evaluate(Policy(actor, None), GYM, "Wide-v0", 2, seed=0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sent_actions_belong_to_the_space(dtype: Any) -> None:
    space = spaces.Box(np.array([-0.1, -np.inf], dtype), np.array([0.7, 1 / 3], dtype), dtype=dtype)
    actions = torch.tensor([[-5.0, -5.0], [5.0, 5.0], [0.1, 0.2], [0.7, 1 / 3]])
    for action in action_sender(space)(actions):
        assert space.contains(action)
    whole = spaces.Discrete(4, start=7)
    assert [whole.contains(action) for action in action_sender(whole)(torch.arange(4))] == [True] * 4


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("Whole", "a task whose Box of actions has real numbers, not Box"),
        ("Mixed", "a task with a flat Box of actions or discrete ones, not Tuple"),
        ("Growing", "a task with observations of Box and Discrete, Dict and Tuple, not Dict('a': Sequence"),
        ("Nothing", "an environment that can be made (AssertionError: "),
        ("Given", "an environment that can be made (TypeError: "),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    task: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *WORDS, "--tasks", f"toy_envs:{task}-v0", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sphere: tasks: 'toy_envs:{task}-v0' is not allowed; expected {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:.*share an object")
def test_an_environment_that_reuses_its_array_bootstraps_from_its_true_last_observation() -> None:
    actor, critic = networks(2)
    collector = Collector(GYM.make("OneArray-v0", 2, 0, 1), None, CPU)
    rollout = collector.collect(actor, critic, 20, torch.Generator().manual_seed(0))
    steps = [t % toy_envs.LENGTH for t in range(20)]
    assert rollout.observation[:, 0, 0].tolist() == steps
    following = critic(torch.tensor([step + 1.0 for step in steps])[:, None].expand(-1, 3)).detach()
    torch.testing.assert_close(rollout.next_value, following.expand(-1, 2))


def test_a_vector_environment_may_reuse_its_arrays() -> None:
    class Reusing(gymnasium.vector.SyncVectorEnv):
        kept: tuple[np.ndarray, ...] | None = None

        def step(self, actions: Any) -> Any:
            *found, info = super().step(actions)
            self.kept = self.kept or tuple(np.empty_like(array) for array in found)
            for own, new in zip(self.kept, found, strict=True):
                own[:] = new
            return (*self.kept, info)

    make = [lambda: gymnasium.make("Drawing-v0")] * 2
    actor, critic = networks(2)
    rollouts = []
    for kind in (gymnasium.vector.SyncVectorEnv, Reusing):
        seed_globals(0)
        collector = Collector(kind(make, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP), None, CPU)
        rollouts.append(collector.collect(actor, critic, 20, torch.Generator().manual_seed(0)))
    for name in ("observation", "reward", "terminated", "done", "next_value"):
        assert torch.equal(getattr(rollouts[0], name), getattr(rollouts[1], name)), name


# Modules, arguments, time limits


def test_a_module_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "faulty_envs.py").write_text("raise OSError('no licence')")
    for task, message in (
        ("nowhere_envs:Any-v0", "a module that can be imported before the colon (ModuleNotFoundError: No module"),
        ("faulty_envs:Any-v0", "a module that can be imported before the colon (OSError: no licence)"),
        ("toy_envs:Nope-v0", "a registered Gymnasium id"),
    ):
        with pytest.raises(ConfigError) as error:
            GYM.make(task, 1, 0, 1)
        assert str(error.value).startswith(f"tasks: '{task}' is not allowed; expected {message}")
        assert "\n" not in str(error.value)


def test_names_of_tasks_become_names_of_files() -> None:
    assert file_name("cw10-push-wall_v3.1") == "cw10-push-wall_v3.1"  # as ever
    assert file_name("A/B-v0") == "A_B-v0"
    assert file_name("my.module:ns/Env-v0") == "my.module_ns_Env-v0"
    assert not set(file_name('a\\b|c*d?e"f<g>h i\nj')) & set('\\|*?"<> \n')


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1", 1), ("-2", -2), ("1.5", 1.5), ("1e3", 1000.0), ("true", True), ("False", False), ("8x8", "8x8"),
        ('"1"', "1"), ("a b, c", "a b, c"), ("1, 2", "1, 2"), ("[1]", "[1]"), ("", ""), ("a=b", "a=b"),
        ("1]\nx=[2", "1]\nx=[2"), ("2020-01-01", "2020-01-01"), ("/a/b.stl", "/a/b.stl"), ('say "x"', 'say "x"'),
    ],
)  # fmt: skip
def test_words_are_typed_and_back(word: str, value: Any) -> None:
    assert value_of(word) == value
    assert type(value_of(word)) is type(value)
    assert value_of(word_of(value)) == value
    assert type(value_of(word_of(value))) is type(value)


def test_arguments_stand_anywhere_and_the_last_one_holds() -> None:
    words = "--seed 1 --env-args g=1 name=a=b --tasks x --env_args.flag=true --env-args.g 2 --env-argsy 3".split()
    found, rest = taken_from(words)
    assert found == {"g": 2, "name": "a=b", "flag": True}
    assert rest == "--seed 1 --tasks x --env-argsy 3".split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--env-args"], "env_args: '' is not allowed; expected key=value"),
        (["--env-args", "g"], "env_args: 'g' is not allowed; expected key=value"),
        (["--env-args", "g=nan"], "env_args.g: nan is not allowed; expected a finite number"),
        (["--env-args", "g=1", "x=2"], "expected arguments with which toy_envs:Given-v0 can be made (TypeError"),
        (["--env-args", "g=1", "num_envs=2"], "env_args.num_envs: 2 is not allowed; expected another argument than"),
        (["--max-episode-steps", "-1"], "max_episode_steps: -1 is not allowed"),
        (["--eval-max-steps", "0"], "eval_max_steps: 0 is not allowed"),
        (
            ["--suite", "cw10", "--tasks", "push", "--env-args", "g=1"],
            "env_args.g: 1 is not allowed; expected an argument that suite cw10 takes: none",
        ),
        (
            ["--suite", "cw10", "--tasks", "push", "--max-episode-steps", "9"],
            "max_episode_steps: 9 is not allowed; expected an argument that suite cw10 takes: none",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", *WORDS, "--tasks", "toy_envs:Given-v0", "--out", str(tmp_path / "run"), *words]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_arguments_in_files_and_configurations(tmp_path: Path) -> None:
    settings = config("Given", env_args={"g": 2, "name": "x"})
    assert from_dict(json.loads(json.dumps(to_dict(settings)))) == settings
    assert hash(settings) == hash(config("Given", **{"env_args.name": "x", "env_args.g": 2}))
    assert to_dict(settings)["env_args"] == {"g": 2, "name": "x"}
    assert override(settings, {"env_args.g": 3}).env_args == {"g": 3, "name": "x"}
    for value in ([1], {"a": 1}, None):
        with pytest.raises(ConfigError, match=r"env_args\.g: "):
            override(settings, {"env_args": {"g": value}})
    with pytest.raises(ConfigError, match="expected a table of arguments"):
        override(settings, {"env_args": 3})


def test_a_suite_says_by_its_signature_which_arguments_it_takes() -> None:
    class Own:
        name, summary, tasks, all_tasks, same_spaces, preset = "own", "", (), (), True, {}

        def make(self, task: str, count: int, seed: int, threads: int, gravity: float = 9.8) -> Any: ...

        def render_env(self, task: str, seed: int, gravity: float = 9.8) -> Any: ...

    own: Any = Own()
    check_arguments(own, {"gravity": 1.6})
    with pytest.raises(ConfigError, match=r"env_args\.count: 1 is not allowed; expected an argument .* takes: gravity"):
        check_arguments(own, {"count": 1})
    for suite in suites().values():
        check_arguments(suite, {})


def test_arguments_and_limits_reach_every_environment_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('max_episode_steps = 5\n[env_args]\ng = 9\nname = "1"\n')
    run = str(tmp_path / "run")
    words = ["--tasks", "toy_envs:Given-v0", "--config", str(path), "--env-args", "g=2.5", "--spectrum-every", "32"]
    assert main(["train", *WORDS, *words, "--out", run, "--quiet"]) == 0
    folder = RunFolder(run)
    assert folder.config()["env_args"] == {"g": 2.5, "name": "1"}
    assert {row["mean_return"] for log in ("train", "eval") for row in folder.read(log)} == {12.5}
    assert {row["mean_length"] for row in folder.read("eval")} == {5.0}
    capsys.readouterr()
    assert main(["evaluate", run, "--episodes", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_return"] == 12.5
    assert main(["play", run, "--out", str(tmp_path / "film.gif")]) == 0
    assert "5 steps, return 12.5" in capsys.readouterr().out
    assert main(["diagnose", run, "--proxy", "--batches", "1"]) == 0


# Sweeps


def test_a_sweep_over_arguments_trains_in_processes_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ["--suite", "gym", "--tasks", "toy_envs:Given-v0", "--methods", "none", *WORDS[2:], "--jobs", "1"]
    grid = ["--grid", "env_args.g", "1.5", "4", "--env-args", "name=a/b", "--protocols", "rl", "--steps-per-task", "64"]
    assert main(["sweep", *words, *grid, "--out", str(out)]) == 0
    names = [f"gym-rl-toy_envs_Given-v0-topk_moe-none-g{g}-seed0" for g in ("1.5", "4")]
    assert sorted(path.name for path in out.iterdir() if path.name.startswith("gym")) == names
    for name, total in zip(names, (12.0, 32.0), strict=True):
        assert {row["mean_return"] for row in RunFolder(out / name).read("eval")} == {total}
        assert RunFolder(out / name).config()["env_args"]["name"] == "a/b"


def test_a_run_knows_after_a_resume_too_that_its_environment_tells_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first episode of the training succeeds, and only it names success: all later ones had none."""
    monkeypatch.setattr(toy_envs.Boasting, "episodes", 0)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    settings = config("Boasting", env_args={"every": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path)
    with RunFolder(tmp_path) as folder:
        protocol.resume(folder, lambda step: [])
    assert [row["success_once"] for row in folder.read("train")] == [0.25, 0.0]
    assert [row["success_once"] for row in folder.read("eval")] == [0.0]
