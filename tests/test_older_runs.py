"""A run folder that version 0.1 wrote (commit 062de1c, data/run-0.1) is read, evaluated, diagnosed, and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sphere_rl import cli
from sphere_rl.results import load_results
from sphere_rl.runs import PACKAGE, RunFolder, versions

OLD = Path(__file__).parent / "data" / "run-0.1"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "runs" / "old"))


def test_it_is_evaluated_diagnosed_and_reported(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(old), "--episodes", "2"]) == 0
    assert "Pendulum-v1" in capsys.readouterr().out
    assert cli.main(["diagnose", str(old), "--out", str(tmp_path / "spectrum.svg")]) == 0
    assert cli.main(["report", str(old.parent), "--out", str(tmp_path / "page")]) == 0
    assert "Pendulum-v1" in (tmp_path / "page" / "index.html").read_text()
    assert load_results(old.parent).spectra["run"].unique().to_list() == ["old"]


def test_what_was_interrupted_goes_on_where_that_version_would(old: Path) -> None:
    for late in ("step-000000000384.pt", "task-00-Pendulum-v1.pt"):
        (old / "checkpoints" / late).unlink()
    status = json.loads((old / "status.json").read_text())
    (old / "status.json").write_text(json.dumps(status | {"state": "interrupted", "global_step": 256}))
    assert cli.main(["resume", str(old), "--quiet"]) == 0
    for log in ("train", "spectrum"):
        expected, found = (RunFolder(path).read(log) for path in (OLD, old))
        assert len(found) == len(expected)
        for before, after in zip(expected, found, strict=True):
            for name in before.keys() - {"steps_per_second"}:
                value = before[name]
                if isinstance(value, float):  # another processor rounds another way
                    value = pytest.approx(value, rel=2e-2, abs=1e-4)
                assert after[name] == value, f"{log}: {name}"


@pytest.mark.parametrize("version", ["0.1.0", "today"])
def test_what_does_not_fit_says_which_version_wrote_it(
    old: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((old / "config.json").read_text())
    assert record["versions"][PACKAGE] == "0.1.0"
    record["config"]["network"]["width"] += 1
    record["versions"] = versions() if version == "today" else record["versions"]
    (old / "config.json").write_text(json.dumps(record))
    status = json.loads((old / "status.json").read_text())
    (old / "status.json").write_text(json.dumps(status | {"state": "interrupted"}))
    assert cli.main(["resume", str(old), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit the run's config.json" in line
    assert line.endswith(f"; the run is of {PACKAGE} 0.1.0") == (version != "today")
