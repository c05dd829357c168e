from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sphere_rl.cli import main
from sphere_rl.config import TrainConfig, from_dict, load_toml, override, preset, task_steps, to_dict
from sphere_rl.errors import CommandLineError, ConfigError
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.settings import TRAINS, settings
from sphere_rl.suites import make_suite
from sphere_rl.terminal.arguments import parse_train
from sphere_rl.terminal.options import GROUPS


def test_defaults_are_the_cw10_preset() -> None:
    c = TrainConfig()
    assert preset(make_suite("cw10")) == override(c, make_suite("cw10").preset)
    assert (c.num_envs, c.num_steps, c.minibatch_size, c.num_epochs) == (8, 2048, 256, 10)
    assert (c.learning_rate, c.learning_rate_end, c.adam_eps) == (3e-4, 1e-4, 1e-5)
    assert (c.gamma, c.gae_lambda, c.clip, c.max_grad_norm) == (0.99, 0.95, 0.2, 0.5)
    assert (c.network.width, c.network.depth, c.network.num_experts, c.network.top_k) == (256, 3, 10, 2)
    assert c.task_sequence[0] == "hammer"
    assert c.task_sequence[-1] == "peg-unplug-side"
    assert c.iterations_per_task == 61  # 1 000 000 // 16 384
    assert c.steps_of_task == task_steps(to_dict(c)) == 61 * 16_384


def test_h1_preset() -> None:
    c = preset(make_suite("h1"))
    assert (c.num_envs, c.num_steps, c.minibatch_size) == (128, 16, 64)
    assert (c.learning_rate_schedule, c.kl_target, c.learning_rate_bounds) == ("kl", 0.03, (1e-5, 1e-2))
    assert (c.normalize_observations, c.observation_clip, c.steps_per_task) == (True, 10.0, 10_000_000)
    assert (c.options.sphere.mode, c.options.sphere.rho) == ("grad", 0.001)
    assert c.task_sequence == ("stand", "walk", "pole", "slide", "run")


def test_plain_data_round_trip() -> None:
    config = override(TrainConfig(), {"tasks": ["push"], "sphere.rho": 0.3, "network": {"width": 32}, "seed": 4})
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("changes", [{}, {"scale": "free"}, {"scale": "free", "strength": 0.3}, {"strength": 2}])
def test_a_strength_that_is_not_given_stays_so(changes: dict[str, Any]) -> None:
    config = override(TrainConfig(), {"sphere": changes})
    words = [word for name, value in changes.items() for word in (f"--sphere.{name}", str(value))]
    assert parse_train(words)[0] == from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert config.options.sphere.strength == changes.get("strength")
    own = {"literal": 1e-3, "free": 0.1}[config.options.sphere.scale]
    assert config.options.sphere.fixed_strength == changes.get("strength", own)


def test_settings_are_told_apart_by_what_they_are_for() -> None:
    config = override(TrainConfig(), {"suite": "gym", "env_args.g": 1, "method": ["redo"], "seed": 3, "device": "meta"})
    recorded = to_dict(config) | {"of_another_version": 2}
    names, trained, all_of_them = (dict(settings(recorded, *roles)) for roles in (["names"], [TRAINS], []))
    assert [*names] == ["suite", "tasks", "protocol", "actor", "method", "label", "seed"]
    assert trained.keys() >= {"gamma", "checkpoint_every", "env_args.g", "network.width", "redo.threshold"}
    assert trained["of_another_version"] == 2
    assert all_of_them["seed"] == 3
    others = {"plugin", "device", "eval_every", "eval_max_steps", "spectrum_every", "on_nan", "env_timeout"}
    others |= {"log", "films", "env_threads", "torch_threads"}
    assert all_of_them.keys() == names.keys() | trained.keys() | others
    assert not trained.keys() & (others | {"sphere.rho", "seed"})


def test_runs_from_before_the_scale_had_the_literal_penalty() -> None:
    saved = to_dict(override(TrainConfig(), {"method": ["sphere"], "sphere": {"mode": "fixed", "scale": "free"}}))
    del saved["sphere"]["scale"]
    for strength in (1e-3, 0.2):
        found = from_dict(saved | {"sphere": saved["sphere"] | {"strength": strength}}).options.sphere
        assert (found.scale, found.mode, found.fixed_strength) == ("literal", "fixed", strength)


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('suite = "gym"\ntasks = ["Pendulum-v1"]\ngamma = 0.9\nseed = 3\n[sphere]\nrho = 0.5\n')
    config, out, quiet = parse_train(["--config", str(path), "--seed", "7", "--sphere.mode", "loss", "--quiet"])
    assert (config.suite, config.gamma, config.seed, config.num_steps) == ("gym", 0.9, 7, 256)
    assert (config.options.sphere.rho, config.options.sphere.mode) == (0.5, "loss")
    assert out == Path("runs/gym-crl-topk_moe-none-seed7")
    assert quiet


def test_an_option_of_a_method_that_is_not_in_use_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "sphere: sphere.rho, sphere.mode: no effect without method sphere (method: none)\n"
    assert override(TrainConfig(), {"sphere": {"rho": 0.3}, "sphere.mode": "loss"}).options.sphere.rho == 0.3
    assert capsys.readouterr().err == line
    (tmp_path / "run.toml").write_text("[sphere]\nrho = 0.5\n")
    refused = ["--config", str(tmp_path / "run.toml"), "--sphere.mode=loss", "--out", str(tmp_path), "--device", "moon"]
    assert main(["train", *refused]) == 2
    assert capsys.readouterr().err.startswith(line + "sphere: device")
    assert main(["train", *refused, "--method", "redo", "sphere"]) == 2
    assert capsys.readouterr().err.startswith("sphere: device")


@pytest.mark.parametrize("suite", ["h1", "gym"])
def test_presets_and_saved_runs_say_nothing(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = preset(make_suite(suite))
    assert from_dict(to_dict(config)) == config
    assert capsys.readouterr().err == ""


def test_gym_preset_is_small() -> None:
    c = preset(make_suite("gym"))
    assert (c.network.width, c.network.depth, c.network.num_experts, c.minibatch_size) == (64, 2, 10, 64)


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in [*vars(TrainConfig()), *vars(TrainConfig().network)]:
        if name not in ("network", "options"):
            assert f"--{name.replace('_', '-')}" in text
    assert "--sphere.rho" in text
    assert "Passes over each rollout (10)" in text
    assert "Units of a hidden layer (256)" in text
    assert "--spectrum-every N Environment steps between spectral measurements; 0: twenty" in text
    assert "Negative: never (0)" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--actor moe", "actor: 'moe' is not allowed; expected one of dense, wide"),
        ("--method redoo", "method: 'redoo' is not allowed; expected one or more of "),
        ("--method sphere sphere", "method: 'sphere sphere' is not allowed; expected each method once"),
        ("--tasks fly", "tasks: 'fly' is not allowed; expected tasks of cw10: "),
        ("--suite cw9", "suite: 'cw9' is not allowed; expected one of "),
        ("--gamma 1.5", "gamma: 1.5 is not allowed; expected 0 to 1"),
        ("--gamma abc", "argument --gamma: 'abc' is not allowed; expected a number"),
        ("--learning-rate nan", "learning_rate: nan is not allowed; expected a finite number above 0"),
        ("--num-envs 0", "num_envs: 0 is not allowed; expected a finite number above 0"),
        ("--minibatch-size 1", "minibatch_size: 1 is not allowed; expected 2 or more: the advantages"),
        ("--steps-per-task 1.5", "argument --steps-per-task: '1.5' is not allowed; expected a whole number"),
        ("--steps-per-task inf", "argument --steps-per-task: 'inf' is not allowed; expected a whole number"),
        ("--num-experts 2 --top-k 3", r"top_k: 3 is not allowed; expected 1 to num_experts \(2\)"),
        ("--critic shared_moe --num-experts 2 --num-shared 1", "num_shared: 1 is not allowed; expected 0 to 0"),
        ("--learning-rate-bounds 1e-5 inf", "learning_rate_bounds: .* is not allowed; expected two rates"),
        ("--minibatch-size 100", r"minibatch_size: 100 is not allowed; expected a divisor of .* \(16384\)"),
        ("--steps-per-task 100", r"steps_per_task: 100 is not allowed; expected at least one rollout \(16384 steps\)"),
        ("--sphere.rho -1", r"sphere.rho: -1.0 is not allowed; expected a finite number, 0 or more"),
        ("--sphere.mode hard", "argument --sphere.mode: invalid choice: 'hard'"),
        ("--top-k 11", r"top_k: 11 is not allowed; expected 1 to num_experts \(10\)"),
        ("--gama 1", r"unrecognized arguments: --gama 1 \(did you mean --gamma\?\)"),
        ("--config nowhere.toml", "config: 'nowhere.toml' is not allowed; expected a readable TOML file"),
    ],
)
def test_nonsense_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises((ConfigError, CommandLineError), match=message) as error:
        parse_train(words.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama = 1", r"gama: 1 is not allowed; expected a field \(did you mean gamma\?\): "),
        ("gamma = 'high'", "gamma: 'high' is not allowed; expected a value of type float"),
        ("seed = 1.5", "seed: 1.5 is not allowed; expected a value of type int"),
        (
            "torch_threads = 10_000",
            "torch_threads: 10000 is not allowed; expected auto, or a whole number from 1 to 1,024",
        ),
        ("seed = inf", "seed: inf is not allowed; expected a value of type int"),
        ("learning_rate_bounds = [0.1]", r"learning_rate_bounds: \[0.1\] is not allowed; expected a list of 2"),
        ("minibatch_size = 1", "minibatch_size: 1 is not allowed; expected 2 or more"),
        ("protocol = 'both'", "protocol: 'both' is not allowed; expected one of rl, crl"),
        ("[sphere]\nroh = 1", "sphere.roh: 1 is not allowed; expected a field: "),
        ("[spher]\nrho = 1", r"expected network, env_args or a method \(did you mean sphere\?\): "),
        ("gamma = ", "expected a readable TOML file"),
    ],
)
def test_nonsense_in_a_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_toml(path, TrainConfig())
    assert "\n" not in str(error.value)


def test_whole_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps_per_task = 2e6\neval_every = 3.0\n[redo]\nevery = 1e3\n")
    words = ["--config", str(path), "--checkpoint-every", "1e5", "--num-experts", "4.0", "--cbp.maturity", "1e2"]
    config, _, _ = parse_train(words)
    found = (config.steps_per_task, config.eval_every, config.checkpoint_every, config.network.num_experts)
    assert found == (2_000_000, 3, 100_000, 4)
    assert (config.options.redo.every, config.options.cbp.maturity) == (1000, 100)
    assert {type(value) for value in (*found, config.options.redo.every, config.options.cbp.maturity)} == {int}
    config, _, _ = parse_train(["--num-experts", "3", "--top-k", "3"])
    assert config.network.top_k == 3
    assert parse_train(["--actor", "dense", "--num-experts", "1"])[0].network.num_experts == 1


def test_every_kind_of_option_is_read() -> None:
    words = "--method --no-normalize_observations --crelu --sphere.pcgrad --sphere.no-pcgrad --load_balance.z -1e-3"
    with pytest.raises(ConfigError, match=r"load_balance.z: -0.001 is not allowed"):
        parse_train([*words.split()])
    words = "--suite h1 --no-normalize_observations --crelu --sphere.pcgrad --sphere.no-pcgrad --load_balance.z=2 "
    words += "--torch-threads 2 --env-threads auto --sphere.strength 3 --learning-rate-bounds 1e-4 1e-3 "
    words += "--spectrum-every -1e6"
    config, _, quiet = parse_train([*words.split(), "--label", "a b", "--tasks", "walk", "run"])
    assert (config.normalize_observations, config.network.crelu, config.options.sphere.pcgrad) == (False, True, False)
    assert (config.options.load_balance.z, config.options.sphere.strength) == (2.0, 3.0)
    assert (config.torch_threads, config.env_threads, config.spectrum_every) == (2, "auto", -1_000_000)
    assert (config.learning_rate_bounds, config.label, config.tasks) == ((1e-4, 1e-3), "a b", ("walk", "run"))
    assert parse_train(["--sphere.strength", "None"])[0].options.sphere.strength is None
    assert not quiet


@pytest.mark.parametrize("changes", [{"protocol": "x"}, {"tasks": 3}, {"gamma": True}])
def test_override_checks_types(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        override(TrainConfig(), changes)


def test_every_setting_has_a_flag() -> None:
    grouped = [name for names in GROUPS.values() for name in names.split()]
    own = {field.name for field in fields(TrainConfig)} - {"network", "options"}
    assert set(grouped) == own | {field.name for field in fields(NetworkOptions)}
    assert len(grouped) == len(set(grouped))
