"""Those who watch a run get the numbers of its logs, and leave no trace in it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gymnasium
import pytest
from PIL import Image, ImageSequence
from rich.console import Console
from toy_runs import config

from sphere_rl import cli
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.numbers import number, with_interval
from sphere_rl.runs import RunFolder
from sphere_rl.training import monitors
from sphere_rl.training.agent import Agent
from sphere_rl.training.display import Bars, Lines, sharing, spectrum
from sphere_rl.training.saved import config_of

WORDS = (
    "train --suite gym --tasks Pendulum-v1 Pendulum-v1 --num-envs 2 --num-steps 64 --minibatch-size 32 --num-epochs 1 "
    "--width 16 --depth 1 --num-experts 3 --steps-per-task 256 --eval-every 128 --eval-episodes 1 "
    "--final-eval-episodes 1 --quiet"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert cli.main([*WORDS, "--out", str(out)]) == 0
    return RunFolder(out)


def test_tensorboard_has_every_number_of_the_logs(run: RunFolder) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(run.path / "tb"))
    events.Reload()
    told = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    names = {"train": "train/", "eval": "eval_{phase}/", "spectrum": "spectrum_{batch}/"}
    expected = {
        (names[log].format(**row) + name, row["global_step"]): value
        for log in names
        for row in run.read(log)
        for name, value in row.items()
        if isinstance(value, int | float) and name not in monitors.SKIPPED and row.get("phase") != "retention"
    }
    kept = [row for row in run.read("eval") if row["phase"] == "retention"]
    assert len(kept) == 2
    for row in kept:
        place = f"eval_retention/{row['task_index']:02d}_Pendulum-v1/mean_return"
        expected[place, row["global_step"]] = row["mean_return"]
    for row in run.read("spectrum"):
        for i, load in enumerate(row["expert_load"]):
            expected[f"spectrum_{row['batch']}/expert_load/{i:02d}", row["global_step"]] = load
    assert len(expected) > 80
    for place, value in expected.items():
        assert told[place] == pytest.approx(value, rel=1e-6), place


def test_tensorboard_has_the_hyperparameters_beside_the_curves(run: RunFolder) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    (path,) = (run.path / "tb").iterdir()
    found = {
        value.tag: value.metadata.plugin_data.content
        for event in loader.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    told = parse_session_start_info_plugin_data(found["_hparams_/session_start_info"]).hparams
    assert (told["method"].string_value, told["network.width"].number_value) == ("none", 16)
    assert told["tasks"].string_value == "Pendulum-v1 Pendulum-v1"
    assert "sphere.rho" not in told
    assert set(monitors.OUTCOMES) - set(found) == {"eval_final/success_final"}  # Pendulum knows no success


@pytest.mark.parametrize(
    ("value", "text"),
    [(-1248.4, "−1 248"), (999.6, "1 000"), (-999.4, "−999"), (12.345, "12.3"), (0.5, "0.5"), (500.0, "500"),
     (81_920, "81 920"), (7, "7"), (0.0, "0"), (-0.0, "0"), (2.04e-5, "2.04e−5"), (1_234_567.8, "1 234 568"),
     (-0.25, "−0.25")],
)  # fmt: skip
def test_numbers_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text.replace(" ", "\N{NO-BREAK SPACE}")


def test_intervals_as_people_write_them() -> None:
    assert with_interval(0.314, -0.217, 0.5) == "0.31 [−0.22, 0.50]"
    assert with_interval(-0.001, None, None) == "0.00"


def test_the_share_of_experts_is_that_of_an_even_load() -> None:
    assert sharing([0.5] * 4) == pytest.approx(4)
    assert sharing([0, 1, 0, 0]) == pytest.approx(1)
    assert sharing([0.5, 0.25, 0.25]) == pytest.approx(2**1.5)  # 1.5 bits
    assert spectrum({"batch": "rollout", "r_e_K": 3.0}) == ""
    assert spectrum({"batch": "probe", "r_e_K": 3.0, "r_e_A": 1.5, "expert_load": [1.0]}) == "r_e(K) 3 · r_e(A) 1.5"


def screen_of(run: RunFolder, display: type[Bars | Lines]) -> list[str]:
    """What a display shows of a run that is told to it line by line; the last picture of the bars."""
    config, screen = config_of(run), io.StringIO()
    console = Console(file=screen, force_terminal=display is Bars, width=120, color_system=None)
    shown = display(config, console, "runs/x", 0)
    shown.begin(Agent(config, Spaces(3, 1, False), seed=0))
    rows = [(log, row) for log in ("spectrum", "train", "eval") for row in run.read(log)]
    for log, row in sorted(rows, key=lambda item: item[1]["global_step"]):
        if row.get("phase") != "retention":
            shown.row(log, row)
    shown.close()
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("display", [Bars, Lines])
def test_the_display_says_what_is_trained_and_how_its_spectrum_is(run: RunFolder, display: type[Bars | Lines]) -> None:
    screen = screen_of(run, display)
    text = "\n".join(screen)
    header = "method none · actor topk_moe (359 parameters) · critic dense (81) · 2 tasks of gym, crl, 256 steps each"
    assert f"{header} · cpu · runs/x" in text
    measured = [spectrum(row) for row in run.read("spectrum") if row["batch"] == "probe"]
    load = run.read("spectrum")[-2]["expert_load"]
    assert measured[-1].endswith(f" · load on {sharing(load):.1f} of 3 experts")
    last = [line for line in screen if "r_e(K)" in line][-1]
    assert last == f"  {measured[-1]}" if display is Bars else f"{measured[-1]} · " in last
    final = [row for row in run.read("eval") if row["phase"] == "final"][-1]["mean_return"]
    assert f"return {number(final)}" in text
    assert "e+0" not in text
    if display is Bars:
        assert any(line.startswith("Pendulum-v1 ") for line in screen)
        assert "all 2 tasks" in text
        assert "making 2 environments" in text
        assert not any(line.startswith("task ") for line in screen)


def test_missing_wandb_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = "sphere: log: wandb is not installed; pip install 'sphere-rl[wandb]'\n"
    for words in (WORDS, ["sweep", *WORDS[1:-1]]):
        assert cli.main([*words, "--log", "wandb", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == line
    assert not (tmp_path / "out").exists()
    assert cli.main([*WORDS, "--log", "paper", "--out", str(tmp_path / "out")]) == 2
    assert "paper" in capsys.readouterr().err


DRAWN = """
import gymnasium, numpy as np

class Bright(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 24}
    observation_space = gymnasium.spaces.Box(0.0, 20.0, (1,))
    action_space = gymnasium.spaces.Discrete(2)
    def __init__(self, render_mode=None): self.render_mode = render_mode
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}
    def step(self, action):
        self.count += 1
        return np.full(1, self.count, np.float32), 1.0, self.count == 12, False, {}
    def render(self):
        DRAWING
        return np.full((34, 48, 3), 20 * self.count, dtype=np.uint8)

gymnasium.register("Bright-v0", Bright)
"""


def filmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawing: str) -> RunFolder:
    """A run on an environment that draws how far its episode is; the same as without films."""
    (tmp_path / "bright.py").write_text(DRAWN.replace("DRAWING", drawing))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delitem(sys.modules, "bright", raising=False)
    monkeypatch.delitem(gymnasium.registry, "Bright-v0", raising=False)
    words = [word.replace("Pendulum-v1", "bright:Bright-v0") for word in WORDS]
    for name, more in (("plain", ()), ("filmed", ("--films",))):
        assert cli.main([*words, *more, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "filmed/eval.jsonl").read_bytes() == (tmp_path / "plain/eval.jsonl").read_bytes()
    return RunFolder(tmp_path / "filmed")


def test_films_of_each_task_are_in_tensorboard_and_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = filmed(tmp_path, monkeypatch, "pass")
    events = event_accumulator.EventAccumulator(str(run.path / "tb"), size_guidance={"images": 0})
    events.Reload()
    for index, step in enumerate((256, 512)):
        name = f"task-{index:02d}-bright_Bright-v0"
        (shown,) = events.Images(f"film/{name}")
        film = run.path / "films" / f"{name}.gif"
        assert (shown.step, shown.width, shown.height) == (step, 48, 34)
        assert shown.encoded_image_string == film.read_bytes()
        with Image.open(film) as opened:
            frames = [frame.convert("L").getpixel((0, 0)) for frame in ImageSequence.Iterator(opened)]
        assert frames == [0, 40, 80, 120, 160, 200, 240]  # of 24 steps a second every other, 12 a second


@pytest.mark.parametrize(
    ("drawing", "reason"),
    [
        (
            "raise ValueError('no such colour')",
            "task: 'Bright-v0' is not allowed; expected one that can be drawn (ValueError: no such colour)",
        ),
        ("import os; os.abort()", "the process that draws ended with -6"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawing: str, reason: str
) -> None:
    run = filmed(tmp_path, monkeypatch, drawing)
    assert capsys.readouterr().err == f"no films of this run: {reason}\n"
    assert run.status()["state"] == "finished"


def test_wandb_offline_has_the_numbers_and_changes_nothing(run: RunFolder, tmp_path: Path) -> None:
    """In a process of its own, as W&B starts a service; without a network."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = "import sys; from sphere_rl.cli import main; sys.exit(main())"
    out = tmp_path / "told"
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    words = [sys.executable, "-c", code, *WORDS, "--log", "wandb", "--out", str(out)]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert (out / "eval.jsonl").read_bytes() == (run.path / "eval.jsonl").read_bytes()
    (written,) = out.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    for row in RunFolder(out).read("eval"):
        assert json.dumps(row["mean_return"]).encode() in content
    assert b"spectrum_probe/r_e_K" in content
    assert json.dumps(RunFolder(out).read("spectrum")[-1]["r_e_K"]).encode() in content


def test_a_run_is_one_of_wandb_and_another_in_its_place_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list[str]()
    fake: Any = SimpleNamespace(
        Error=RuntimeError, Settings=dict, init=lambda **given: ids.append(given["id"]) or Mock()
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = config("Drawing")
    for began in (True, False, True):
        if began:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            (tmp_path / "run").mkdir()
        monitors.WandB(settings, RunFolder(tmp_path / "run"), quiet=True)
    first, resumed, other = ids
    assert first == resumed != other
