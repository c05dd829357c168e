"""The page is made from what runs recorded: suites, methods and labels that nothing here knows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sphere_rl.config import from_dict, override, preset, to_dict
from sphere_rl.methods import methods
from sphere_rl.report import content, page, reproduction
from sphere_rl.results import load_results
from sphere_rl.suites import make_suite
from sphere_rl.terminal.arguments import parse_train


def record(folder: Path, tasks: int = 2, score: float = 0.5, rank: float = 4.0, **changes: Any) -> dict[str, Any]:
    """A run folder as one is left behind that has finished ``tasks`` of the tasks push and pull."""
    config = json.loads(json.dumps(to_dict(preset(make_suite("gym")))))
    config |= {"suite": "elsewhere", "tasks": [], "steps_per_task": 2000, "num_envs": 1, "num_steps": 1000, **changes}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config, "versions": {}, "commit": None}))
    logs: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "spectrum": []}
    for i, task in enumerate(("push", "pull")[:tasks]):
        place = {"global_step": 2000 * (i + 1), "task_index": i, "task": task, "task_step": 2000}
        numbers = {"episodes": 1, "success_final": score, "success_once": 1.0, "mean_return": 10 * score}
        numbers |= {"std_return": 1.0, "mean_length": 500.0}
        logs["train"].append(place | {"iteration": 2, "steps_per_second": 100.0})
        logs["eval"].append(place | {"phase": "final"} | numbers)
        for batch, found in (("probe", rank + i), ("rollout", 99.0)):
            logs["spectrum"].append(place | {"batch": batch, "r_e_K": found, "r_e_A": 2.0 + i})
    for name, rows in logs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def headline(out: Path, number: str) -> dict[str, float]:
    table = pl.read_csv(out / "tables" / "headline.csv").filter(pl.col("number") == number)
    return dict(zip(table["method"], table["value"], strict=True))


def test_unknown_suite_and_method_have_their_recorded_names(tmp_path: Path) -> None:
    record(tmp_path / "r" / "a", method=["none"], score=0.25)
    record(tmp_path / "r" / "b", method=["elixir"], elixir={"dose": 2}, score=0.75)
    record(tmp_path / "r" / "c", method=["none"], seed=1, tasks=1)  # still in its second task, of the same sequence
    results = load_results(tmp_path / "r")
    assert results.tasks == {"elsewhere": ("push", "pull")}
    assert list(results.by_sequence()) == ["elsewhere"]
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    assert headline(tmp_path / "p", "crl") == pytest.approx({"none": 0.25, "elixir": 0.75})
    assert headline(tmp_path / "p", "r_e_K") == pytest.approx({"none": 4.5, "elixir": 4.5})
    assert "<li>push</li><li>pull</li>" in html
    assert "Missing: none, elixir (no CRL policy" in html  # its policies cannot be made here
    assert "sphere train --suite elsewhere --protocol crl --actor topk_moe --method elixir" in html
    assert not (tmp_path / "p" / "figures" / "elsewhere-geometry.png").exists()


def test_a_run_that_has_recorded_nothing_breaks_no_page(tmp_path: Path) -> None:
    record(tmp_path / "r" / "a", tasks=0)
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    assert "elsewhere: 0 tasks" in html


def test_labels_do_not_hide_methods(tmp_path: Path) -> None:
    """Arms of a sweep: a label says nothing about the methods, not even where it is another method's name."""
    record(tmp_path / "r" / "a", method=["none"], label="baseline", score=0.25)
    record(tmp_path / "r" / "b", method=["sphere"], label="free", score=0.75, rank=6.0)
    record(tmp_path / "r" / "c", method=["layernorm"], label="sphere_like", score=0.5)
    suite = content.SuiteContent("elsewhere", load_results(tmp_path / "r"))
    assert [row and row["label"] for row in suite.pair] == ["baseline", "free"]
    assert {row["label"]: row["reference"] for row in suite.differences} == dict.fromkeys(
        ("free", "sphere_like"), "baseline"
    )
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    cards = re.findall(r'<p class="number">(.*?)</p><p class="who"><span>(.*?)</span>', html)
    assert cards[:3] == [("0.25", "baseline"), ("0.75", "free"), ("+0.50", "free − baseline")]
    assert cards[3:] == [("4.50", "baseline"), ("6.50", "free")]  # no gap to RL, of which there are no runs
    assert "--method sphere --label free --seed 0" in html
    assert "--method free" not in html


def test_one_label_on_two_methods_is_two_rows(tmp_path: Path) -> None:
    for name, method in (("a", "none"), ("b", "sphere"), ("c", "layernorm")):
        record(tmp_path / name, method=[method], label="none" if name != "c" else "")
    assert load_results(tmp_path).runs["method"].to_list() == ["none", "none (sphere)", "layernorm"]


def test_variants_and_strengths_are_those_of_recorded_settings(tmp_path: Path) -> None:
    usual = to_dict(preset(make_suite("gym")))["sphere"]
    record(tmp_path / "a", method=["none"])
    for rho, score in ((0.1, 0.5), (0.01, 0.25)):
        record(tmp_path / f"{rho}", method=["sphere"], label=f"arm {rho}", sphere=usual | {"rho": rho}, score=score)
    suite = content.SuiteContent("elsewhere", load_results(tmp_path))
    assert [row[0] for row in suite.ablation()] == ["none", "arm 0.01", "arm 0.1"]
    assert {rho: point["crl"].value for rho, point in suite.rho_points().items()} == {0.1: 0.5, 0.01: 0.25}


def test_command_makes_the_recorded_configuration() -> None:
    changes = {
        "label": "sphere, scale-free", "method": ["sphere", "layernorm"], "sphere.scale": "free", "gamma": 1.0,
        "network.width": 17, "learning_rate_bounds": [1e-4, 1e-3], "normalize_observations": True, "seed": 3,
        "tasks": ["Pendulum-v1", "Pendulum-v1"], "torch_threads": 1,
    }  # fmt: skip
    config = override(preset(make_suite("gym")), changes)
    saved = json.loads(json.dumps(to_dict(config)))
    words = shlex.split(reproduction.train(saved))
    assert words[:2] == ["sphere", "train"]
    assert parse_train(words[2:])[0] == config == from_dict(saved)
    assert "--redo.threshold" not in words
    usual = json.loads(json.dumps(to_dict(preset(make_suite("cw10")))))
    assert reproduction.train(usual) == (
        "sphere train --suite cw10 --protocol crl --actor topk_moe --method none --seed 0 --steps-per-task 1000000"
    )


TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=6).filter(
    lambda text: text != "--"
) | st.sampled_from(["1", "true", "-x"])
ARGUMENTS = st.dictionaries(
    st.from_regex(r"-?[a-z][a-z_.]{0,5}", fullmatch=True).filter(lambda name: name not in ("task", "seed")),
    st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS, max_size=3,
)  # fmt: skip
CHANGES: Any = st.fixed_dictionaries({}, optional={
    "env_args": ARGUMENTS, "label": TEXTS, "seed": st.integers(0, 2**62), "gamma": st.floats(0, 1),
    "learning_rate_bounds": st.sampled_from([[1e-7, 1e-3], [1.0, 2.0]]), "torch_threads": st.sampled_from(["auto", 3]),
    "films": st.booleans(), "spectrum_every": st.integers(-5, 5), "tasks": st.sampled_from([["A-v0"], ["x:B-v1"] * 2]),
    "network": st.fixed_dictionaries({"crelu": st.booleans()}), "method": st.sampled_from([["sphere"], ["c_chain"]]),
    "max_episode_steps": st.integers(0, 9),
})  # fmt: skip


@settings(max_examples=60, deadline=None)
@example({"env_args": {"-a.b_c": '"😀\x7f"', "d": "1", "e": True, "f": -1e-9}, "label": "-x y"}, {})
@given(CHANGES, st.sampled_from([{}, {"method": ["sphere"], "sphere": {"strength": 0.5}}, {"sphere.rho": 1e-9}]))
def test_commands_and_configurations_say_the_same(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Whatever was recorded, its command makes it again, but for options of methods that are not in use."""
    config = override(preset(make_suite("gym")), changes | options)
    words = shlex.split(reproduction.train(json.loads(json.dumps(to_dict(config)))))
    found = to_dict(parse_train(words[2:])[0])
    used = {name: value for name, value in to_dict(config).items() if name not in {*methods()} - {*config.method}}
    assert {name: found[name] for name in used} == used


def test_missing_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path / "a")
    monkeypatch.setattr(content, "find_spec", lambda name: None)
    suite = content.SuiteContent("elsewhere", load_results(tmp_path))
    (panel,) = (panel for panel in suite.panels if panel.figure == "features")
    assert "pip install 'sphere-rl[sklearn]'" in panel.missing


def test_figures_that_have_lost_their_data_are_taken_away(tmp_path: Path) -> None:
    record(tmp_path / "r" / "a")
    (tmp_path / "p" / "figures").mkdir(parents=True)
    for kind in ("png", "svg", "pdf"):
        (tmp_path / "p" / "figures" / f"elsewhere-rho.{kind}").write_text("of an earlier page")
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    drawn = {path.stem for path in (tmp_path / "p" / "figures").iterdir()}
    assert drawn == {f"elsewhere-{name}" for name in ("rank", "success", "learning", "proxy", "profile")}
    assert "elsewhere-rho" not in html


def test_one_task_has_no_retention(tmp_path: Path) -> None:
    """Runs of earlier versions evaluated a single task twice, with the same episodes."""
    record(tmp_path / "a", tasks=1)
    final = json.loads((tmp_path / "a" / "eval.jsonl").read_text())
    with (tmp_path / "a" / "eval.jsonl").open("a") as file:
        file.write(json.dumps(final | {"phase": "retention"}) + "\n")
    (row,) = content.SuiteContent("elsewhere", load_results(tmp_path)).rows
    assert (row["crl"].value, row["retention"], row["forgetting"]) == (0.5, None, None)
