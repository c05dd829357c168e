"""Whatever is typed, written into files or found in run folders: it works, or one line says what is wrong with it.

``SPHERE_CASES=10000`` makes each search that long; the default is short. Commands are called in this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_runs import WORDS, config, train

from sphere_rl.cli import COMMANDS, main
from sphere_rl.config import TrainConfig
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.methods import methods
from sphere_rl.runs import RunFolder, checkpoint

CASES = int(os.environ.get("SPHERE_CASES", "40"))
SEARCH = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=CASES == 40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)  # fmt: skip

WORDS_OF_ALL_KINDS = st.sampled_from(
    [*"0 1 2 3 -1 7 1e3 1e400 -0.0 nan inf -inf 0.5 1e-400 0x10 ١ true None [] {} [1,2] cpu cuda meta gym cw10 none "
    "sphere dense topk_moe rl crl linear kl auto rollback a=b a=1 =1 --x -x toy_envs:Given-v0 toy_envs:Drawing-v0 os: "
    ":Pendulum-v1 no.such:x Pendulum-v1 ../x /".split(),
     "", " ", "\0", "\n", "é", "\ud800", "a" * 300, "9" * 30, "9" * 5000, "1 2", "'", "<script>", "$(id)", "%s"]
)  # fmt: skip
SETTINGS = [f.name for f in fields(TrainConfig) if f.name not in ("network", "options", "env_args")]
SETTINGS += [f.name for f in fields(NetworkOptions)] + ["env_args"]
SETTINGS += [f"{name}.{f.name}" for name, method in methods().items() for f in fields(method.Config)]


def run(*words: str) -> tuple[int, str, str]:
    """Exit code and what a command printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Gymnasium, about names
        try:
            code = main(list(words))
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
        finally:
            torch.set_flush_denormal(False)  # what a run sets for its process, and hypothesis does not like
    return code, out.getvalue(), err.getvalue()


def refused(code: int, err: str) -> None:
    """Exit code 2, and one line, beside those that say of options that they do nothing."""
    err = "".join(line for line in err.splitlines(keepends=True) if ": no effect without method " not in line)
    assert code == 2, (code, err)
    assert err.startswith("sphere: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) < 4000, len(err)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# Words


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """A folder that no run may be written into: what is allowed is refused for that, and nothing is trained."""
    (tmp_path / "thesis.tex").write_text("x")
    return tmp_path


@SEARCH
@given(data=st.data())
def test_flags(data: st.DataObject, occupied: Path) -> None:
    words = [*WORDS, "--tasks", "toy_envs:Drawing-v0", "--out", str(occupied), "--quiet"]
    names = data.draw(st.lists(st.sampled_from(SETTINGS), min_size=1, max_size=3))
    for name in names:
        value = data.draw(st.lists(WORDS_OF_ALL_KINDS, min_size=0, max_size=2))
        words += [f"--{name.replace('_', '-')}", *value]
    code, _, err = run("train", *words)
    refused(code, err)
    assert any(word in err for word in ("is not allowed", "expected", "--", "unrecognized", str(occupied))), err
    assert contents(occupied) == {"thesis.tex": b"x"}


@SEARCH
@given(
    command=st.sampled_from(sorted(set(COMMANDS) - {"demo"})),
    words=st.lists(WORDS_OF_ALL_KINDS | st.sampled_from(["--json", "--checkpoint", "--tasks", "--steps", "--seed"])),
)
def test_words(command: str, words: list[str], occupied: Path) -> None:
    if command in ("train", "sweep"):
        words = [*words, "--out", str(occupied), "--dry-run" if command == "sweep" else "--quiet", "--suite"]
    before = contents(occupied)
    code, out, err = run(command, *words)
    if code:
        refused(code, err)
    else:
        assert out or err
    assert contents(occupied) == before


def nested(extra: st.SearchStrategy[Any], letters: int, items: int, leaves: int) -> st.SearchStrategy[Any]:
    """Plain values, some of ``extra`` among them, and lists and dictionaries of them."""
    text = st.text(max_size=letters)
    plain = st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | text | extra
    return st.recursive(
        plain,
        lambda inner: st.lists(inner, max_size=items) | st.dictionaries(text, inner, max_size=2),
        max_leaves=leaves,
    )


VALUES = nested(st.sampled_from(SETTINGS), letters=5, items=3, leaves=4)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "''" if value is None else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


@SEARCH
@given(
    table=st.dictionaries(
        st.sampled_from([*SETTINGS, "network", "sphere", "env_args", "seeds", "arms", "stages", "grid", "train", "x"]),
        VALUES, max_size=3,
    ),
    sweep=st.booleans(), tail=st.sampled_from(["", "\n[", "\n\0", "\na = 1\na = 1", "\n\xff"]),
)  # fmt: skip
def test_toml(table: dict[str, Any], sweep: bool, tail: str, occupied: Path) -> None:
    path = occupied / "own.toml"
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in table.items())
    path.write_bytes(text.encode("utf-8", "surrogatepass") + tail.encode("latin-1"))
    words = ["--config", str(path), "--out", str(occupied / "thesis.tex" if sweep else occupied)]
    own = ["--suite", "gym", "--tasks", "toy_envs:Drawing-v0"]
    code, _, err = run(*(["sweep", *words, *own] if sweep else ["train", *WORDS, *own[2:], *words, "--quiet"]))
    refused(code, err)
    assert sorted(contents(occupied)) == ["own.toml", "thesis.tex"]
    path.unlink()


# Run folders


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has two checkpoints of itself, the policy of one task, and is in the middle of the next."""
    tasks = ["toy_envs:Drawing-v0"] * 2
    place = tmp_path_factory.mktemp("runs")
    folder = train(config("Drawing", tasks=tasks, steps_per_task=96, eval_every=32, spectrum_every=32), place / "run")
    folder.set_status("interrupted", 160, tasks[1])
    return folder.path


READERS = st.sampled_from(
    [["evaluate", "--episodes", "1"], ["evaluate", "--checkpoint", "latest", "--episodes", "1"], ["resume", "--quiet"],
     ["diagnose", "--checkpoint", "latest"], ["diagnose"]]
)  # fmt: skip
JSON = nested(st.just(10**400), letters=4, items=2, leaves=3)


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Cut, overwritten, with a piece put in, or with one value of its JSON replaced."""
    lines = content.split(b"\n")
    at = data.draw(st.integers(0, len(content)))
    piece = data.draw(st.binary(max_size=4))
    kind = data.draw(st.sampled_from(["cut", "over", "insert", "value", "value", "value", "drop"]))
    if kind in ("value", "drop"):
        whole = content.count(b"\n") > 0 and content.startswith(b"{\n")
        index = 0 if whole else data.draw(st.integers(0, max(0, len(lines) - 2)))
        with contextlib.suppress(ValueError):
            table = json.loads(content if whole else lines[index])
            target = table
            while True:
                key = data.draw(st.sampled_from(sorted(target)))
                if not (isinstance(target[key], dict) and target[key] and data.draw(st.booleans())):
                    break
                target = target[key]
            if kind == "drop":
                del target[key]
            else:
                target[key] = data.draw(JSON)
            text = json.dumps(table).encode("utf-8", "surrogatepass")
            return text + b"\n" if whole else b"\n".join([*lines[:index], text, *lines[index + 1 :]])
    return {"cut": content[:at], "over": content[:at] + piece + content[at + len(piece) :]}.get(
        kind, content[:at] + piece + content[at:]
    )


def read_all_the_same(words: list[str], path: Path, changed: Path, before: dict[str, bytes | None]) -> None:
    """A reader either works, or says in one line that names the file or its field what is wrong; nothing is lost."""
    code, _, err = run(words[0], str(path), *words[1:], *(["--out", str(path / "a.svg")] * (words[0] == "diagnose")))
    if code == 0:
        return
    lines = err.splitlines()
    assert "Traceback" not in err, err
    assert code in (2, 3), (code, err)
    assert len([line for line in lines if not line.startswith("sphere: ") or "the run goes on from" in line]) < len(
        lines
    )
    assert all(line.startswith("sphere: ") for line in lines), err
    if code == 2:
        assert contents(path) == before, err
        assert path.name in err or changed.name in err, err


@SEARCH
@given(data=st.data(), words=READERS)
def test_files_of_a_run(data: st.DataObject, words: list[str], trained: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(shutil.copytree(trained, Path(place) / "run"))
        names = ["config.json", "status.json", "train.jsonl", "eval.jsonl", "spectrum.jsonl"]
        file = path / data.draw(st.sampled_from(names))
        file.write_bytes(damaged(data, file.read_bytes()))
        (path / ".lock").touch()
        read_all_the_same(words, path, file, contents(path))


def leaf(data: st.DataObject, state: Any) -> None:
    """Replace one value somewhere in a checkpoint's state."""
    while True:
        key = data.draw(st.sampled_from(sorted(state, key=str) if isinstance(state, dict) else range(len(state))))
        inner = state[key]
        if not (isinstance(inner, dict | list) and inner and data.draw(st.integers(0, 4))):
            break
        state = inner
    tensors = [torch.zeros(2), torch.full((3, 3), float("nan")), torch.zeros(0), torch.ones(1, dtype=torch.int64)]
    if isinstance(inner, torch.Tensor) and data.draw(st.booleans()):
        state[key] = torch.full_like(inner, float("nan")) if inner.is_floating_point() else inner * 0 - 1
    else:
        state[key] = data.draw(st.sampled_from([*tensors, None, -1, 10**20, "x", [], {}, float("nan"), True]))


@SEARCH
@given(data=st.data(), words=READERS)
def test_checkpoints_with_a_checksum_that_fits(data: st.DataObject, words: list[str], trained: Path) -> None:
    """Not damaged by a disk, which the checksum finds, but made by another program, or by someone with intentions."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(shutil.copytree(trained, Path(place) / "run"))
        file = data.draw(st.sampled_from(sorted(RunFolder(path).checkpoints.iterdir())))
        state = checkpoint.load(file)
        leaf(data, state)
        checkpoint.save(file, state)
        (path / ".lock").touch()
        read_all_the_same(words, path, file, contents(path))


# Named cases


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_policy_that_is_no_use_is_refused_by_every_reader(value: float, trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(trained, tmp_path / "runs" / "run"))
    for file in RunFolder(path).checkpoints.iterdir():
        state = checkpoint.load(file)
        if state["agent"] is not None:
            next(iter(state["agent"]["actor"].values())).view(-1)[0] = value
            checkpoint.save(file, state)
    before = contents(path)
    for words in (["evaluate"], ["diagnose"], ["play", "--out", str(tmp_path / "a.gif")], ["resume", "--quiet"]):
        code, _, err = run(words[0], str(path), *words[1:])
        refused(code, err)
        assert f"{path}/checkpoints/" in err
        assert f" is {value}" in err
    before.setdefault(".lock", b"")
    assert contents(path) == before
    code, _, err = run("report", str(tmp_path / "runs"), "--out", str(tmp_path / "page"))
    assert code == 3
    assert f" is {value}" in err
    assert "Traceback" not in err
    assert "holds a policy that is no use" in (tmp_path / "page" / "index.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--width", "9" * 30], "width: 99999999… is not allowed; expected a whole number below 2**63"),
        (["--width", "1e9"], "width: 1000000000 is not allowed; expected networks that fit the memory of this machine"),
        (["--depth", "1e6"], "depth: 1000000 is not allowed; expected 1 to 1000"),
        (["--num-envs", "1e9", "--steps-per-task", "1e12"], "expected rollouts that fit the memory of this machine"),
        (["--env-timeout", "1e300"], "env_timeout: 1e+300 is not allowed; expected 0 to 1e+06 seconds"),
    ],
)
def test_sizes_that_no_machine_has_are_refused(words: list[str], message: str, occupied: Path) -> None:
    code, _, err = run("train", *WORDS, "--tasks", "toy_envs:Drawing-v0", "--out", str(occupied), *words)
    refused(code, err)
    if "…" in message:
        message = message.partition("… ")[2]
    assert message in err


@pytest.mark.parametrize("digits", [401, 5001])
@pytest.mark.parametrize("line", ["gamma = {}", "[sphere]\nrho = {}", "[redo]\nevery = {}", "seed = {}"])
def test_numbers_of_hundreds_of_digits_are_refused(line: str, digits: int, occupied: Path) -> None:
    """The second is more than Python reads."""
    table = occupied.parent / "huge.toml"
    table.write_text(line.format("1" + "0" * digits))
    for command in ("train", "sweep"):
        code, _, err = run(command, "--config", str(table), "--tasks", "toy_envs:Drawing-v0", "--out", str(occupied))
        refused(code, err)


def test_a_suite_in_a_file_is_a_word(occupied: Path) -> None:
    table = occupied.parent / "suite.toml"
    table.write_text('suite = ["gym"]')
    code, _, err = run("train", "--config", str(table), "--out", str(occupied))
    refused(code, err)
    assert err.startswith("sphere: suite: ['gym'] is not allowed"), err


def test_a_configuration_with_a_huge_number_is_said_of_its_file(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, path := tmp_path / "run")
    text = json.loads((path / "config.json").read_text())
    text["config"]["sphere"]["rho"] = 10**400
    (path / "config.json").write_text(json.dumps(text))
    for command in ("resume", "evaluate"):
        code, _, err = run(command, str(path))
        refused(code, err)
        assert "config.json" in err


def test_a_pipe_in_place_of_a_log_is_refused(trained: Path, tmp_path: Path) -> None:
    """It would be waited for without an end, and a device be read without one."""
    path = Path(shutil.copytree(trained, tmp_path / "run"))
    for make in (os.mkfifo, lambda file: Path(file).symlink_to("/dev/zero")):
        (path / "train.jsonl").unlink()
        make(path / "train.jsonl")
        code, _, err = run("resume", str(path), "--quiet")
        refused(code, err)
        assert f"{path}/train.jsonl: is not a file" in err
