"""Sweeps: the plan and its names, and real grids carried out, killed, finished and failed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from comparing import run_difference
from rich.console import Console

from sphere_rl import cli, protocol
from sphere_rl.commands import demo
from sphere_rl.errors import CommandLineError, ConfigError, StorageError
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.sweep import command, default_jobs, engines, parse
from sphere_rl.sweep.cost import calibrate, reason, speed_class, speeds, steps_left
from sphere_rl.sweep.display import LiveTable, last_row
from sphere_rl.sweep.engines import RETRIES, again
from sphere_rl.sweep.plan import Grid, load_grid, plan, preset_path, state, tell_idle_in
from sphere_rl.sweep.reuse import share, sources
from sphere_rl.terminal.arguments import parse_train
from sphere_rl.training.policies import load_policy

TRAIN = (
    "--num-envs 2 --num-steps 64 --minibatch-size 32 --num-epochs 1 --width 8 --depth 1 --num-experts 3 --top-k 1 "
    "--steps-per-task 256 --eval-every 128 --eval-episodes 1 --final-eval-episodes 1 --checkpoint-every 128 "
    "--spectrum-every -1"
).split()
GYM = ["--suite", "gym", "--tasks", "Pendulum-v1", *TRAIN]


def grid(**axes: object) -> Grid:
    return Grid(**({"suites": ("gym",), "tasks": ("Pendulum-v1",), "train": tuple(TRAIN)} | axes))  # type: ignore[arg-type]


def names(found: Grid) -> list[str]:
    return [run.name for run in plan(found, Path("nowhere"))]


def test_names_are_stable_and_readable() -> None:
    found = grid(protocols=("rl", "crl"), methods=("none", "sphere+layernorm"), seeds=(0, 3), tasks=("A/B-v0", "C"))
    assert names(found) == [
        f"gym-{place}-topk_moe-{method}-seed{seed}"
        for seed in (0, 3)
        for place, method in [
            ("rl-A_B-v0", "none"), ("rl-C", "none"), ("rl-A_B-v0", "sphere+layernorm"), ("rl-C", "sphere+layernorm"),
            ("crl", "none"), ("crl", "sphere+layernorm"),
        ]
    ]  # fmt: skip


def test_words_mean_the_planned_configuration() -> None:
    one, two = plan(grid(protocols=("rl",), methods=("sphere+layernorm",), tasks=("A", "B")), Path("out"))
    assert (one.config.task_sequence, two.config.task_sequence) == (("A",), ("B",))
    assert one.config.method == ("sphere", "layernorm")
    assert (one.config.protocol, one.config.network.width, one.folder.parent) == ("rl", 8, Path("out"))
    assert (one.steps, one.threads) == (256, 1)


def test_method_options_concern_their_method_only() -> None:
    found = grid(options=(("sphere.rho", ("0.01", "0.1")), ("learning-rate", ("0.001",))))
    assert names(found) == [
        "gym-crl-topk_moe-none-learning-rate0.001-seed0",
        "gym-crl-topk_moe-sphere-rho0.01-learning-rate0.001-seed0",
        "gym-crl-topk_moe-sphere-rho0.1-learning-rate0.001-seed0",
    ]
    assert [run.config.options.sphere.rho for run in plan(found, Path("out"))[1:]] == [0.01, 0.1]


def test_options_of_methods_that_no_run_uses_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*GYM, "--out", str(tmp_path), "--dry-run", "--grid", "redo.every", "1", "2", "--sphere.rho", "0.2"]
    assert tell(words, ["none", "redo"]) == ["sphere: sphere.rho: no effect without method sphere (method: none, redo)"]
    assert tell(words, ["none", "sphere"]) == [
        "sphere: redo.every: no effect without method redo (method: none, sphere)"
    ]
    arms = '[arms.a]\nmethod = "redo"\nsphere.rho = 0.1\n[arms.b]\nmethod = "sphere"\nsphere.rho = 0.2\n'
    (tmp_path / "arms.toml").write_text(arms)
    found = Grid(**load_grid(tmp_path / "arms.toml") | {"train": tuple(TRAIN), "suites": ("gym",), "tasks": ("P",)})
    tell_idle_in(found, plan(found, tmp_path))
    assert capsys.readouterr().err == "sphere: sphere.rho: no effect without method sphere (method: redo)\n"


def tell(words: list[str], methods: list[str]) -> list[str]:
    """The lines of a sweep's grid, that is planned and not carried out."""
    given, rest = parse([*words, "--methods", *methods])
    options = tuple((axis[0], tuple(axis[1:])) for axis in given.grid)
    found = Grid(suites=("gym",), tasks=("P",), methods=tuple(methods), options=options, train=tuple(rest))
    screen = io.StringIO()
    with contextlib.redirect_stderr(screen):
        tell_idle_in(found, plan(found, given.out))
    return screen.getvalue().splitlines()


@pytest.mark.parametrize(
    ("name", "runs", "steps"),
    [("replication", 12, 507_904), ("pilot", 22, 262_144), ("comparison", 6, 131_072), ("claim", 6, 1_000_000)],
)
def test_presets_are_grids_that_can_be_planned(name: str, runs: int, steps: int, tmp_path: Path) -> None:
    found = plan(Grid(**load_grid(preset_path(name))), tmp_path)
    assert len(found) == runs
    assert {run.config.steps_per_task for run in found} == {steps}
    assert preset_path(name).samefile(Path(__file__).parents[1] / "benchmarks" / f"{name}.toml")


def test_a_preset_is_named_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--preset",
        "replication",
        "--protocols",
        "crl",
        "--methods",
        "none",
        "--seeds",
        "7",
        "--out",
        str(tmp_path),
    ]
    run = RunFolder(tmp_path / "cw10-crl-topk_moe-none-seed7")
    with run:
        run.create({"steps_per_task": 1})
    assert cli.main(["sweep", *words]) == 2
    assert "cw10-crl-topk_moe-none-seed7" in capsys.readouterr().err  # that is the run it planned
    assert cli.main(["sweep", "--preset", "nope"]) == 2
    known = "bounded, claim, comparison, pilot, replication, silent"
    message = f"sphere: preset: 'nope' is not allowed; expected one of {known}\n"
    assert capsys.readouterr().err == message
    assert cli.main(["sweep", "--preset", "pilot", "--config", "x.toml"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_grid_file(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(
        'suites = ["gym"]\nseeds = [0, 1]\nmethods = ["sphere"]\ntasks = ["Pendulum-v1"]\n'
        '[grid]\n"sphere.rho" = [0.01, 0.1]\n[train]\nsteps_per_task = 4096\nsphere.pcgrad = true\n'
        "normalize_observations = false\nnetwork.width = 8\nlearning_rate_bounds = [0.1, 0.2]\n"
    )
    runs = plan(Grid(**load_grid(path)), tmp_path)
    assert [run.name for run in runs][:2] == ["gym-crl-topk_moe-sphere-rho0.01-seed0",
                                              "gym-crl-topk_moe-sphere-rho0.1-seed0"]  # fmt: skip
    config = runs[-1].config
    assert (len(runs), config.seed, config.options.sphere.rho, config.options.sphere.pcgrad) == (4, 1, 0.1, True)
    assert (config.steps_per_task, config.network.width, config.learning_rate_bounds) == (4096, 8, (0.1, 0.2))


ARMS = """
suites = ["gym"]
tasks = ["Pendulum-v1"]
seeds = [0, 1]
[train]
steps_per_task = 4096
[arms.none]
[arms.strong]
method = "sphere"
sphere.rho = 0.5
learning_rate = 1e-3
[arms.both]
method = ["sphere", "layernorm"]
"""
STAGES = """
[[stages]]
methods = ["none", "strong"]
[[stages]]
protocols = ["rl"]
methods = ["none", "both"]
seeds = [0]
[[stages]]
"""


def test_arms_are_methods_with_options_under_one_name(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(ARMS)
    runs = plan(Grid(**load_grid(path)), tmp_path)
    assert [run.name for run in runs] == [
        f"gym-crl-topk_moe-{arm}-seed{seed}" for seed in (0, 1) for arm in ("none", "strong", "both")
    ]
    none, strong, both = (run.config for run in runs[:3])
    assert (none.method, none.label, strong.method, strong.label) == (("none",), "none", ("sphere",), "strong")
    assert (strong.options.sphere.rho, strong.learning_rate, both.learning_rate) == (0.5, 1e-3, 3e-4)
    assert (both.method, both.label) == (("sphere", "layernorm"), "both")


def test_stages_go_one_after_the_other_and_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(ARMS + STAGES)
    first = [f"gym-crl-topk_moe-{arm}-seed{seed}" for seed in (0, 1) for arm in ("none", "strong")]
    second = [f"gym-rl-Pendulum-v1-topk_moe-{arm}-seed0" for arm in ("none", "both")]
    third = [f"gym-crl-topk_moe-both-seed{seed}" for seed in (0, 1)]  # what is left of the whole grid
    assert [run.name for run in plan(Grid(**load_grid(path)), tmp_path)] == first + second + third


def test_flags_win_in_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(ARMS + STAGES)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="seed: -1"):
        command(["--config", str(path), "--seeds", "-1", "--methods", "strong", "--out", str(out), "--dry-run"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[train]\nmethod = "layernorm"', "train.method"),
        ("[train]\nseed = 7", "train.seed"),
        ("[grid]\nseed = [1, 2]", "grid.seed"),
        ("[arms.mine]\nseed = 9", "arms.mine.seed"),
        ('[arms.mine]\nprotocol = "rl"', "arms.mine.protocol"),
    ],
)
def test_an_axis_is_set_nowhere_else(text: str, named: str, tmp_path: Path) -> None:
    """It would win over the axis, and folders' names would lie."""
    path = tmp_path / "grid.toml"
    path.write_text(f'suites = ["gym"]\ntasks = ["CartPole-v1"]\n{text}\n')
    with pytest.raises(ConfigError, match=f"{named}: 'set' is not allowed; expected the list"):
        plan(Grid(**load_grid(path)), tmp_path)


def test_an_axis_is_no_axis_of_options(tmp_path: Path) -> None:
    words = "--suite gym --tasks CartPole-v1 --grid seed 1 2 --dry-run --out"
    with pytest.raises(ConfigError, match=r"grid\.seed"):
        command([*words.split(), str(tmp_path)])


def test_whole_numbers_with_an_exponent(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text('seeds = [1e1]\n[grid]\n"eval_every" = [1e3]\n[train]\nsteps_per_task = 1e6\n')
    (run, _) = plan(Grid(**load_grid(path)), tmp_path)
    assert (run.config.seed, run.config.eval_every, run.config.steps_per_task) == (10, 1000, 1_000_000)
    assert run.name.endswith("seed10")
    given, rest = parse(["--seeds", "2e0", "--steps-per-task", "1e6"])
    assert (given.seeds, rest) == ([2], ["--steps-per-task", "1e6"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "3"], "--seed: not a flag of sphere sweep; expected --seeds"),
        (["--suites", "cw10"], "expected --suite"),
        (["--grid", "sphere.rho"], "--grid sphere.rho: expected at least one value"),
        (["--methods", "nonesuch"], "method: 'nonesuch' is not allowed"),
        (["--nonesuch", "1"], "nonesuch"),
        (["--jobs", "0"], "expected a whole number above 0"),
        (["--address", "auto"], "expected --engine ray"),
        (["--steps-per-task", "1"], "steps_per_task: 1 is not allowed"),
        (["--config", "nowhere.toml"], "config: 'nowhere.toml' is not allowed"),
        (["--methods", "sphere", "--grid", "sphere.rho", "0.1", "1e-1"], "it would be the same run as gym-crl-"),
    ],
)
def test_errors_are_one_line_before_anything_starts(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((CommandLineError, ConfigError)) as caught:
        command([*GYM, "--out", str(tmp_path / "out"), *words])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("speed = 3", "speed"),
        ('seeds = "0"', "seeds"),
        ("grid = 3", "grid"),
        ("= 3", "config"),
        ("arms = 3", "arms"),
        ("[arms]\nx = 3", "arms.x"),
        ("[[stages]]\nspeed = [3]", "stages"),
        ("[[stages]]\nseeds = 3", "stages"),
        ("stages = [3]", "stages"),
        ("[[stages]]\nmethods = [3]", "stages.methods"),
        ('suites = [["gym"]]', "suites"),
        ("protocols = [1]", "protocols"),
        ("actors = [{a = 1}]", "actors"),
        ("methods = [1]", "methods"),
        ("tasks = [1]", "tasks"),
    ],
)
def test_errors_of_a_grid_file(text: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^{field}: "):
        load_grid(path)


@pytest.mark.parametrize("table", ["train", "arms.x"])
def test_a_file_in_a_grid_file_has_a_name(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(f'suites = ["gym"]\ntasks = ["Pendulum-v1"]\n[{table}]\nconfig = []\n')
    assert cli.main(["sweep", "--config", str(path), "--out", str(tmp_path / "s")]) == 2
    assert capsys.readouterr().err == "sphere: argument --config: expected one argument\n"


@pytest.mark.parametrize("text", ["seeds = []", "methods = []", "[grid]\ngamma = []", "[[stages]]\nseeds = []"])
def test_an_axis_without_values_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^\w+: \[\] is not allowed; expected at least one value$"):
        command([*GYM, "--config", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_own_words_and_those_of_train() -> None:
    given, rest = parse(["--seeds", "0", "1", "--num-envs", "4", "--out", "x", "--sphere.rho", "0.1"])
    assert (given.seeds, str(given.out), rest) == ([0, 1], "x", ["--num-envs", "4", "--sphere.rho", "0.1"])


def test_jobs_do_not_oversubscribe_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    (run,) = plan(grid(methods=("none",), train=(*TRAIN, "--torch-threads", "2")), Path("out"))
    assert default_jobs([run]) == max(1, cores // 2)


def test_grid_runs_skips_and_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A real grid of two; then the same command has nothing to do, and another configuration is refused."""
    words = [*GYM, "--methods", "none", "sphere", "--out", str(tmp_path), "--jobs", "2"]
    assert command(words) == 0
    runs = ["gym-crl-topk_moe-none-seed0", "gym-crl-topk_moe-sphere-seed0"]
    evals = {name: (tmp_path / name / "eval.jsonl").read_bytes() for name in runs}
    assert all(RunFolder(tmp_path / name).status()["state"] == "finished" for name in runs)
    assert [len(RunFolder(tmp_path / name).read("train")) for name in runs] == [2, 2]
    recorded = json.loads((tmp_path / "sweep.json").read_text())
    assert recorded["runs"] == runs
    assert recorded["commands"] == [f"sphere sweep {' '.join(words)}"]
    capfd.readouterr()
    assert command(words) == 0
    assert "2 of 2 runs are finished already" in capfd.readouterr().out
    assert {name: (tmp_path / name / "eval.jsonl").read_bytes() for name in runs} == evals
    planned = plan(grid(), tmp_path)
    assert (state(planned[0]), steps_left(planned[0])) == ("finished", 0)
    middle = median(row["steps_per_second"] for row in RunFolder(tmp_path / runs[0]).read("train"))
    assert speeds(planned)[runs[0]] == middle
    screen = io.StringIO()
    live = LiveTable(planned, Console(file=screen, force_terminal=True, width=140), already=3)
    live.close()
    assert "5/5 runs · 0 running" in screen.getvalue()
    assert re.search(r"gym-crl-topk_moe-none-seed0 +\S*finished\S* +Pendulum-v1 +100%", screen.getvalue())
    with pytest.raises(ConfigError, match=r"gamma: 0\.5 is not allowed; expected 0\.99, as in"):
        command([*words, "--gamma", "0.5"])


def test_failures_are_listed_and_the_rest_finishes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A rate at which the first step leaves nothing finite, beside a usual one."""
    words = [*GYM, "--methods", "none", "--grid", "learning_rate", "1e38", "3e-4"]
    assert command([*words, "--protocols", "crl", "--out", str(tmp_path), "--jobs", "2"]) == 3
    printed = capfd.readouterr().out
    assert "1 of 2 runs failed" in printed
    axis = ("learning_rate", ("1e38", "3e-4"))
    bad, good = plan(grid(protocols=("crl",), methods=("none",), options=(axis,)), tmp_path)
    assert f"{bad.name}: TrainingError: task Pendulum-v1, iteration 1: minibatch" in printed
    assert (state(bad), state(good)) == ("failed", "finished")
    assert "TrainingError" in reason(bad, 3)
    with bad.log.open("a") as log:
        log.write("sphere: refused\n")
    assert (reason(bad, 2), "TrainingError" in reason(bad, 3)) == ("sphere: refused", True)


def sweep_process(out: Path, *words: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "sphere_rl.cli", "sweep", *GYM, "--methods", "none", "--out", str(out), *words]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(true: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


LONG = ("--steps-per-task", "2048")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluations of the long run, never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    assert command([*GYM, "--methods", "none", *LONG, "--out", str(out)]) == 0
    return out / "gym-crl-topk_moe-none-seed0" / "eval.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kill", "code", "all_at_once"),
    [
        (signal.SIGINT, 130, False), (signal.SIGTERM, 130, False), (signal.SIGKILL, -9, False),
        (signal.SIGKILL, -9, True),
    ],
    ids=["interrupt", "terminate", "kill", "kill the run, too"],
)  # fmt: skip
def test_killed_sweep_is_finished_by_the_same_command(
    tmp_path: Path, whole: Path, kill: signal.Signals, code: int, all_at_once: bool
) -> None:
    """Ctrl-C and SIGTERM stop the run politely, SIGKILL takes it along; the second sweep ends bitwise as the whole.

    All at once, as when a machine goes down, not even the run's status can say that it was stopped.
    """
    folder = tmp_path / "cut" / "gym-crl-topk_moe-none-seed0"
    first = sweep_process(folder.parent, *LONG)
    wait_until(lambda: (folder / "train.jsonl").is_file() and len(RunFolder(folder).read("train")) > 2)
    children = children_of(first.pid)
    assert len(children) == 1
    for pid in children if all_at_once else []:
        os.kill(pid, kill)
    os.kill(first.pid, kill)
    assert first.wait(60) == code
    wait_until(lambda: not Path(f"/proc/{children[0]}").exists(), 30)
    assert RunFolder(folder).status()["state"] == ("running" if all_at_once else "interrupted")
    assert command([*GYM, "--methods", "none", *LONG, "--out", str(folder.parent)]) == 0
    assert (folder / "eval.jsonl").read_bytes() == whole.read_bytes()
    assert last_row(folder / "train.jsonl")["global_step"] == 2048


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_whose_process_is_killed_is_started_again(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "out" / whole.parent.name
    sweep = sweep_process(folder.parent, *LONG)
    wait_until(lambda: (folder / "train.jsonl").is_file() and len(RunFolder(folder).read("train")) > 2)
    os.kill(children_of(sweep.pid)[0], signal.SIGKILL)
    assert sweep.wait(120) == 0
    assert (folder / "eval.jsonl").read_bytes() == whole.read_bytes()


def test_what_is_started_again(tmp_path: Path) -> None:
    assert again(tmp_path, -signal.SIGKILL, RETRIES - 1)
    assert not again(tmp_path, -signal.SIGKILL, RETRIES)
    assert not again(tmp_path, 3, 0)
    with RunFolder(tmp_path):  # another sweep's
        assert again(tmp_path, 2, 0)
        assert not again(tmp_path, 0, 0)
    RunFolder(tmp_path).set_status("finished", 64, "task")
    assert again(tmp_path, 2, 0)
    assert not again(tmp_path, 0, 0)


def test_a_sweep_into_a_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert cli.main(["sweep", *GYM, "--out", str(tmp_path / "thesis.tex")]) == 2
    assert capsys.readouterr().err == f"sphere: {tmp_path}/thesis.tex: cannot be written (File exists)\n"


SEQUENCE = {"protocols": ("rl", "crl"), "tasks": ("Pendulum-v1", "Pendulum-v1"), "methods": ("sphere",)}


def test_the_first_task_of_a_sequence_is_not_trained_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a sweep shares is what training would have made; `sphere resume` and the report take it for that."""
    words = ["--suite", "gym", *TRAIN, "--protocols", "rl", "crl", "--methods", "sphere", "--spectrum-every", "128"]
    words += ["--tasks", "Pendulum-v1", "Pendulum-v1", "--out", str(tmp_path / "both")]
    assert command(words) == 0
    printed = capfd.readouterr().out
    assert "started gym-rl" not in printed
    name = "gym-rl-Pendulum-v1-topk_moe-sphere-seed0"
    assert f"{name} is the first task of gym-crl-topk_moe-sphere-seed0" in printed
    alone = ["--suite", "gym", *TRAIN, "--protocols", "rl", "--methods", "sphere", "--spectrum-every", "128"]
    assert command([*alone, "--tasks", "Pendulum-v1", "--out", str(tmp_path / "alone")]) == 0
    assert "started gym-rl" in capfd.readouterr().out
    shared, trained = (RunFolder(tmp_path / where / name) for where in ("both", "alone"))
    assert len(shared.read("spectrum")) > 1
    assert run_difference(shared, trained) is None
    assert shared.config() == trained.config()
    with shared:
        protocol.resume(shared, lambda step: [])  # nothing is left to do but the last evaluation, which is the same
    assert run_difference(shared, trained) is None
    assert torch.equal(*(load_policy(folder.path)(torch.ones(2, 3)) for folder in (shared, trained)))
    assert command(words) == 0
    assert "2 of 2 runs are finished already" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("suite", "tasks", "shared"),
    [
        ("gym", ("Pendulum-v1", "MountainCarContinuous-v0"), False),  # the sequence's probe is of both tasks
        ("gym", ("Pendulum-v1", "Pendulum-v1"), True),
        ("cw10", ("drawer-close", "push"), True),  # the suite's ten tasks are probed, whatever is trained
        ("h1", ("sit_simple", "walk"), True),
        ("h1", ("balance_hard", "reach"), False),  # neither sees what the suite's five tasks show
    ],
)
def test_a_first_task_is_shared_where_it_is_measured_on_the_same_states(
    tmp_path: Path, suite: str, tasks: tuple[str, ...], shared: bool
) -> None:
    axes: dict[str, Any] = {"suites": (suite,), "tasks": tasks, "methods": ("none",), "protocols": ("rl", "crl")}
    never, measured = (plan(grid(**axes, train=tuple(words)), tmp_path) for words in (TRAIN, TRAIN[:-2]))
    first, sequence = measured[0], measured[-1]
    assert (TRAIN[-2], first.config.spectrum_every) == ("--spectrum-every", 0)
    assert [(name, run.name) for name, run in sources(never).items()] == [(first.name, sequence.name)]
    assert sources(measured) == ({first.name: sequence} if shared else {})


def test_a_first_task_that_is_not_over_is_trained(tmp_path: Path) -> None:
    alone, sequence = plan(grid(**SEQUENCE), tmp_path)
    assert sources([alone, sequence]) == {alone.name: sequence}
    assert sources(plan(grid(**SEQUENCE | {"methods": ("sphere", "none"), "protocols": ("rl",)}), tmp_path)) == {}
    assert not share(alone, sequence)
    assert not alone.folder.exists()


def test_a_shared_first_task_tells_how_often_it_went_back(tmp_path: Path) -> None:
    alone, sequence = plan(grid(**SEQUENCE), tmp_path)
    assert cli.main(["train", *sequence.words, "--out", str(sequence.folder), "--quiet"]) == 0
    source = RunFolder(sequence.folder)
    rows = [row | {"rollbacks": row["task_index"] + 1} for row in source.read("train")]
    (source.path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source.set_status("finished", sequence.steps, "Pendulum-v1", rollbacks=["in the first task", "in the second"])
    assert share(alone, sequence)
    folder = RunFolder(alone.folder)
    assert folder.status()["rollbacks"] == ["in the first task"]
    with folder:
        protocol.resume(folder, lambda step: [])
    assert folder.status()["rollbacks"] == ["in the first task"]


def test_a_first_task_that_another_sweep_takes_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, sequence = plan(grid(**SEQUENCE), tmp_path)
    assert cli.main(["train", *sequence.words, "--out", str(sequence.folder), "--quiet"]) == 0
    reading = RunFolder.record

    def record(folder: RunFolder) -> dict[str, Any]:  # between the look at the source and the lock
        monkeypatch.undo()
        assert share(alone, sequence)
        return reading(folder)

    monkeypatch.setattr(RunFolder, "record", record)
    assert not share(alone, sequence)
    assert state(alone) == "finished"
    with RunFolder(alone.folder):
        assert not share(alone, sequence)


def test_a_shared_policy_that_finds_no_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, sequence = plan(grid(**SEQUENCE), tmp_path)
    assert cli.main(["train", *sequence.words, "--out", str(sequence.folder), "--quiet"]) == 0
    policy = next(sequence.folder.glob("checkpoints/task-00-*.pt"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (policy.stat().st_size - 1, before[1]))
    try:
        with pytest.raises(StorageError, match=rf"^{alone.folder}.*{policy.name}: cannot be written"):
            share(alone, sequence)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_strengths_have_the_same_speed_and_modes_have_not() -> None:
    def kinds(*options: tuple[str, tuple[str, ...]]) -> int:
        return len({speed_class(run.config) for run in plan(grid(methods=("sphere",), options=options), Path("out"))})

    assert kinds(("sphere.rho", ("0.01", "0.1", "1.0"))) == 1
    assert kinds(("label", ("one", "other"))) == 1
    assert kinds(("sphere.mode", ("loss", "grad"))) == 2
    assert kinds(("num_envs", ("2", "4"))) == 2


def test_every_task_has_its_speed_and_a_sequence_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tasks of a suite are of one kind, one of them stands for all."""
    asked = list[str]()

    def calibrate(run: object, task: str) -> float:
        asked.append(task)
        return {"A": 100.0, "B": 300.0}.get(task, 7.0)

    monkeypatch.setattr("sphere_rl.sweep.cost.calibrate", calibrate)
    runs = plan(grid(protocols=("rl", "crl"), methods=("none",), tasks=("A", "B"), seeds=(0, 1)), tmp_path)
    assert list(speeds(runs).values()) == [100.0, 300.0, 150.0] * 2
    assert asked == ["A", "B"]
    tasks = ("push", "drawer-close")
    assert {*speeds(plan(grid(suites=("cw10",), methods=("none",), tasks=tasks), tmp_path)).values()} == {7.0}
    assert asked == ["A", "B", "push"]


def test_a_calibration_makes_no_runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(folder: str, words: list[str], *rest: object) -> Any:
        config, *_ = parse_train(words)
        raise LookupError(config.log, config.films, config.task_sequence)

    monkeypatch.setattr("sphere_rl.sweep.cost.start", start)
    (run,) = plan(grid(methods=("none",)), tmp_path)
    monkeypatch.setattr("sphere_rl.terminal.arguments.check_watchers", lambda config: None)  # neither is installed
    watched = replace(run, words=(*run.words, "--log", "wandb", "--films"))
    with pytest.raises(LookupError) as found:
        calibrate(watched, "A")
    assert found.value.args == ("tensorboard", False, ("A",))


def test_core_hours_are_of_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sphere_rl.sweep.cost.calibrate", lambda run, task: 256 / 3600)
    words = [*GYM, "--methods", "none", "--torch-threads", "2", "--jobs", "1", "--out", str(tmp_path), "--dry-run"]
    assert command(words) == 0
    printed = capsys.readouterr().out
    assert ": 2.00 core-hours" in printed
    assert "about 1.00 hours" in printed


def test_dry_run_calibrates_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([*GYM, "--methods", "none", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "gym-crl-topk_moe-none-seed0" in printed
    assert "1 of 1 runs to do, 256 steps at" in printed
    folder = RunFolder(tmp_path / "trained" / "gym-crl-topk_moe-none-seed0")
    assert command([*GYM, "--methods", "none", "--out", str(folder.path.parent)]) == 0
    real = checkpoint.run_checkpoints(folder)[0].stat().st_size  # of the end, which has all that a run's has
    said = re.search(
        r"checkpoints of ([\d.]+) kB, the last 2 of a run are kept and a policy a task: .* on disk", printed
    )
    assert said is not None
    assert float(said[1]) * 1000 == pytest.approx(real, rel=0.05)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ray_gives_the_same_evaluations(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    code = "import sys; from sphere_rl.cli import main; sys.exit(main())"  # Ray's own warnings are not ours
    for engine in ("local", "ray"):
        line = [sys.executable, "-c", code, "sweep", *GYM, "--engine", engine, "--jobs", "2"]
        subprocess.run([*line, "--out", str(tmp_path / engine)], check=True, timeout=300)
    for name in ("gym-crl-topk_moe-none-seed0", "gym-crl-topk_moe-sphere-seed0"):
        ours, theirs = (tmp_path / engine / name / "eval.jsonl" for engine in ("local", "ray"))
        assert ours.read_bytes() == theirs.read_bytes() != b""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ray_goes_on_after_a_lost_worker(tmp_path: Path, whole: Path) -> None:
    """The worker of a run is killed; Ray starts the run again, from its checkpoint, and it ends as the whole one."""
    pytest.importorskip("ray", reason="ray is not installed")
    folder = tmp_path / "out" / whole.parent.name
    sweep = sweep_process(folder.parent, *LONG, "--engine", "ray", "--jobs", "1")
    try:
        wait_until(lambda: (folder / "train.jsonl").is_file() and len(RunFolder(folder).read("train")) > 2)
        (run,) = processes_of(folder)
        worker = int(Path(f"/proc/{run}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: run not in processes_of(folder), 60)
        assert sweep.wait(200) == 0
    finally:
        sweep.kill()
        sweep.wait()
    assert (folder / "eval.jsonl").read_bytes() == whole.read_bytes()


def processes_of(folder: Path) -> list[int]:
    """Processes that train this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(folder).encode() in words and b"sphere_rl.cli" in words:
                found.append(int(path.parent.name))
    return found


def test_a_report_that_cannot_be_made_is_said_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sphere_rl.extras.find_spec", lambda module: None if module == "plotly" else module)
    assert cli.main(["sweep", *GYM, "--methods", "none", "--out", str(tmp_path / "s"), "--report"]) == 2
    line = "sphere: --report: plotly is not installed; pip install 'sphere-rl[report]'\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "s").exists()


def test_report_follows_the_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One command from nothing to the page."""
    words = ["sweep", *GYM, "--methods", "none", "sphere", "--out", str(tmp_path / "s"), "--report"]
    assert cli.main(words) == 0
    assert (tmp_path / "s" / "page" / "index.html").is_file()
    drawn = {path.name for path in (tmp_path / "s" / "page" / "figures").glob("*.png")}
    assert "gym-learning.png" in drawn
    assert "gym-rank.png" not in drawn  # nothing was measured
    assert "2 of 2 runs finished.\n" in capfd.readouterr().out


def test_the_demo_shows_its_own_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    found = demo.planned(tmp_path, demo.SHORT)
    assert [folder.name for folder in found] == [f"cw10-crl-topk_moe-{name}-seed0" for name in ("none", "sphere")]


def test_ray_has_no_more_tasks_than_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster, too, whose cores this command does not choose."""
    at_once, most = set[int](), list[int]()

    def submit(*_: object) -> int:
        at_once.add(len(most))
        most.append(len(at_once))
        return len(most) - 1

    def wait(tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        at_once.discard(tasks[0])
        return tasks[:1], tasks[1:]

    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=submit))
    fake: Any = SimpleNamespace(
        is_initialized=lambda: True, remote=lambda _: task, wait=wait, get=lambda done: 0, shutdown=lambda: None
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(RayError=RuntimeError))  # type: ignore[arg-type]
    monkeypatch.setattr(engines, "require", lambda *_: None)
    runs = plan(grid(methods=("none",), seeds=tuple(range(5))), tmp_path)
    for jobs, expected in ((2, 2), (None, 5)):
        most.clear()
        codes = engines.ray(None, jobs)(runs, Mock())
        assert (codes, max(most)) == ({run.name: 0 for run in runs}, expected)
