"""Runs that are published as three files each are read as their folders would be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY

from sphere_rl import cli
from sphere_rl.config import from_dict, override, preset
from sphere_rl.errors import RunFolderError
from sphere_rl.protocol import start
from sphere_rl.results import load_results
from sphere_rl.runs import RunFolder
from sphere_rl.runs.published import PUBLISHED, PublishedRun, publish, published_runs, stem_of
from sphere_rl.suites import make_suite

DOCS = Path(__file__).parents[1] / "docs" / "results"
STEMS = published_runs(DOCS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    config = override(preset(make_suite("gym")), TINY | {"protocol": "crl", "method": ["sphere"], "label": "free"})
    with RunFolder(root / "runs" / "gym-crl-topk_moe-free-seed0") as folder:
        start(config, folder, lambda step: [])
    return root


def test_tables_are_those_of_the_folders(trained: Path) -> None:
    out = trained / "out"
    folder = RunFolder(trained / "runs" / "gym-crl-topk_moe-free-seed0")
    assert publish(folder, out) == "crl-free-seed0"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert publish(folder, out) == "crl-free-seed0"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "the same run gives the same bytes"
    expected, found = load_results(trained / "runs"), load_results(out)
    for table in ("evals", "spectra"):
        assert getattr(found, table).drop("run").equals(getattr(expected, table).drop("run"))
    assert found.runs.drop("run", "speed").equals(expected.runs.drop("run", "speed"))
    assert found.folder("crl-free-seed0").record()["commit"] == folder.record()["commit"]


@pytest.mark.parametrize(
    ("folder", "changes", "stem"),
    [
        ("gym-rl-topk_moe-free-seed3", {}, "rl-push-free-seed3"),
        ("gym-rl-topk_moe-free-seed3", {"tasks": ["push", "hammer"]}, "rl-free-seed3"),
        ("gym-crl-topk_moe-none-seed3", {"protocol": "crl", "label": ""}, "crl-l2+sphere-seed3"),
        ("rl-small-seed3", {}, "rl-small-seed3"),
        ("small", {}, "rl-small-seed3"),
        ("small", {"protocol": "crl"}, "crl-small-seed3"),
    ],
)
def test_a_name_says_the_protocol_once(folder: str, changes: dict[str, Any], stem: str) -> None:
    config = {
        "suite": "gym",
        "protocol": "rl",
        "tasks": ["push"],
        "method": ["l2", "sphere"],
        "label": "free",
        "seed": 3,
    }
    assert stem_of(config | changes, folder) == stem


def test_the_page_is_made_from_them(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(RunFolder(trained / "runs" / "gym-crl-topk_moe-free-seed0"), tmp_path / "published")
    assert cli.main(["report", str(tmp_path / "published"), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Pendulum-v1" in page
    assert "policies are not published" in page
    assert capsys.readouterr().err == ""


def test_another_run_does_not_replace_one(trained: Path, tmp_path: Path) -> None:
    folder = RunFolder(trained / "runs" / "gym-crl-topk_moe-free-seed0")
    publish(folder, tmp_path)
    path = PublishedRun(tmp_path / "crl-free-seed0").config_path
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"config": record["config"] | {"gamma": 0.5}}))
    with pytest.raises(RunFolderError, match=r"crl-free-seed0-config\.json: another run has this name"):
        publish(folder, tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"plain text\n", lambda data: data[:20]])
def test_a_damaged_log_is_named(damage, trained: Path, tmp_path: Path) -> None:
    stem = publish(RunFolder(trained / "runs" / "gym-crl-topk_moe-free-seed0"), tmp_path)
    log = tmp_path / f"{stem}-spectrum.jsonl.gz"
    log.write_bytes(damage(log.read_bytes()))
    with pytest.raises(RunFolderError, match=r"crl-free-seed0-spectrum\.jsonl\.gz: is not gzip"):
        load_results(tmp_path)


@pytest.mark.parametrize("stem", STEMS, ids=lambda stem: str(stem.relative_to(DOCS)))
def test_what_is_published_here_is_whole(stem: Path) -> None:
    """Every file of every run, also of those that others have added."""
    published = PublishedRun(stem)
    assert [path.exists() for path in published.files] == [True] * (1 + len(PUBLISHED))
    config, record = from_dict(published.config()), published.record()
    assert stem.name.startswith(f"{config.protocol}-")
    assert stem.name.endswith(f"-seed{config.seed}")
    assert record["commit"], "made from a commit"
    assert {"sphere-rl", "torch", "numpy"} <= record["versions"].keys()
    assert published.status()["state"] in ("finished", "interrupted", "running")
    evals = published.read("eval")
    assert evals
    assert [row["global_step"] for row in evals] == sorted(row["global_step"] for row in evals)
    assert {row["task"] for row in evals} <= set(config.task_sequence)
    if published.status()["state"] == "finished":
        assert [row["task"] for row in evals if row["phase"] == "final"] == list(config.task_sequence)


def test_what_is_published_here_is_small() -> None:
    assert sum(path.stat().st_size for stem in STEMS for path in PublishedRun(stem).files) < 10e6
    assert all(gzip.decompress(path.read_bytes()) for stem in STEMS for path in PublishedRun(stem).files[1:2])
