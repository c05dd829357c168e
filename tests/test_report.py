"""The report from real short runs: tables, labels, the page's data, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import polars as pl
import pytest
import torch
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from sphere_rl import cli, report
from sphere_rl.config import from_dict
from sphere_rl.errors import CommandLineError, RunFolderError
from sphere_rl.labels import method_labels
from sphere_rl.report import content, page
from sphere_rl.report.geometry import snapshots
from sphere_rl.results import load_results
from sphere_rl.runs import RunFolder
from sphere_rl.spectrum import SPECTRAL_METRICS, entk, measure
from sphere_rl.suites import make_suite
from sphere_rl.training.policies import load_policy
from sphere_rl.training.probe import probe_observations

TASKS = ("Pendulum-v1", "LightPendulum-v0")
gymnasium.register(
    "LightPendulum-v0", "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=100, kwargs={"g": 5.0}
)
TRAIN = (
    "--suite gym --num-envs 2 --num-steps 64 --minibatch-size 32 --num-epochs 1 --width 8 --depth 1 --num-experts 3 "
    "--steps-per-task 256 --eval-every 128 --eval-episodes 1 --final-eval-episodes 1 --checkpoint-every 256 "
    "--spectrum-every -1 --quiet"
).split()
DRAWN = (
    "geometry", "rank", "success", "features", "proxy", "learning", "spectrum", "routing", "profile", "foresight",
)  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


def add_spectrum(run: Path) -> None:
    """Measure the policies at the ends of the tasks, as the training loop does while it goes."""
    config = from_dict(RunFolder.existing(run).config())
    states = torch.as_tensor(probe_observations(make_suite("gym"), TASKS, 24))
    with (run / "spectrum.jsonl").open("w") as file:
        for row in RunFolder(run).read("eval"):
            if row["phase"] == "final":
                policy = load_policy(run, f"task-{row['task_index']:02d}-{row['task']}")
                place = {name: row[name] for name in ("global_step", "task_index", "task", "task_step")}
                for batch in ("probe", "rollout"):
                    part = states if batch == "probe" else states[::2]
                    file.write(json.dumps(place | {"batch": batch} | measure(policy.actor, part)) + "\n")
    assert config.task_sequence == TASKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain PPO and SPHERE: CRL with two seeds, RL with one; one run more stands for one that failed."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")
    for method in ("none", "sphere"):
        for protocol, seed in (("crl", 0), ("crl", 1), ("rl", 0)):
            out = root / f"{protocol}-{method}-{seed}"
            words = ["--protocol", protocol, "--method", method, "--seed", str(seed), "--tasks", *TASKS]
            assert cli.main(["train", *TRAIN, *words, "--out", str(out)]) == 0
            if protocol == "crl":
                add_spectrum(out)
    return root


@pytest.fixture(scope="module")
def suite(runs: Path) -> content.SuiteContent:
    return content.SuiteContent("gym", load_results(runs))


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.make_page(load_results(runs), tmp_path_factory.mktemp("page")).path


def lines(runs: Path, run: str, log: str = "eval", **match: Any) -> list[dict[str, Any]]:
    return [row for row in RunFolder(runs / run).read(log) if all(row[key] == value for key, value in match.items())]


def final_return(runs: Path, run: str) -> list[float]:
    return [row["mean_return"] for row in lines(runs, run, phase="final")]


def unbroken(trace: dict[str, Any]) -> list[tuple[float, float]]:
    """The points of a line, without the gaps between its tasks."""
    return [(x, y) for x, y in zip(trace["x"], trace["y"], strict=True) if x is not None]


def data_of(written: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', written.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_tables_hold_every_line(runs: Path) -> None:
    results = load_results(runs)
    assert results.runs.height == 6
    assert results.tasks == {"gym": TASKS}
    assert results.evals.height == sum(len(RunFolder(path).read("eval")) for path in runs.iterdir())
    assert results.evals.filter(pl.col("run") == "crl-none-0")["mean_return"].to_list() == [
        row["mean_return"] for row in RunFolder(runs / "crl-none-0").read("eval")
    ]
    assert set(results.runs["state"]) == {"finished"}
    with pytest.raises(RunFolderError, match="holds no run folder"):
        load_results(runs / "crl-none-0" / "checkpoints")


def test_labels_tell_runs_apart_by_what_differs() -> None:
    base = {"suite": "s", "actor": "a", "seed": 0, "tasks": [], "protocol": "crl", "gamma": 0.9, "device": "cpu"}
    plain = base | {"method": ["none"], "sphere": {"rho": 0.1}}
    small = base | {"method": ["sphere", "layernorm"], "sphere": {"rho": 0.01}, "network": {"width": 8}}
    large = small | {"sphere": {"rho": 0.1}, "seed": 1, "device": "cuda", "protocol": "rl"}
    labels = method_labels([plain, small, large, plain | {"sphere": {"rho": 9.0}}])
    assert labels == ["none", "sphere+layernorm rho=0.01", "sphere+layernorm rho=0.1", "none"]
    given = [plain | {"env_args": {"g": 1}}, plain | {"env_args": {}}, plain | {"env_args": {"g": 2, "name": "x"}}]
    assert method_labels(given) == ["none g=1 name=None", "none g=None name=None", "none g=2 name=x"]
    assert method_labels([plain, plain | {"max_episode_steps": 0, "env_args": {}}]) == ["none", "none"]  # older runs
    assert method_labels([plain, plain | {"gamma": 0.5}]) == ["none gamma=0.9", "none gamma=0.5"]
    segments = [plain | {"checkpoint_every": steps} for steps in (16384, 1000000)]  # environments start anew at each
    assert method_labels(segments) == ["none checkpoint_every=16384", "none checkpoint_every=1000000"]
    old = base | {"method": ["sphere"], "sphere": {"rho": 0.1, "strength": 1e-3}}  # from before there was a scale
    new, free = (old | {"sphere": {"rho": 0.1, "strength": None, "scale": scale}} for scale in ("literal", "free"))
    assert method_labels([old, new]) == ["sphere", "sphere"]
    assert method_labels([old, new, free]) == ["sphere scale=literal", "sphere scale=literal", "sphere scale=free"]


def test_headline_is_the_mean_of_the_final_lines(runs: Path, suite: content.SuiteContent) -> None:
    plain, ours = suite.rows
    assert (plain["method"], ours["method"]) == ("none", "sphere")
    for row, method in ((plain, "none"), (ours, "sphere")):
        crl = [value for seed in (0, 1) for value in final_return(runs, f"crl-{method}-{seed}")]
        rl = final_return(runs, f"rl-{method}-0")
        assert row["crl"].value == pytest.approx(np.mean(crl))
        assert (row["crl"].seeds, row["rl"].seeds, row["rl"].low) == (2, 1, None)
        assert row["gap"].value == pytest.approx(np.mean(rl) - np.mean(crl))
        kept = [r["mean_return"] for s in (0, 1) for r in lines(runs, f"crl-{method}-{s}", phase="retention")]
        assert row["retention"].value == pytest.approx(np.mean(kept))


def test_ranks_and_tasks_are_the_last_probe_lines(runs: Path, suite: content.SuiteContent, written: Path) -> None:
    last = {
        (method, seed): [row["r_e_K"] for row in lines(runs, f"crl-{method}-{seed}", "spectrum", batch="probe")]
        for method in ("none", "sphere")
        for seed in (0, 1)
    }  # the fixture measures once a task
    plain, ours = (np.array([last[method, 0], last[method, 1]]) for method in ("none", "sphere"))
    assert [row["r_e_K"].value for row in suite.rows] == pytest.approx([plain.mean(), ours.mean()])
    assert suite.differences[0]["r_e_K"].value == pytest.approx((ours - plain).mean())
    headline = pl.read_csv(written.parent / "tables" / "headline.csv").filter(pl.col("number") == "r_e_K")
    assert headline["value"].to_list() == pytest.approx([plain.mean(), ours.mean()])
    table = pl.read_csv(written.parent / "tables" / "tasks.csv")
    assert table.select("task", "method", "protocol", "seeds").rows() == [
        (task, method, protocol, seeds)
        for task in TASKS for method in ("none", "sphere") for protocol, seeds in (("crl", 2), ("rl", 1))
    ]  # fmt: skip
    second = table.row(by_predicate=(pl.col("place") == 1) & (pl.col("method") == "sphere") & (pl.col("seeds") == 2),
                       named=True)  # fmt: skip
    assert second["r_e_K"] == pytest.approx(ours[:, 1].mean())
    returns = [final_return(runs, f"crl-sphere-{seed}")[1] for seed in (0, 1)]
    assert (second["mean_return"], second["mean_return_low"]) == pytest.approx((np.mean(returns), min(returns)))
    assert second["success_final"] is None
    html = written.read_text()
    assert html.count('data-label="Seeds">') == 8
    assert html.count("<p>CRL rₑ(K)</p>") == 2
    assert f'<p class="number">{ours.mean():.2f}</p>' in html


def test_a_method_has_one_colour_on_the_whole_page(written: Path) -> None:
    data = data_of(written)
    assert data["methods"] == {"gym": {"order": ["none", "sphere"], "pair": ["none", "sphere"]}}
    seen: dict[str, set[int]] = {"none": set(), "sphere": set()}
    for panel in data["panels"].values():
        for choice, traces in panel["choices"].items():
            for trace in traces:
                method = next((one for one in seen if trace.get("name", "").startswith(one)), choice.partition(",")[0])
                if trace["type"] == "bar":
                    assert trace["palette"] in ([0, 1], None)  # its legend is grey
                elif trace["type"] != "heatmap":
                    seen[method].add(trace["palette"])
    assert seen == {"none": {0}, "sphere": {1}}


def test_snapshots_are_spectra_of_the_tasks_policies(runs: Path) -> None:
    found = snapshots(runs / "crl-none-0")
    assert [s.task for s in found] == list(TASKS)
    states = torch.as_tensor(probe_observations(make_suite("gym"), TASKS))
    for snapshot, name in zip(found, ("task-00-Pendulum-v1", "task-01-LightPendulum-v0"), strict=True):
        policy = load_policy(runs / "crl-none-0", name)
        oracle = torch.linalg.eigvalsh(entk(policy.actor.double(), states.double())).flip(0)
        assert np.allclose(snapshot.kernel_eigenvalues[:3], oracle[:3], rtol=1e-3)
        phi = policy.actor.trace(states.double()).features[-1].weighted().detach()
        gram = torch.linalg.eigvalsh(phi.T @ phi / 256).flip(0)
        assert np.allclose(snapshot.feature_eigenvalues[:3], gram[:3], rtol=1e-3)


def test_probe_batch_depends_on_its_arguments_alone() -> None:
    one, two = (probe_observations(make_suite("gym"), TASKS, 9, seed=1) for _ in range(2))
    assert one.shape == (9, 3)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, probe_observations(make_suite("gym"), TASKS, 9, seed=2))
    assert np.array_equal(one[:5], probe_observations(make_suite("gym"), TASKS[:1], 5, seed=1))


def test_page_data_are_the_lines_of_the_runs(runs: Path, written: Path) -> None:
    panels = data_of(written)["panels"]
    mean = next(t for t in panels["learning-gym"]["choices"]["CRL"] if t["name"] == "none" and "band" not in t)
    for x, y in unbroken(mean):
        rows = [r for s in (0, 1) for r in lines(runs, f"crl-none-{s}", global_step=x) if r["phase"] != "retention"]
        assert y == pytest.approx(np.mean([row["mean_return"] for row in rows]))
    assert mean["x"] == [128, 256, None, 384, 512]  # the line does not join two tasks
    alone = next(t for t in panels["learning-gym"]["choices"]["RL"] if t["name"] == "none" and "band" not in t)
    assert [y for _, y in unbroken(alone)] == [row["mean_return"] for row in lines(runs, "rl-none-0")]
    assert [shape["x0"] for shape in panels["learning-gym"]["layout"]["shapes"]] == [0, 256]
    for metric in ("r_e_K", "dormant_ratio"):
        rank = next(t for t in panels["rank-gym"]["choices"][metric] if t["name"] == "sphere" and "band" not in t)
        measured = [lines(runs, f"crl-sphere-{s}", "spectrum", batch="probe") for s in (0, 1)]
        assert [y for _, y in unbroken(rank)] == pytest.approx(
            [(a[metric] + b[metric]) / 2 for a, b in zip(*measured, strict=True)]
        )
    (heat,) = panels["routing-gym"]["choices"]["none"]
    load = heat["z"]
    assert heat["x"] == [0, 256, 512]  # edges: a column ends where it was measured, none goes beyond the run
    assert [shape["x0"] for shape in panels["routing-gym"]["layout"]["shapes"]] == [0, 256]
    assert np.array(load).T.tolist() == [r["expert_load"] for r in lines(runs, "crl-none-0", "spectrum", batch="probe")]
    assert sum(len(trace["x"]) for trace in panels["proxy-gym"]["choices"][""]) == 2 * 2 * 2 * 2
    assert panels["rho-gym"]["missing"].startswith("finished runs of SPHERE that differ in ρ")
    assert panels["architectures-gym"]["choices"] == {}


def test_page_is_whole_and_stands_alone(written: Path) -> None:
    html = written.read_text()
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', own)
    assert 4e6 < len(html) < 7e6
    for link in re.findall(r'href="((?:figures|tables)/[^"]+)"', html):
        assert (written.parent / link).stat().st_size > 0
    assert html.count("Missing: ") == 3  # architectures, ρ, variants
    drawn = {path.name for path in (written.parent / "figures").iterdir()}
    assert drawn == {f"gym-{name}.{kind}" for name in DRAWN for kind in ("png", "svg", "pdf")}
    assert set(re.findall(r'href="figures/([^"]+)"', html)) == drawn
    assert "--method sphere --seed 1 --steps-per-task 256" in html
    table = pl.read_csv(written.parent / "tables" / "evaluations.csv")
    assert table.height == 4 * (4 + 2) + 2 * 4
    assert (pl.read_csv(written.parent / "tables" / "spectrum.csv")["r_e_K"] > 1).all()


def test_unfinished_and_failed_runs_are_shown(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "crl-none-0", tmp_path / "r" / "broken")
    folder = RunFolder(tmp_path / "r" / "broken")
    final = [json.dumps(row) + "\n" for row in folder.read("eval")[:2]]
    (folder.path / "eval.jsonl").write_text("".join(final))
    (folder.path / "spectrum.jsonl").unlink()
    folder.set_status("failed", 256, TASKS[1], "TrainingError: loss is not <finite>")
    (tmp_path / "r" / "sweep.json").write_text(json.dumps({"commands": ["sphere sweep --x"], "runs": ["other"]}))
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    assert "TrainingError: loss is not &lt;finite&gt;" in html
    assert '<th scope="row">other</th><td><span class="state">planned</span>' in html
    assert "<code>sphere sweep --x</code>" in html
    assert 'data-number="crl" class="none"><b>–</b><small>missing</small>' in html
    assert data_of(tmp_path / "p" / "index.html")["panels"]["rank-gym"]["missing"] == "no spectrum lines of CRL runs"


def test_numbers_that_no_run_gives_have_no_column(runs: Path, written: Path, tmp_path: Path) -> None:
    for name in ("crl-none-0", "crl-sphere-0"):
        shutil.copytree(runs / name, tmp_path / "r" / name)
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    both = written.read_text()
    for mark in ('data-number="rl"', 'data-number="gap"', 'data-difference="gap"', "Difference of the RL"):
        assert mark in both
        assert mark not in html
    assert "These runs do not give RL, RL − CRL, Forward transfer." in html
    assert "These runs do not give Forward transfer." in both  # of returns there is none
    assert 'data-number="crl"><b>' in html


def test_differences_are_paired_by_seed_and_task(runs: Path, suite: content.SuiteContent, written: Path) -> None:
    (row,) = suite.differences
    assert (row["label"], row["reference"]) == ("sphere", "none")
    gains = [np.subtract(final_return(runs, f"crl-sphere-{s}"), final_return(runs, f"crl-none-{s}")) for s in (0, 1)]
    assert row["crl"].value == pytest.approx(np.mean(gains))
    ends = sorted(gain.mean() for gain in gains)  # of two seeds, the interval's ends are the two seeds alone
    assert (row["crl"].low, row["crl"].high) == pytest.approx(tuple(ends))
    assert row["gap"].value == pytest.approx(suite.rows[1]["gap"].value - suite.rows[0]["gap"].value)
    table = pl.read_csv(written.parent / "tables" / "differences.csv")
    assert table.filter(pl.col("number") == "crl")["value"].to_list() == [pytest.approx(np.mean(gains))]
    shown = re.search(r'data-difference="crl"><b>(.*?)</b><small>(.*?)</small>', written.read_text())
    assert shown
    assert [float(word.replace("−", "-")) for word in (shown[1], *shown[2].split(" to "))] == [
        pytest.approx(value, abs=0.006 if abs(np.mean(gains)) < 100 else 0.6) for value in (np.mean(gains), *ends)
    ]


def test_tracked_rank_is_that_of_the_report(tmp_path: Path) -> None:
    """Training, the report and a diagnosis measure on one and the same probe batch, also where a suite has no tasks."""
    words = [*TRAIN, "--protocol", "crl", "--tasks", *TASKS, "--spectrum-every", "256", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words]) == 0
    tracked = [row for row in RunFolder(tmp_path / "run").read("spectrum") if row["batch"] == "probe"]
    taken = snapshots(tmp_path / "run")
    assert [s.kernel_rank for s in taken] == pytest.approx([row["r_e_K"] for row in tracked], rel=1e-4)


def test_sequences_are_not_mixed(runs: Path, tmp_path: Path) -> None:
    """A CRL run on other tasks is a part of its own, RL runs belong to each sequence that has their task."""
    root = tmp_path / "r"
    for name in ("crl-none-0", "rl-none-0"):
        shutil.copytree(runs / name, root / name)
    other = ["--protocol", "crl", "--tasks", "MountainCarContinuous-v0", "--method", "none"]
    assert cli.main(["train", *TRAIN, *other, "--out", str(root / "other")]) == 0
    parts = load_results(root).by_sequence()
    assert {name: sorted(part.runs["run"]) for name, part in parts.items()} == {
        "gym": ["crl-none-0", "rl-none-0"],
        "gym-2": ["other"],
    }
    html = page.make_page(load_results(root), tmp_path / "p").path.read_text()  # with policies of two observation sizes
    assert '<h2 class="part">gym: MountainCarContinuous-v0</h2>' in html
    found = data_of(tmp_path / "p" / "index.html")["geometry"]
    assert {name: [one["task"] for one in views["none"]] for name, views in found.items()} == {
        "gym": list(TASKS),
        "gym-2": ["MountainCarContinuous-v0"],
    }
    figures = tmp_path / "p" / "figures"
    assert (figures / "gym-2-geometry.png").is_file()
    own = figures / "gym-2-mine.png"
    own.write_bytes(b"mine")
    shutil.rmtree(root / "other")
    html = page.make_page(load_results(root), tmp_path / "p").path.read_text()
    assert {path for path in figures.iterdir() if path.name.startswith("gym-2-")} == {own}  # nobody else's files
    assert set(re.findall(r'href="figures/([^"]+)"', html)) == {path.name for path in figures.iterdir()} - {own.name}


def test_figures_that_only_another_page_names_are_left_alone(runs: Path, tmp_path: Path) -> None:
    """A page that is not the report's, and figures that it has never linked to."""
    shutil.copytree(runs / "rl-none-0", tmp_path / "r" / "rl-none-0")
    (tmp_path / "p" / "figures").mkdir(parents=True)
    kept = tmp_path / "p" / "figures" / "mine-rank.png"
    kept.write_bytes(b"mine")
    link = '<a href="figures/mine-rank.png" download>png</a>'
    (tmp_path / "p" / "index.html").write_text(link)
    for _ in range(2):
        page.make_page(load_results(tmp_path / "r"), tmp_path / "p")
        assert kept.read_bytes() == b"mine"


class Ruined(PendulumEnv):
    """An environment whose rewards are not numbers."""

    def step(self, u):
        return *super().step(u)[:1], float("nan"), False, False, {}


gymnasium.register(
    "RuinedPendulum-v0", lambda **options: Ruined(**options), max_episode_steps=100, disable_env_checker=True
)


def test_sequence_that_fails_in_its_second_task_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    tasks = ["--tasks", "Pendulum-v1", "RuinedPendulum-v0", "--spectrum-every", "256"]
    assert cli.main(["train", *TRAIN, *tasks, "--method", "none", "--out", str(tmp_path / "r" / "run")]) == 3
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    assert "TrainingError: task RuinedPendulum-v0, iteration 1" in html
    views = data_of(tmp_path / "p" / "index.html")["geometry"]["gym"]
    assert [one["task"] for one in views["none"]] == ["Pendulum-v1"]


def test_broken_policy_is_missing_with_a_reason(runs: Path, tmp_path: Path) -> None:
    for name in ("crl-none-0", "crl-sphere-0"):
        shutil.copytree(runs / name, tmp_path / "r" / name)
    broken = tmp_path / "r" / "crl-sphere-0" / "checkpoints" / f"task-00-{TASKS[0]}.pt"
    broken.write_bytes(broken.read_bytes()[:-100])
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    assert re.search(r'<p class="missing">Missing: sphere \(.*task-00-Pendulum-v1\.pt', html)
    assert list(data_of(tmp_path / "p" / "index.html")["geometry"]["gym"]) == ["none"]


def test_watch_follows_a_run_that_goes_on(tmp_path: Path) -> None:
    """A run in another process; the page is made anew while it trains, and without the live button at its end."""
    out, run = tmp_path / "p", tmp_path / "r" / "run"
    words = [*TRAIN, "--tasks", "Pendulum-v1", "--steps-per-task", "200000", "--out", str(run)]
    code = "import sys; from sphere_rl.cli import main; sys.exit(main())"
    training = subprocess.Popen([sys.executable, "-c", code, "train", *words], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(RunFolder(run).read("eval")) > 1)
        line = [sys.executable, "-c", code, "report", str(run.parent), "--out", str(out), "--watch", "1"]
        watching = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        wait_until(lambda: (out / "index.html").is_file())
        first = shown_steps(out)
        wait_until(lambda: shown_steps(out)[-1] > first[-1])
        assert shown_steps(out)[: len(first)] == first
        assert 'id="live"' in (out / "index.html").read_text()
        training.send_signal(signal.SIGINT)
        assert training.wait(60) == 130
        printed, _ = watching.communicate(timeout=120)
    finally:
        training.kill()
        training.wait()
    assert watching.returncode == 0
    assert len(printed.splitlines()) >= 3
    assert 'id="live"' not in (out / "index.html").read_text()
    assert shown_steps(out) == [row["global_step"] for row in RunFolder(run).read("eval")]


def shown_steps(out: Path) -> list[int]:
    """Where the page's learning curve has points."""
    (choice,) = data_of(out / "index.html")["panels"]["learning-gym"]["choices"].values()
    return choice[1]["x"]


def wait_until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_watch_ends_with_the_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(runs), "--out", str(tmp_path), "--watch", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "index.html")]
    assert 'id="live"' not in (tmp_path / "index.html").read_text()
    with pytest.raises(CommandLineError, match="whole number above 0"):
        report.command([str(runs), "--watch", "0"])


def test_a_page_does_not_go_into_a_run(runs: Path) -> None:
    folder = next(path.parent for path in sorted(runs.rglob("config.json")))
    with pytest.raises(CommandLineError, match=f"--out: {folder} is a run's own folder"):
        report.command([str(runs), "--out", str(folder)])
    assert not (folder / "index.html").exists()


# ---- in a browser


@pytest.fixture(scope="module")
def browser(written: Path) -> Iterator[Any]:
    """Headless Chromium with the page open."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium and chromedriver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.page_load_strategy = (
        "none"  # software rendering may take long on a busy machine: we wait for the page's word
    )
    for flag in ("headless=new", "no-sandbox", "use-angle=swiftshader", "enable-unsafe-swiftshader",
                 "window-size=1200,900", "disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(100)
    driver.get(written.as_uri())
    wait(driver, "document.documentElement.dataset.ready === 'true'", 300)
    yield driver
    driver.quit()


def wait(driver: Any, condition: str, seconds: float = 60) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, seconds).until(lambda d: d.execute_script(f"return {condition}"))


def drawn(driver: Any, panel: str) -> list[dict[str, Any]]:
    script = "return document.getElementById(arguments[0]).data.map(t => ({name: t.name, x: t.x, y: t.y, z: t.z}))"
    return driver.execute_script(script, panel)


def test_browser_draws_every_figure_with_the_pages_data(browser: Any, written: Path) -> None:
    panels = data_of(written)["panels"]
    for name, panel in panels.items():
        if panel["missing"]:
            assert not browser.find_elements("id", name)
            continue
        first = next(iter(panel["choices"].values()))
        shown = drawn(browser, name)
        assert len(shown) == len(first) > 0
        for ours, theirs in zip(first, shown, strict=True):
            for axis in ("x", "y", "z"):
                assert theirs[axis] == ours.get(axis)
        assert browser.execute_script(
            "return document.getElementById(arguments[0]).querySelectorAll('.main-svg').length", name
        )


def test_browser_reports_no_errors(browser: Any) -> None:
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_browser_choice_changes_the_metric(browser: Any, runs: Path) -> None:
    from selenium.webdriver.support.ui import Select

    def heading() -> str:
        return browser.find_element("id", "title-rank-gym").text

    assert heading().startswith("Effective rank of the eNTK, rₑ(K) paper’s Figure 3")
    Select(browser.find_element("id", "choose-rank-gym")).select_by_visible_text("dormant_ratio")
    assert heading() == "dormant_ratio"  # and no word of the paper's figure
    assert browser.find_element("id", "note-rank-gym").text == SPECTRAL_METRICS["dormant_ratio"]
    Select(browser.find_element("id", "choose-rank-gym")).select_by_visible_text("r_e_A")
    assert heading() == "Effective rank of the features, rₑ(A)"
    shown = next(trace for trace in drawn(browser, "rank-gym")[1::2] if trace["name"] == "none")
    measured = [lines(runs, f"crl-none-{s}", "spectrum", batch="probe") for s in (0, 1)]
    assert [y for _, y in unbroken(shown)] == pytest.approx(
        [(a["r_e_A"] + b["r_e_A"]) / 2 for a, b in zip(*measured, strict=True)]
    )


def test_browser_hover_names_the_value(browser: Any) -> None:
    browser.execute_script("document.getElementById('success-gym').scrollIntoView({behavior: 'instant'})")
    browser.execute_script("Plotly.Fx.hover('success-gym', [{curveNumber: 1, pointNumber: 0}])")
    wait(browser, "document.querySelector('#success-gym .hoverlayer').textContent.includes('CRL')")


def test_browser_slider_moves_the_ellipsoids(browser: Any, runs: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("css selector", ".controls input")
    slider.send_keys(Keys.ARROW_RIGHT)  # from the keyboard
    assert browser.find_element("css selector", ".controls output").text == f"after 2. {TASKS[1]}"
    extent = "Math.max(...document.querySelector('.scene[data-side={}]').data[1].{}.flat())"
    for side, method in (("left", "none"), ("right", "sphere")):
        snapshot = snapshots(runs / f"crl-{method}-0")[1]
        assert snapshot.semi_axes.sum() == pytest.approx(3)
        for axis, length in zip("xyz", snapshot.semi_axes, strict=True):
            # the grid of the surface misses the pole of an axis by less than one cell
            wait(browser, f"Math.abs({extent.format(side, axis)} - {length}) < 0.01")
        reading = browser.find_element("css selector", f".reading[data-side={side}]").text
        assert f"= {snapshot.kernel_rank:.1f} ·" in reading
    play = browser.find_element("css selector", ".play")
    play.click()
    wait(browser, f"document.querySelector('.controls output').textContent === 'after 1. {TASKS[0]}'")
    assert play.get_attribute("aria-label") == "Pause"
    play.click()


def test_browser_theme_and_phone(browser: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(f"return {background}")
    browser.find_element("id", "theme").click()
    assert browser.execute_script(f"return {background}") != before
    browser.find_element("id", "theme").click()
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    wait(browser, "document.documentElement.scrollWidth <= 390")
    # every number of the tables is in the window, without scrolling sideways
    right = "Math.max(...[...document.querySelectorAll('.headline td')].map(e => e.getBoundingClientRect().right))"
    assert browser.execute_script(f"return {right}") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    test_browser_reports_no_errors(browser)
