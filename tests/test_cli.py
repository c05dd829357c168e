from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sphere_rl.cli import main
from sphere_rl.commands import catalogue
from sphere_rl.experts.network import KINDS
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder
from sphere_rl.spectrum import SPECTRAL_METRICS

PUBLISHED = Path(__file__).parents[1] / "docs" / "results" / "silent"
TINY = """train --suite gym --tasks Pendulum-v1 --num-envs 2 --num-steps 64 --minibatch-size 32 --num-epochs 1
    --width 16 --depth 1 --num-experts 3 --steps-per-task 256 --eval-every 128 --eval-episodes 1
    --final-eval-episodes 1""".split()


def test_help_answers_without_loading_the_heavy_libraries() -> None:
    code = """import sys; from sphere_rl.cli import main; main(["--help"])
for name in ("torch", "numpy", "gymnasium", "mujoco", "envpool", "matplotlib"):
    assert name not in sys.modules, name"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: sphere COMMAND ...")
    for command in ("train", "resume", "evaluate", "list"):
        assert f"\n  {command} " in result.stdout


def test_train_evaluate_and_resume_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert main([*TINY, "--out", run]) == 0
    out, err = capfd.readouterr()
    assert "Pendulum-v1 (1/1) · 256/256" in err  # plain lines: this is no terminal
    assert "final evaluation, 1 episodes" in err
    assert "at the end of each task" in out
    assert list((tmp_path / "run" / "tb").glob("events*"))

    assert main(["evaluate", run, "--episodes", "2", "--json"]) == 0
    row = json.loads(capfd.readouterr().out)
    assert (row["task"], row["episodes"], row["mean_length"]) == ("Pendulum-v1", 2, 200.0)

    assert main(["resume", run]) == 0
    assert "finished already" in capfd.readouterr().err
    assert main([*TINY, "--out", run]) == 2
    assert capfd.readouterr().err == f"sphere: {run}: holds a run already; continue it with: sphere resume {run}\n"


def test_quiet_prints_no_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fly", "command: 'fly' is not allowed; expected one of demo, train, resume,"),
        ("train --suite gym", "tasks: '' is not allowed; expected at least one task: gym has no sequence of its own"),
        ("train --gamma 2", "gamma: 2.0 is not allowed; expected 0 to 1"),
        ("resume nowhere", "nowhere: not a run folder; expected one with a config.json"),
        ("resume", "the following arguments are required: run"),
        ("evaluate nowhere --episodes 0", "argument --episodes: '0' is not allowed; expected a whole number above 0"),
        ("evaluate nowhere --seed=-1", "--seed: '-1' is not allowed; expected a whole number from 0 to 2147483647"),
        ("play nowhere --out a.gif --seed 1e30", "--seed: '1e30' is not allowed; expected a whole number from 0 to 2"),
        ("list --actor", "unrecognized arguments: --actor"),
        (
            "train --suite gym --tasks Pendulum-v1 CartPole-v1",
            "tasks: 'CartPole-v1' is not allowed; expected a task with 3 observations and 1 actions as Pendulum-v1 has "
            "in protocol crl, not 4 observations and 2 discrete actions",
        ),
        (
            "train --suite h1 --tasks walk sit_hard",
            "tasks: 'sit_hard' is not allowed; expected a task with 51 observ",
        ),
        ("train --suite gym --tasks Nope-v0", "tasks: 'Nope-v0' is not allowed; expected a registered Gymnasium id"),
        ("train --method load_balance --actor dense", "expected an actor or critic with a gate; dense has none"),
        ("train --method injection reset_all", "expected injection without reset_all"),
        ("train --method crelu --width 15", "width: 15 is not allowed; expected an even number with crelu"),
        ("train --tasks push --out /proc/run", "/proc/run: cannot be written"),
        (f"report {PUBLISHED} --out /proc/page", "/proc/page: cannot be written"),
        (f"report {PUBLISHED} --tables csv --out /proc/page", "/proc/page/tables: cannot be written"),
        ("sweep --suite cw10 --grid foo.bar 1 --out /proc/s", "arguments: --foo.bar 1 (sphere train --help lists the"),
    ],
)
def test_bad_words_exit_with_2_and_one_line_and_write_nothing(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_list_names_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line for line in lines if line and line[0] != " "] == [
        "suites",
        "tasks",
        "actors",
        "methods",
        "metrics",
        "presets",
    ]
    for word in ("cw10", "peg-unplug-side", "stand", "topk_moe", "shared_moe", "sphere", "Luo et al.", "r_e_K"):
        assert any(word in line for line in lines)
    for words in ("list --actors", "list actors"):
        assert main(words.split()) == 0
        text = capsys.readouterr().out
        assert "dense_moe" in text
        assert "cw10" not in text
    assert main(["list", "method"]) == 2
    message = (
        "sphere: topic: 'method' is not allowed; expected one of suites, tasks, actors, methods, metrics, presets\n"
    )
    assert capsys.readouterr().err == message


def test_list_as_json_without_pytorch_says_what_the_classes_say() -> None:
    code = """import sys; from sphere_rl.cli import main; main(["list", "--json"])
assert not {"torch", "envpool", "mujoco"} & set(sys.modules)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, list[dict[str, object]]] = {}
    for line in result.stdout.splitlines():
        row = json.loads(line)
        found.setdefault(row.pop("topic"), []).append(row)
    assert found["methods"] == catalogue.loaded_methods()
    assert {row["method"] for row in found["methods"]} == set(methods())
    assert {row["actor"]: row["what it is"] for row in found["actors"]} == {
        name: kind.summary for name, kind in KINDS.items()
    }
    assert {row["metric"]: row["what it is"] for row in found["metrics"]} == SPECTRAL_METRICS
    h1 = next(row for row in found["suites"] if row["suite"] == "h1")
    assert "sphere.mode grad, sphere.rho 0.001" in str(h1["preset"])


def test_a_method_that_is_not_written_plainly_is_loaded(tmp_path: Path) -> None:
    plain = "class A(Method):\n    summary = 'a'\n    citation = 'b'\n"
    texts = {
        "plain": plain,
        "computed": plain.replace("'a'", "'a'.upper()"),
        "inherited": plain + "    Config = Other\n",
    }
    found = {}
    for name, text in texts.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        found[name] = catalogue.written_method(path)
    row = {"method": "plain", "what it does": "a", "defaults": "", "source": "b"}
    assert found == {"plain": row, "computed": None, "inherited": None}


@pytest.mark.parametrize("command", ["evaluate", "play"])
def test_help_says_of_every_option_what_it_is_and_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out.partition("options:")[2]
    options = [" ".join(part.split()) for part in text.split("\n  -") if part.strip()]
    assert len(options) >= 7
    for option in options:
        required = option.startswith(("-out", "h, --help"))
        assert required or "(" in option or "default" in option, option


def closed_pipe() -> Any:
    """A stream whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("make", [closed_pipe, partial(open, "/dev/full", "w", buffering=1)], ids=["pipe", "full"])
def test_a_run_outlives_who_reads_it(name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    with make() as stream:
        monkeypatch.setattr(sys, name, stream)
        assert main([*TINY, "--out", str(run)]) == 0
        assert main(["resume", str(run)]) == 0
        assert main(["fly"]) == 2
        assert getattr(sys, name) is stream
    assert RunFolder(run).status()["state"] == "finished"


def test_a_command_whose_output_finds_no_room_ends_as_its_work(tmp_path: Path) -> None:
    """Also where Python itself would say at its end that it cannot hand over what is buffered."""
    code = "import sys; from sphere_rl.cli import main; sys.exit(main())"
    with open("/dev/full", "w") as full:
        done = [
            subprocess.run([sys.executable, "-c", code, *words], stdout=full, stderr=full, check=False).returncode
            for words in (["--help"], ["fly"])
        ]
    assert done == [0, 2]


@pytest.mark.parametrize("words", [["list", "--methods"], ["list", "--presets"], ["train", "--help"]])
def test_a_locale_without_greek_is_no_fault(words: list[str]) -> None:
    """Files of the package are UTF-8 wherever they are read, and what cannot be printed is escaped."""
    code = "import sys; from sphere_rl.cli import main; sys.exit(main())"
    found = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, b"")
