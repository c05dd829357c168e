"""SIGKILL at moments that no code has chosen, over training, evaluation, checkpoints, sweeps and reports.

``SPHERE_KILLS=300`` makes it that many kills over the methods, round after round; the default is short.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from comparing import run_difference
from conformance.agents import EAGER
from killing import SERVER, resume_alone
from PIL import Image
from toy_runs import GYM, WORDS, config, train

from sphere_rl.cli import main
from sphere_rl.config import TrainConfig, to_dict
from sphere_rl.learner.actor_critic import Spaces
from sphere_rl.methods import methods
from sphere_rl.report.page import make_page
from sphere_rl.results import load_results
from sphere_rl.runs import LOGS, RunFolder, checkpoint
from sphere_rl.training.sizes import checkpoint_bytes

KILLS = int(os.environ.get("SPHERE_KILLS", "20"))
SHORT = 4 * len(methods()) > KILLS
"""Too few for every method: those with the largest state, each killed a share of the times."""
SHARE = 4 if SHORT else KILLS
MOMENTS = random.Random(KILLS)


def matrix() -> Iterator[TrainConfig]:
    """Every method again and again, each time in another protocol, with other parts on."""
    names = largest_first() if SHORT else list(methods())
    for round_ in count():
        for place, method in enumerate(names):
            odd = bool((round_ + place) % 2)
            yield settings_of(method, protocol="rl" if odd else "crl",
                normalize_observations=odd, normalize_rewards=not odd, eval_every=32, eval_episodes=1,
                final_eval_episodes=1, spectrum_every=32 if odd else -1, seed=round_,
            )  # fmt: skip


def settings_of(method: str, **changes: Any) -> TrainConfig:
    eager = {method: EAGER[method]} if method in EAGER else {}
    return config("", tasks=["toy_envs:Drawing-v0", "toy_envs:Drawing-v0"], method=[method], **eager, **changes)


def largest_first() -> list[str]:
    """Methods by the size of a run's checkpoint: what they keep beside the networks, or in the optimisers."""
    envs = GYM.make("toy_envs:Drawing-v0", 1, 0, 1)
    spaces = Spaces.of(envs)
    envs.close()
    return sorted(methods(), key=lambda name: -checkpoint_bytes(settings_of(name), spaces)[0])


def readable(folder: RunFolder) -> None:
    """What every reader may count on at any moment: whole lines, a status, a checkpoint that is whole."""
    for log in LOGS:
        folder.read(log)
    folder.status()
    for path in checkpoint.run_checkpoints(folder) + checkpoint.task_checkpoints(folder):
        checkpoint.load(path)


def resume_with_kills(folder: RunFolder) -> int:
    """Resume a run in processes that are killed within a time that grows, until it has finished; `SHARE` at most."""
    kills = 0
    while folder.status().get("state") != "finished":
        process = SERVER.Process(target=resume_alone, args=(folder.path,))
        process.start()
        process.join(MOMENTS.uniform(0, 0.4) * 1.5**kills if kills < SHARE else None)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        readable(folder)
    return kills


@pytest.mark.slow
def test_runs_of_every_method_end_bitwise_as_those_that_were_not_killed(tmp_path: Path) -> None:
    kills, seen, phases = 0, set[tuple[str, ...]](), dict[str, int]()
    for settings in matrix():
        whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
        train(settings, whole.path)
        with killed:
            killed.create(to_dict(settings))
        kills += resume_with_kills(killed)
        assert run_difference(whole, killed) is None, settings.method
        seen.add(settings.method)
        phases[settings.protocol] = phases.get(settings.protocol, 0) + 1
        for folder in (whole, killed):
            shutil.rmtree(folder.path)
        if kills >= KILLS and (len(seen) == len(methods()) or SHORT):
            break
    print(f"{kills} kills, {sum(phases.values())} runs of {len(seen)} methods")


def test_a_torn_newest_checkpoint_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config("Drawing", steps_per_task=160)
    whole = train(settings, tmp_path / "whole")
    torn = train(settings, tmp_path / "torn")
    torn.set_status("running", 160, "toy_envs:Drawing-v0")
    older, newest = checkpoint.run_checkpoints(torn)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main(["resume", str(torn.path), "--quiet"]) == 0
    line = f"{newest}: broken checkpoint (its checksum does not fit); the run goes on from {older.name}"
    assert capsys.readouterr().err == f"sphere: {line}\n"
    assert run_difference(whole, torn) is None


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "sphere_rl.cli", *map(str, words)]


def test_sigterm_is_heard_once_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    """As SLURM sends it: to every process, and perhaps again; then SIGKILL, which need not come."""
    settings = config("Drawing", steps_per_task=6400)
    folder = RunFolder(tmp_path / "run")
    with folder:
        folder.create(to_dict(settings))
    here = Path(__file__).parent
    process = subprocess.Popen(command("resume", folder.path, "--quiet"), cwd=here, stderr=subprocess.PIPE, text=True)
    while len(checkpoint.run_checkpoints(folder)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    status = folder.status()
    assert status["state"] == "interrupted"
    newest = checkpoint.run_checkpoints(folder)[-1]
    step = int(newest.stem.removeprefix("step-"))
    assert 0 <= status["global_step"] - step < settings.checkpoint_every
    assert f"stopped at step {status['global_step']:,}; the run goes on from step {step:,}\n" in errors
    with folder:
        resume_alone_in_here(folder)
    assert run_difference(train(settings, tmp_path / "whole"), folder) is None


def resume_alone_in_here(folder: RunFolder) -> None:
    from sphere_rl import protocol

    protocol.resume(folder, lambda step: [])


@pytest.mark.slow
def test_a_sweep_that_is_killed_ends_as_one_that_was_not(tmp_path: Path) -> None:
    out, kills = tmp_path / "sweep", 0
    words = [
        "--suite",
        "gym",
        "--tasks",
        "toy_envs:Drawing-v0",
        "--methods",
        "none",
        "sphere",
        *WORDS[2:],
        "--jobs",
        "2",
    ]
    while True:
        process = subprocess.Popen(
            command("sweep", *words, "--out", out), cwd=Path(__file__).parent, stdout=subprocess.DEVNULL
        )
        try:
            if kills < max(2, KILLS // 50):
                process.wait(MOMENTS.uniform(1, 12))
            else:
                process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        break
    for method in ("none", "sphere"):
        folder = RunFolder(out / f"gym-crl-topk_moe-{method}-seed0")
        alone = train(config("Drawing", method=[method]), tmp_path / method)
        assert run_difference(alone, folder) is None
    print(f"{kills} kills of a sweep")


def report(runs: Path, out: Path) -> None:
    """What the process does."""
    make_page(load_results(runs), out)


@pytest.mark.slow
def test_a_report_that_is_killed_leaves_whole_files(tmp_path: Path) -> None:
    runs, out, kills, longest = tmp_path / "runs", tmp_path / "page", 0, 4.0
    train(config("Drawing", spectrum_every=32), runs / "run")
    while kills < max(3, KILLS // 20):
        process = SERVER.Process(target=report, args=(runs, out))
        process.start()
        process.join(MOMENTS.uniform(0, longest))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        whole_files(out)
    print(f"{kills} kills of a report")


def whole_files(out: Path) -> None:
    """Everything below is a file that its reader takes, but for what was being written under another name."""
    for path in out.rglob("*"):
        if path.is_dir() or path.name.startswith("."):
            continue
        content: Any = path.read_bytes()
        if path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".csv":
            pl.read_csv(path)
        else:
            assert content.rstrip().endswith({".html": b"</html>", ".svg": b"</svg>", ".pdf": b"%%EOF"}[path.suffix])
