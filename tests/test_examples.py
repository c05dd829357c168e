"""The examples run and show what they say; the files that the documentation tells readers to add work as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sphere_rl

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


def test_the_blocks_of_the_page_on_own_code_run():
    """Those that import what they need: the others are lines out of a training loop."""
    page = (ROOT / "docs" / "own-code.md").read_text()
    blocks = [
        text for text in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "import " in text
    ]
    assert blocks
    for text in blocks:
        libraries = re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)
        if all(map(find_spec, libraries)):
            exec(compile(text, "docs/own-code.md", "exec"), {})


def files_of_page(page: str) -> dict[str, str]:
    """Python blocks that are introduced by their path."""
    blocks = re.findall(r"^`(src/sphere_rl/\S+\.py)`:\n\n```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return {path.removeprefix("src/"): text for path, text in blocks}


def test_the_documented_method_and_suite_train(tmp_path):
    """A copy of the package with the two files of docs/extending.md: the method trains on the suite."""
    shutil.copytree(
        Path(sphere_rl.__file__).parent, tmp_path / "sphere_rl", ignore=shutil.ignore_patterns("__pycache__")
    )
    files = files_of_page((ROOT / "docs" / "extending.md").read_text())
    assert sorted(files) == ["sphere_rl/methods/feature_norm.py", "sphere_rl/suites/pendula.py"]
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    words = """train --suite pendula --tasks moon jupiter --method feature_norm --feature-norm.strength 0.01
        --steps-per-task 128 --num-envs 2 --num-steps 64 --minibatch-size 64 --num-epochs 1 --width 8 --depth 1
        --num-experts 3 --final-eval-episodes 1 --spectrum-every -1 --quiet --out run""".split()
    result = subprocess.run(
        [sys.executable, "-m", "sphere_rl.cli", *words],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["moon", "jupiter"]
    assert all(row["feature_norm_size"] > 0 for row in rows)
    (state,) = re.findall(r'"state": "(\w+)"', (tmp_path / "run" / "status.json").read_text())
    assert state == "finished"
