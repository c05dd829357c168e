"""``sphere diagnose`` on runs that were trained here: its numbers are those of the library on the same states."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from conftest import TINY

from sphere_rl import protocol
from sphere_rl.cli import main
from sphere_rl.config import TrainConfig, override
from sphere_rl.correlations import correlation
from sphere_rl.report.geometry import snapshots
from sphere_rl.runs import RunFolder
from sphere_rl.spectrum import SPECTRAL_METRICS, effective_rank, entk, gram_effective_rank, measure
from sphere_rl.suites import make_suite
from sphere_rl.terminal.tables import print_columns
from sphere_rl.training.diagnosis import diagnose, select
from sphere_rl.training.policies import Chosen, load_policy
from sphere_rl.training.probe import probe_observations
from sphere_rl.training.proxy import batches_of, proxy_table, visited_states
from sphere_rl.training.saved import config_of

TASKS = ["Pendulum-v1", "Pendulum-v1"]
UPDATE_ONLY = {"grama_ratio", "grad_norm", "weight_change", "churn"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, with a normaliser: a policy measured on unnormalised states would show."""
    path = tmp_path_factory.mktemp("runs") / "run"
    changes = TINY | {"tasks": TASKS, "normalize_observations": True, "spectrum_every": -1, "final_eval_episodes": 1}
    train(override(TrainConfig(), changes), path)
    return path


def train(config: TrainConfig, path: Path) -> RunFolder:
    with RunFolder(path) as folder:
        protocol.start(config, folder, lambda step: [])
    return folder


def lines(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_json_is_what_the_library_measures(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(run), "--json"]) == 0
    rows = lines(capfd)
    assert [(row["checkpoint"], row["global_step"], row["task_index"]) for row in rows] == [
        ("task-00-Pendulum-v1", 512, 0),
        ("task-01-Pendulum-v1", 1024, 1),
    ]  # the latest checkpoint is the second of them
    raw = torch.as_tensor(probe_observations(make_suite("gym"), ("Pendulum-v1",)))
    for row in rows:
        policy = load_policy(run, row["checkpoint"])
        observation = policy.normalize(raw)
        assert not torch.equal(observation, raw)
        for name, value in measure(policy.actor, observation).items():
            assert row[name] == pytest.approx(value), name
        assert set(SPECTRAL_METRICS) - set(row) == UPDATE_ONLY
        assert row["states"] == row["kernel_states"] == len(row["kernel_eigenvalues"]) == 256
        assert row["kernel_eigenvalues"] == sorted(row["kernel_eigenvalues"], reverse=True)
        assert sum(row["kernel_eigenvalues"]) == pytest.approx(entk(policy.actor, observation).trace().item(), rel=1e-4)
        assert effective_rank(np.array(row["kernel_eigenvalues"])) == pytest.approx(row["r_e_K"], rel=1e-6)
        assert effective_rank(np.array(row["feature_eigenvalues"])) == pytest.approx(row["r_e_A"], rel=1e-6)
        shares = {kind: sum(b["share"] for b in row["blocks"] if b["kind"] == kind) for kind in ("layer", "expert")}
        gate = sum(b["share"] for b in row["blocks"] if b["kind"] == "gate")
        assert shares["layer"] + gate == pytest.approx(1)
        assert shares["expert"] + gate == pytest.approx(1)
    assert rows[0]["r_e_K"] != rows[1]["r_e_K"]


def test_tables_hold_every_metric_and_block_and_the_figure_is_written(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / "spectrum.png").unlink(missing_ok=True)
    assert main(["diagnose", str(run), "--checkpoint", "task-00-Pendulum-v1", "latest"]) == 0
    out, err = capfd.readouterr()
    cells = {words[0]: words for line in out.splitlines() if (words := [word for word in line.split(" ") if word])}
    scalars = set(SPECTRAL_METRICS) - UPDATE_ONLY - {"expert_load"}
    assert scalars <= set(cells)
    assert cells["metric"] == ["metric", "task-00-Pendulum-v1", "step-000000001024"]
    assert cells["global_step"] == ["global_step", "512", "1\N{NO-BREAK SPACE}024"]
    for name in ("gate", "experts.hidden.0", "experts.hidden.1", "experts.head"):
        assert len(cells[name]) == 5  # name and, twice, share and rank
    assert all(f"expert {i} " in out for i in range(3))
    assert (run / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert err == f"figure: {run / 'spectrum.png'}\n"


def test_columns_go_on_below_where_a_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))
    monkeypatch.setenv("COLUMNS", "40")
    print_columns("", "row", {f"column-{i}": {"a": i, "b": "x" * 10} for i in range(5)})
    heads = [found for line in capfd.readouterr().out.splitlines() if (found := re.findall(r"column-\d", line))]
    assert heads == [["column-0", "column-1"], ["column-2", "column-3"], ["column-4"]]


def test_proxy_prints_and_draws_pearson_with_its_interval(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "proxy.svg"
    assert main(["diagnose", str(run), "--proxy", "--batches", "3", "--json", "--out", str(out)]) == 0
    rows = lines(capfd)
    kinds = [(f"task-0{i}-Pendulum-v1", source, 3) for i in (0, 1) for source in ("probe", "visited")]
    assert [(row["checkpoint"], row["states"], row["batches"]) for row in rows] == [("all", "all", 12), *kinds]
    folder = RunFolder.existing(run)
    table = proxy_table(folder, select(folder, None), 3)
    a, k = table["r_e_A"].to_numpy(), table["r_e_K"].to_numpy()
    r = np.corrcoef(a, k)[0, 1]
    assert rows[0]["pearson_r"] == pytest.approx(r)
    half = 1.959964 / np.sqrt(12 - 3)
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(
        (np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half))
    )
    assert "<svg" in out.read_text()
    assert main(["diagnose", str(run), "--proxy", "--batches", "2", "--out", str(out)]) == 0
    assert "Fisher's z" in capfd.readouterr().out


def test_proxy_batches_are_disjoint_and_of_both_kinds(run: Path) -> None:
    folder = RunFolder.existing(run)
    table = proxy_table(folder, select(folder, ["task-01-Pendulum-v1"]), 2)
    assert table["source"].to_list() == ["probe", "probe", "visited", "visited"]
    policy = load_policy(run, "task-01-Pendulum-v1")
    seen = [states for _, _, states in batches_of(policy, config_of(folder), ["Pendulum-v1"], 2)]
    assert [batch.shape for batch in seen] == [(64, 3)] * 4
    assert len(np.unique(np.concatenate(seen), axis=0)) > 250  # Pendulum's start states alone may coincide
    observation = policy.normalize(torch.as_tensor(seen[3]))
    features = policy.actor.trace(observation).features[-1].weighted().detach()
    assert table["r_e_A"][3] == pytest.approx(gram_effective_rank(features))
    kernel = torch.linalg.eigvalsh(entk(policy.actor, observation).double())
    assert table["r_e_K"][3] == pytest.approx(effective_rank(kernel))


def test_visited_states_are_the_policys_own_and_the_same_each_time(run: Path) -> None:
    one, two = (load_policy(run, f"task-0{i}-Pendulum-v1") for i in (0, 1))
    states = visited_states(one, "gym", "Pendulum-v1", 64)
    assert np.array_equal(states, visited_states(one, "gym", "Pendulum-v1", 64))
    assert not np.array_equal(states, visited_states(two, "gym", "Pendulum-v1", 64))


def test_correlation_by_hand() -> None:
    table = pl.DataFrame({"r_e_A": [1.0, 2.0, 3.0], "r_e_K": [1.0, 3.0, 2.0]})
    found = correlation(table)
    assert found["pearson_r"] == pytest.approx(0.5)  # Σ ΔaΔk = 1, Σ Δa² = Σ Δk² = 2
    assert (found["batches"], found["r_e_A"], found["low"], found["high"]) == (3, 2.0, None, None)
    assert correlation(table.with_columns(r_e_A=1.0))["pearson_r"] is None
    assert correlation(table[:2])["pearson_r"] is None


def test_rl_between_tasks_means_the_agent_of_the_task_before(tmp_path: Path) -> None:
    changes = TINY | {"tasks": TASKS, "protocol": "rl", "steps_per_task": 128, "spectrum_every": -1}
    folder = train(override(TrainConfig(), changes | {"eval_episodes": 1, "final_eval_episodes": 1}), tmp_path / "rl")
    first, second = (folder.checkpoints / f"task-0{i}-Pendulum-v1.pt" for i in (0, 1))
    assert select(folder, None) == [Chosen(first, 128, 0), Chosen(second, 256, 1)]
    assert select(folder, ["step-000000000128", "latest", "latest"]) == [Chosen(first, 128, 0), Chosen(second, 256, 1)]
    first.unlink()
    second.unlink()
    (folder.checkpoints / "step-000000000256.pt").unlink()
    (folder.checkpoints / "step-000000000128.pt").unlink()
    assert main(["diagnose", str(folder.path)]) == 2


def test_training_that_has_gone_on_since_the_last_task_is_measured_too(run: Path) -> None:
    folder = RunFolder.existing(run)
    last = folder.checkpoints / "task-01-Pendulum-v1.pt"
    content = last.read_bytes()
    last.unlink()
    try:
        assert [(one.path.stem, one.task_index) for one in select(folder, None)] == [
            ("task-00-Pendulum-v1", 0),
            ("step-000000001024", 1),
        ]
    finally:
        last.write_bytes(content)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nowhere", "nowhere: not a run folder; expected one with a config.json"),
        ("RUN --checkpoint best", "checkpoint: 'best' is not in RUN; expected latest or one of task-00-Pendulum-v1"),
        ("RUN --out a.gif", "--out: 'a.gif' is not allowed; expected a .png, .svg or .pdf file"),
        ("RUN --batches 3", "--batches: only allowed with --proxy"),
        ("RUN --proxy --batches 0", "argument --batches: '0' is not allowed; expected a whole number above 0"),
        ("RUN --checkpoint latest --json --out /proc/x.png", "/proc/x.png: cannot be written"),
    ],
)
def test_bad_words_exit_with_2_and_one_line(
    run: Path, words: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", *words.replace("RUN", str(run)).split()]) == 2
    error = capfd.readouterr().err
    assert message.replace("RUN", str(run)) in error
    assert error.count("\n") == 1


def test_a_policy_with_two_modes_is_measured_as_it_collects_experience(tmp_path: Path) -> None:
    """All experts of ds_moe, everywhere: one of three in evaluation would be another K."""
    changes: dict[str, Any] = TINY | {"tasks": TASKS[:1], "actor": "ds_moe", "network": {"width": 8, "top_k": 1}}
    folder = train(override(TrainConfig(), changes), tmp_path / "run")
    (row,) = [row for row in folder.read("spectrum") if (row["batch"], row["task_step"]) == ("probe", 512)]
    (chosen,) = select(folder, None)
    found = diagnose(folder, chosen)
    assert found.metrics == {name: row[name] for name in found.metrics}
    assert effective_rank(found.kernel_eigenvalues) == pytest.approx(row["r_e_K"])
    (snapshot,) = snapshots(folder.path)
    assert snapshot.kernel_rank == pytest.approx(row["r_e_K"])
    assert sum(found.metrics["expert_load"]) == len(found.metrics["expert_load"])  # type: ignore[arg-type]
    (batch, *_) = batches_of(load_policy(folder.path), config_of(folder), TASKS[:1], 1)
    policy = load_policy(folder.path).train()
    kernel = entk(policy.actor, policy.normalize(torch.as_tensor(batch[2]))).double()
    assert proxy_table(folder, [chosen], 1)["r_e_K"][0] == effective_rank(torch.linalg.eigvalsh(kernel))
