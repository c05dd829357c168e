"""The examples run and show what they say; the files that the documentation tells readers to add work as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def example(name: str) -> Any:
    spec = spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_rank_rises(results: dict[float, list[tuple[float, float, float]]], gravities: tuple[float, ...]) -> None:
    """Rows (gravity, error, r_e(A)), without the penalty first: it raises the rank on the last task."""
    without, with_penalty = results.values()
    for rows in (without, with_penalty):
        assert [row[0] for row in rows] == list(gravities)
        assert np.isfinite(rows).all()
        assert all(1 <= rank <= 128 for _, _, rank in rows)
    assert with_penalty[-1][2] > 1.2 * without[-1][2]


def test_plain_pytorch(capsys):
    module = example("plain_pytorch")
    check_rank_rises(module.main(["--steps", "80"]), module.GRAVITIES)
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_jax(capsys):
    pytest.importorskip("jax", reason="JAX is not installed")
    module = example("jax_flax_free")
    check_rank_rises(module.main(["--steps", "80", "--rho", "1"]), module.GRAVITIES)
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_cleanrl_style(capsys):
    module = example("cleanrl_style")
    rows = {rho: module.main(["--steps", "4096", "--rho", str(rho)]) for rho in (0, 1)}
    for _, reward, kernel_rank, feature_rank in rows[0] + rows[1]:
        assert -17 < reward < 0  # Pendulum's worst step is -(π² + 0.1 · 8² + 0.001 · 2²)
        assert 1 <= kernel_rank <= 128
        assert 1 <= feature_rank <= 128
    assert rows[1][-1][3] > rows[0][-1][3]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_stable_baselines3(capsys):
    pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")
    without, with_penalty = example("sb3_ppo").main(["--steps", "3072", "--rho", "1"]).values()
    assert len(without) == len(with_penalty) == 2
    assert with_penalty[-1] > without[-1]
    assert len(capsys.readouterr().out.splitlines()) == 2


def files_of_page(page: str) -> dict[str, str]:
    """Python blocks that are introduced by their file's name."""
    blocks = re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return dict(blocks)


GRID = """
suites = ["pendula"]
actors = ["sigmoid_moe"]
methods = ["feature_norm"]
tasks = ["moon"]
[train]
plugin = ["feature_norm", "pendula", "sigmoid_moe"]
steps_per_task = 128
num_envs = 2
num_steps = 64
minibatch_size = 64
num_epochs = 1
width = 8
depth = 1
num_experts = 3
final_eval_episodes = 1
spectrum_every = -1
"""
"""A sweep of these files."""


def test_the_documented_method_suite_and_actor_train_and_resume(tmp_path):
    """The files of three pages beside a run, as plugins: the package does not have them."""
    pages = ("own-method", "own-suite", "own-gate")
    files = files_of_page("\n".join((ROOT / "docs" / f"{page}.md").read_text() for page in pages))
    assert sorted(files) == ["feature_norm.py", "pendula.py", "pixel_moe.py", "sigmoid_moe.py"]
    for path, text in files.items():
        (tmp_path / path).write_text(text)

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "sphere_rl.cli", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    plugins = ["--plugin", "feature_norm", "pendula", "sigmoid_moe"]
    words = """--suite pendula --tasks moon jupiter --method feature_norm --actor sigmoid_moe --steps-per-task 128
        --feature-norm.strength 0.01 --num-envs 2 --num-steps 64 --minibatch-size 64 --num-epochs 1 --width 8 --depth 1
        --num-experts 3 --final-eval-episodes 1 --spectrum-every 128 --quiet --out run""".split()
    run("train", *plugins, *words)
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["moon", "jupiter"]
    assert all(row["feature_norm_size"] > 0 for row in rows)
    spectra = [json.loads(line) for line in (tmp_path / "run" / "spectrum.jsonl").read_text().splitlines()]
    assert all(row["r_e_K"] > 1 for row in spectra)
    record = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert record["plugin"] == plugins[1:]
    assert "moon" in run("evaluate", "run", "--episodes", "1")
    listed = run("list", *plugins, "--json")
    for name in ("feature_norm", "pendula", "sigmoid_moe"):
        assert f'"{name}"' in listed
    (tmp_path / "grid.toml").write_text(GRID)
    run("sweep", "--config", "grid.toml", "--out", "runs")
    assert len(list((tmp_path / "runs").glob("*/config.json"))) == 1
    run("report", "runs", "--out", "page")
