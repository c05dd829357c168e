"""Those who read run folders: whose policy a task is given, on which device, and what damaged runs make them say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import polars as pl
import pytest
import torch
from gymnasium import spaces
from toy_runs import store

from sphere_rl import runtime
from sphere_rl.cli import main
from sphere_rl.commands import diagnose
from sphere_rl.errors import ConfigError, RunFolderError
from sphere_rl.report.geometry import snapshots
from sphere_rl.results import load_results
from sphere_rl.runs import RunFolder, checkpoint
from sphere_rl.suites import make_suite
from sphere_rl.training.evaluation import evaluate
from sphere_rl.training.policies import load_policy, own_policies
from sphere_rl.training.saved import config_of


class Ten(gymnasium.Env):
    """Ten steps of random observations; an action in a box."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = spaces.Box(-1, 1, (3,), np.float32)
    action_space: gymnasium.Space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.t = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.see(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.see(), float(-np.square(action).sum()), self.t >= 10, False, {}

    def see(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, self.observation_space.shape).astype(np.float32)

    def render(self) -> Any:
        return np.full((32, 32, 3), 20 * self.t, dtype=np.uint8)


class TenChoices(Ten):
    """Sizes of `Ten`, and two actions to choose from."""

    action_space = spaces.Discrete(2)


class TenWide(Ten):
    """More observations."""

    observation_space = spaces.Box(-1, 1, (5,), np.float32)


for made in (Ten, TenChoices, TenWide):
    gymnasium.register(f"{made.__name__}-v0", entry_point=f"{__name__}:{made.__name__}")
gymnasium.register("TenAgain-v0", entry_point=f"{__name__}:Ten")

TRAIN = (
    "train --suite gym --num-envs 2 --num-steps 16 --minibatch-size 8 --num-epochs 2 --steps-per-task 64 --width 16 "
    "--depth 2 --num-experts 3 --checkpoint-every 32 --eval-episodes 1 --final-eval-episodes 1 --spectrum-every -1 "
    "--quiet"
).split()


def train(out: Path, protocol: str, *tasks: str) -> Path:
    assert main([*TRAIN, "--protocol", protocol, "--tasks", *tasks, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def rl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("rl") / "run", "rl", "Ten-v0", "TenChoices-v0", "TenWide-v0", "Ten-v0")


@pytest.fixture(scope="module")
def crl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("crl") / "run", "crl", "Ten-v0", "TenAgain-v0")


@pytest.fixture
def copy(crl: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(crl, tmp_path / "runs" / "bad"))


def rows_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--episodes", "2", "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    code = main([*map(str, words)])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    return line


def content_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_each_task_of_rl_has_its_own_agent(rl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(capsys, rl)
    expected = [
        ("Ten-v0", "task-00-Ten-v0"), ("TenChoices-v0", "task-01-TenChoices-v0"),
        ("TenWide-v0", "task-02-TenWide-v0"), ("Ten-v0", "task-03-Ten-v0"),
    ]  # fmt: skip
    assert [(row["task"], row["checkpoint"]) for row in rows] == expected
    for row in rows:
        alone = evaluate(load_policy(rl, row["checkpoint"]), make_suite("gym"), row["task"], 2, 0)
        assert row["mean_return"] == alone.mean_return
    assert rows[0]["mean_return"] != rows[3]["mean_return"]  # two agents
    (named,) = rows_of(capsys, rl, "--tasks", "Ten-v0")
    assert named == rows[3]  # the last of that task
    assert main(["evaluate", str(rl), "--episodes", "1"]) == 0
    assert "task-02-TenWide-v0" in capsys.readouterr().out


def test_a_task_in_progress_has_the_run_checkpoint_and_one_not_begun_has_none(
    rl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(rl, tmp_path / "run"))
    folder = RunFolder(run)
    state = checkpoint.load(folder.checkpoints / "task-01-TenChoices-v0.pt")
    for path in [*checkpoint.run_checkpoints(folder), *checkpoint.task_checkpoints(folder)[1:]]:
        path.unlink()
    state["progress"] |= {"task_index": 1, "iteration": 1, "global_step": 96}
    checkpoint.save(folder.checkpoints / "step-000000000096.pt", state)
    own = own_policies(folder, config_of(folder))
    assert {index: one.path.stem for index, one in own.items()} == {0: "task-00-Ten-v0", 1: "step-000000000096"}
    rows = rows_of(capsys, run)
    assert [row["checkpoint"] for row in rows] == ["task-00-Ten-v0", "step-000000000096"]
    assert "has no policy of task 'TenWide-v0', only of" in refusal(capsys, "evaluate", run, "--tasks", "TenWide-v0")


def test_crl_uses_the_latest_policy_for_all(crl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--checkpoint", "latest"], ["--tasks", "Ten-v0", "TenAgain-v0"]):
        assert {row["checkpoint"] for row in rows_of(capsys, crl, *words)} == {"step-000000000128"}
    rows = rows_of(capsys, crl, "--checkpoint", "task-00-Ten-v0")
    assert [row["checkpoint"] for row in rows] == ["task-00-Ten-v0"] * 2


def test_a_policy_of_other_spaces_is_refused(rl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", "task-00-Ten-v0", "--tasks", "Ten-v0", "TenChoices-v0"]
    expected = (
        "sphere: checkpoint: 'task-00-Ten-v0' is not allowed; expected a policy for TenChoices-v0 "
        "(3 observations and 2 discrete actions), not for 3 observations and 2 actions"
    )
    assert refusal(capsys, "evaluate", rl, *words) == expected
    film = tmp_path / "a.gif"
    play = ["play", rl, "--out", film, "--checkpoint", "task-00-Ten-v0", "--task", "TenChoices-v0"]
    assert refusal(capsys, *play) == expected
    assert not film.exists()


def test_play_films_a_task_with_its_own_policy(rl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = str(tmp_path / "a.gif")
    for words, expected in (
        (["--task", "TenChoices-v0"], "(TenChoices-v0, task-01-TenChoices-v0)"),
        (["--checkpoint", "task-02-TenWide-v0"], "(TenWide-v0, task-02-TenWide-v0)"),
        ([], "(Ten-v0, task-03-Ten-v0)"),
    ):
        assert main(["play", str(rl), "--out", film, "--steps", "3", *words]) == 0
        assert capsys.readouterr().out.strip().endswith(expected)


def on_gpu(run: Path) -> None:
    text = (run / "config.json").read_text()
    assert '"device": "cpu"' in text
    (run / "config.json").write_text(text.replace('"device": "cpu"', '"device": "cuda"'))


NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="says what a machine without a GPU does")


@NO_GPU
@pytest.mark.parametrize("command", ["evaluate", "diagnose"])
def test_readers_compute_with_as_many_threads_as_the_run(
    command: str, crl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``auto`` what training takes, and not every core: other threads give other bits."""
    asked: list[object] = []
    for module in (runtime, diagnose):
        monkeypatch.setattr(module, "tune_process", asked.append)
    words = {"evaluate": ["--episodes", "1"], "diagnose": ["--checkpoint", "latest", "--out", str(tmp_path / "a.png")]}
    assert main([command, str(crl), *words[command]]) == 0
    assert asked == [config_of(RunFolder(crl)).torch_threads] == ["auto"]


def test_a_run_of_a_gpu_is_read_on_the_cpu(copy: Path, crl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows_of(capsys, copy)
    on_gpu(copy)
    x = torch.ones(2, 3)
    assert torch.equal(load_policy(copy)(x), load_policy(crl)(x))
    assert rows_of(capsys, copy) == before
    assert main(["play", str(copy), "--out", str(copy / "a.gif"), "--steps", "2"]) == 0
    assert main(["diagnose", str(copy), "--checkpoint", "latest", "--json", "--out", str(copy / "a.svg")]) == 0
    assert [one.task for one in snapshots(copy)] == ["Ten-v0", "TenAgain-v0"]  # what the report reads
    line = refusal(capsys, "evaluate", copy, "--device", "cuda")
    assert line == "sphere: device: 'cuda' is not allowed; expected one of cpu (PyTorch finds no accelerator here)"
    with pytest.raises(ConfigError, match="device: 'banana' is not allowed"):
        load_policy(copy, device="banana")


@NO_GPU
def test_resuming_a_run_of_a_gpu_without_one_changes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu(copy)
    RunFolder(copy).set_status("interrupted", 64, "Ten-v0")
    before = content_of(copy)
    assert "config.json: device: 'cuda' is not allowed" in refusal(capsys, "resume", copy)
    assert content_of(copy) == before


def first_line(path: Path, change: Callable[[bytes], bytes]) -> None:
    first, _, rest = path.read_bytes().partition(b"\n")
    path.write_bytes(change(first) + b"\n" + rest)


def row_with(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda line: json.dumps(json.loads(line) | changes).encode()


def row_without(name: str) -> Callable[[bytes], bytes]:
    return lambda line: json.dumps({key: value for key, value in json.loads(line).items() if key != name}).encode()


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


LOGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nul": (lambda line: b"\0" * len(line), r"train.jsonl, line 1: is not JSON"),
    "list": (lambda line: b"[1]", r"train.jsonl, line 1: is not a JSON object but \[1\]"),
    "nan": (lambda line: line[:-1] + b', "x": NaN}', r"train.jsonl, line 1: is not JSON \(NaN is no number\)"),
    "latin": (lambda line: b'{"task": "\xe9"}', r"train.jsonl, line 1: is not UTF-8 text"),
    "deep": (lambda line: b"[" * 100_000, r"train.jsonl, line 1: is not JSON"),
    "missing": (row_without("steps_per_second"), r"train.jsonl, line 1: has no steps_per_second"),
    "kind": (row_with(steps_per_second="fast"), r'line 1: steps_per_second is "fast", not a number'),
    "huge": (row_with(global_step=10**30), r"line 1: global_step is 10+, not a whole number"),
    "bool": (row_with(task_index=True), r"line 1: task_index is true, not a whole number"),
    "other": (row_with(kl={"a": 1}), r"line 1: kl is .*, not a number, a list of numbers or null"),
    "several": (row_with(policy_loss=[1.0]), r"line 1: policy_loss is \[1.0\], not a number or null"),
    "infinite": (lambda line: line[:-1] + b', "x": 1e999}', r"train.jsonl, line 1: x is Infinity, not a number"),
}
CONFIGS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda text: b"", r"config.json: is not JSON"),
    "foreign": (lambda text: b'{"name": "my-app"}', r"config.json: has no config"),
    "nothing": (lambda text: b'{"config": {}}', r"config.json: its config has no suite"),
    "list": (lambda text: b'{"config": []}', r"config.json: config is \[\], not an object"),
    "value": (lambda text: text.replace(b'"gamma": 0.99', b'"gamma": 99'), r"config.json: gamma: 99.0 is not allowed"),
    "suite": (lambda text: text.replace(b'"suite": "gym"', b'"suite": "moon"'), r"config.json: suite: 'moon' is not"),
    "method": (lambda text: text.replace(b'"sphere": {', b'"sphere": 3, "fire": {'), r"config.json: "),
    "tasks": (lambda text: text.replace(b'"TenAgain-v0"', b"7"), r"config.json: tasks: 7 is not allowed"),
    "kind": (lambda text: text.replace(b'"suite": "gym"', b'"suite": []'), r"config.json: "),
    "method's kind": (lambda text: re.sub(rb'"method": \[[^]]*\]', b'"method": 1.5', text), r"config.json: "),
}


@pytest.mark.parametrize("damage", LOGS)
def test_damaged_logs_are_named(copy: Path, damage: str) -> None:
    change, message = LOGS[damage]
    first_line(copy / "train.jsonl", change)
    shutil.copytree(copy, copy.parent / "other")
    with pytest.raises(RunFolderError, match=message):
        load_results(copy.parent)
    with (copy / "eval.jsonl").open("ab") as file:
        file.write(b'{"torn": ')
    assert len(RunFolder(copy).read("eval")) == 4  # two finals, two of retention; a torn last line is none


@pytest.mark.parametrize("damage", CONFIGS)
def test_damaged_configurations_are_named(copy: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = CONFIGS[damage]
    path = copy / "config.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RunFolderError, match=message):
        load_policy(copy)
    if damage == "suite":  # of another machine, perhaps: its numbers are shown all the same
        assert load_results(copy.parent).runs["suite"].to_list() == ["moon"]
    else:
        with pytest.raises(RunFolderError, match=message):
            load_results(copy.parent)
    before = content_of(copy)
    RunFolder(copy).set_status("interrupted", 64, "Ten-v0")
    for command in ("evaluate", "diagnose", "resume"):
        assert str(path) in refusal(capsys, command, copy)
    assert content_of(copy).keys() == before.keys()


def test_damaged_status_and_directories_in_place_of_files(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "status.json").write_text('{"state": "asleep"}')
    assert 'status.json: state is "asleep", not one of running, finished' in refusal(capsys, "resume", copy)
    directory(copy / "eval.jsonl")
    with pytest.raises(RunFolderError, match=r"eval.jsonl: cannot be read \(Is a directory\)"):
        RunFolder(copy).read("eval")
    directory(copy / "config.json")
    assert "config.json: cannot be read (Is a directory)" in refusal(capsys, "evaluate", copy)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def change_policy(path: Path, change: str) -> None:
    state = checkpoint.load(path)
    actor = state["agent"]["actor"]
    if change == "shape":
        actor |= {name: torch.zeros(1, *value.shape) for name, value in actor.items()}
    elif change == "normalizer":
        state["agent"]["normalizer"] = {"mean": torch.zeros(3), "var": torch.ones(3), "count": 1.0}
    store(path, {"foreign": 1} if change == "foreign" else {"evil": Evil()} if change == "evil" else state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", "does not fit the run's config.json (RuntimeError: Error(s) in loading state_dict for Actor"),
        ("foreign", "does not fit the run's config.json (KeyError: 'progress')"),
        ("normalizer", "only one of them normalises observations"),
        ("evil", "broken checkpoint (Weights only load failed"),
    ],
)
def test_policies_that_do_not_fit_are_named(
    copy: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in RunFolder(copy).checkpoints.iterdir():
        change_policy(path, change)
    RunFolder(copy).set_status("interrupted", 64, "Ten-v0")
    before = content_of(copy)
    commands = ["evaluate", "diagnose"] if change == "normalizer" else ["evaluate", "diagnose", "resume"]
    for command in commands:
        line = refusal(capsys, command, copy)
        assert message in line
        assert f"{copy}/checkpoints/" in line
    assert content_of(copy) == before  # nothing was lost in the attempt
    if change != "shape":
        return
    assert main(["report", str(copy.parent), "--out", str(copy.parent / "page")]) == 3
    assert "task-00-Ten-v0.pt" in capsys.readouterr().err
    assert "Left out" in (copy.parent / "page" / "index.html").read_text()


def test_resume_refuses_logs_that_lost_lines(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a log is shorter than at the checkpoint, cutting it to length would fill it with NULs."""
    RunFolder(copy).set_status("interrupted", 64, "Ten-v0")
    path = copy / "train.jsonl"
    path.write_bytes(path.read_bytes()[:50])
    before = content_of(copy)
    assert "train.jsonl: has lost lines" in refusal(capsys, "resume", copy)
    assert content_of(copy) == before


def test_one_bad_run_is_left_out_of_the_report(copy: Path, crl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(crl, copy.parent / "good")
    first_line(copy / "train.jsonl", LOGS["nul"][0])
    results = load_results(copy.parent)
    assert results.runs["run"].to_list() == ["good"]
    assert results.broken.columns == ["run", "reason"]
    ((run, reason),) = results.broken.rows()
    assert run == "bad"
    assert f"{copy}/train.jsonl, line 1: is not JSON" in reason
    assert results.evals.filter(pl.col("run") == "bad").is_empty()
    (copy.parent / "sweep.json").write_text("{}")
    capsys.readouterr()
    assert main(["report", str(copy.parent), "--out", str(copy.parent / "page")]) == 3
    printed = capsys.readouterr()
    html = (copy.parent / "page" / "index.html").read_text()
    for text in (html, printed.err):
        assert "bad/train.jsonl, line 1: is not JSON" in text
        assert "sweep.json: has no commands" in text
    assert printed.out.strip() == str(copy.parent / "page" / "index.html")
    (copy.parent / "sweep.json").unlink()
    shutil.rmtree(copy)
    assert main(["report", str(copy.parent), "--out", str(copy.parent / "page")]) == 0
