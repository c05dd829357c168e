"""What the documentation tells readers to type works: Python blocks run, ``sphere`` commands pass the real parser.

A page's Python blocks run in their order, in one namespace that begins with what a reader has (`given`), beside a
finished run ``runs/x`` (``runs/first``) and a sweep ``runs/s``. Commands find the files that pages show: blocks that
follow a file's name, and TOML that begins with it. ``<!-- not run: REASON -->`` leaves a block at being compiled.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from argparse import SUPPRESS
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY
from synthetic_runs import write_run

import sphere_rl as sp
from sphere_rl import cli, plugins, protocol, sweep
from sphere_rl.config import TrainConfig, override
from sphere_rl.errors import CommandLineError, ConfigError
from sphere_rl.runs import LOGS, RunFolder
from sphere_rl.terminal import options
from sphere_rl.terminal.parsers import ArgumentParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?(?:`(?P<file>[\w.]+)`:\n\n)?"
    r"```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
INLINE = re.compile(r"(?<!`)`(sphere [^`]+)`(?!`)")


class Block(NamedTuple):
    """A fenced block: its language, its text, the file that it is, and why it is not run."""

    page: str
    line: int
    language: str
    text: str
    file: str | None
    why: str | None


def blocks(page: Path) -> list[Block]:
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(name, text[: m.start("text")].count("\n"), m["language"], m["text"], m["file"], m["why"])
        for m in FENCE.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]
SLOW = {"docs/api-training.md"}
PYTHON = [block for block in ALL if block.language == "python" and '--8<-- "' not in block.text]
FILES = {block.file: block.text for block in ALL if block.file} | {
    found[1]: block.text for block in ALL if (found := re.match(r"# ([\w-]+\.toml)\n", block.text))
}


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each ``sphere`` command of a shell's lines, without dots that stand for more."""
    for line in text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word not in ("...", "…")]
        words = words[1:] if words[:1] == ["exec"] else words
        words = words[: words.index(">")] if ">" in words else words
        if words[:1] == ["sphere"] and len(words) > 1:
            yield [word.replace("$SLURM_ARRAY_TASK_ID", "0") for word in words[1:]]


FENCED = [
    (f"{block.page}:{block.line}", words)
    for block in ALL
    if block.language in ("bash", "text", "")
    for words in commands_of(block.text)
]
IN_TEXT = [
    (page.name, shlex.split(text.replace("\n", " "))[1:]) for page in PAGES for text in INLINE.findall(page.read_text())
]


# ---- Python


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run under the names that the pages use, and a sweep's folder."""
    root = tmp_path_factory.mktemp("docs")
    with RunFolder(root / "runs" / "x") as folder:
        protocol.start(override(TrainConfig(), TINY | {"eval_every": 512}), folder, lambda step: [])
    checkpoints = root / "runs" / "x" / "checkpoints"
    shutil.copy(checkpoints / "task-00-Pendulum-v1.pt", checkpoints / "task-03-push-back.pt")
    shutil.copytree(root / "runs" / "x", root / "runs" / "first")
    for method in ("none", "sphere"):
        write_run(root / "runs" / "s" / method, ["hammer", "push"], suite="cw10", protocol="crl", method=[method])
    return root


def given() -> dict[str, Any]:
    """What a reader has: arrays, a loss, a policy and its observations."""
    torch.manual_seed(0)
    features, gates = torch.randn(32, 4, 16, requires_grad=True), torch.rand(32, 4, requires_grad=True)
    loss = features.square().mean() + gates.sum()
    return {
        "sp": sp, "torch": torch, "np": np,
        "features": features, "gates": gates, "loss": loss, "actor_loss": loss, "rho": 0.1,
        "policy": sp.load_policy("runs/x"), "D": 3, "observations": torch.randn(16, 3),
        "raw_observations": torch.randn(16, 3), "observation": np.zeros(3),
        "phi": torch.randn(32, 64), "eigenvalues": np.arange(1.0, 5),
        "module": torch.nn.Linear(3, 2), "many": torch.randn(64, 3),
        "apply": lambda params, states: np.asarray(states) @ params, "params": np.ones((3, 2), np.float32),
    }  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page in sorted({block.page for block in PYTHON})
    ],
)
def test_the_python_of_a_page_runs(page: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    names = given()
    for block in (block for block in PYTHON if block.page == page):
        # The line numbers of an error are those of the page.
        code = compile("\n" * block.line + block.text, block.page, "exec")
        libraries = re.findall(r"^(?:from|import) (\w+)", block.text, re.MULTILINE)
        if block.why is None and all(map(find_spec, libraries)):
            exec(code, names)


# ---- commands


class Parsed(Exception):
    """The words have passed the parser; nothing is done with them."""


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands stop behind their parser, in a folder with the files that the pages show."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_modules", {})
    monkeypatch.setattr(sweep, "dry_run", lambda runs, jobs: 0)
    parse = ArgumentParser.parse_args

    def parse_and_stop(self: ArgumentParser, *words: Any) -> Any:
        found = parse(self, *words)
        if self.prog in ("sphere train", "sphere sweep"):  # their values are looked at, too
            return found
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    yield
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def parse(words: list[str]) -> None:
    """As far as a command can go without doing anything."""
    from sphere_rl.terminal.arguments import parse_train

    if words[0] not in cli.COMMANDS:
        raise CommandLineError(f"{words[0]}: no command")
    if words[0] == "train":
        parse_train(words[1:])
    elif words[0] == "sweep":
        sweep.command([*words[1:], *(() if "--dry-run" in words else ("--dry-run",))])
    else:
        with pytest.raises(Parsed):
            cli.COMMANDS[words[0]](words[1:])


@pytest.mark.parametrize(("place", "words"), FENCED, ids=[f"{place} {words[0]}" for place, words in FENCED])
@pytest.mark.usefixtures("dry")
def test_a_command_in_a_block_is_one(place: str, words: list[str]) -> None:
    try:
        parse(words)
    except (CommandLineError, ConfigError) as error:
        pytest.fail(f"{place}: sphere {shlex.join(words)}\n{error}")


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of each command."""
    found: dict[str, set[str]] = {}

    class Caught(Exception):
        pass

    def catch(self: ArgumentParser, *_: Any) -> Any:
        found[self.prog.removeprefix("sphere ")] = {*self._option_string_actions}
        raise Caught

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_known_args"):
            patch.setattr(ArgumentParser, name, catch)
        for name, command in cli.COMMANDS.items():
            parse = options.train_parser(TrainConfig(), False).parse_args if name == "train" else command
            with pytest.raises(Caught):
                parse([])
    found["sweep"] |= found["train"]
    return found


def test_commands_in_text_have_flags_that_exist(flags: dict[str, set[str]]) -> None:
    """They may be parts of commands, so that their values are not looked at."""
    assert {*flags} == {*cli.COMMANDS}
    wrong = [
        f"{page}: sphere {shlex.join(words)}"
        for page, words in IN_TEXT
        if words[0] in cli.COMMANDS and {word for word in words if word[:2] == "--" and word[2:]} - flags[words[0]]
    ]
    assert wrong == []


def test_the_table_of_flags_has_the_groups_of_the_help() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    table = {
        title: flags.split() for title, flags in re.findall(r"^\| ([\w ]+) \| `(--[^`]+)` \|$", text, re.MULTILINE)
    }
    groups = {
        group.title: [action.option_strings[0] for action in group._group_actions if action.help != SUPPRESS]
        for group in options.train_parser(TrainConfig(), False)._action_groups
    }
    assert table == {title: words for title, words in groups.items() if title in ("run", *options.GROUPS)}


@pytest.mark.parametrize("log", LOGS)
def test_the_page_on_run_folders_has_every_column_of_a_run(log: str, runs: Path) -> None:
    text = (ROOT / "docs" / "runs.md").read_text()
    known = set(re.findall(r"`(\w+)`", text[: text.index("## Watching a run")]))
    columns = {column for row in RunFolder(runs / "runs" / "x").read(log) for column in row}
    assert columns - known == set()


def test_the_documented_method_says_its_year_as_the_conformance_tests_want() -> None:
    assert re.search(r'citation = ".*\b(19|20)\d\d\b', FILES["feature_norm.py"])


def test_the_patterns_find_what_there_is() -> None:
    """So that a page which is written otherwise does not pass unseen."""
    for page in PAGES:
        text = page.read_text()
        assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page)), page.name
        assert text.count("<!-- not run") == sum(block.why is not None for block in blocks(page)), page.name
    assert len(FENCED) > 50
    assert len(IN_TEXT) > 50
    assert {"feature_norm.py", "pendula.py", "sigmoid_moe.py", "small.toml", "grid.toml", "arms.toml"} <= {*FILES}


def test_what_a_page_includes_of_another_file_has_no_links_of_its_own() -> None:
    """They would start from the other file's folder; mkdocs --strict refuses them."""
    text = (ROOT / "README.md").read_text()
    parts = re.findall(r"--8<-- \[start:(\w+)\] -->\n(.*?)<!-- --8<-- \[end:\1\]", text, re.DOTALL)
    assert parts
    assert [name for name, part in parts if re.search(r"\]\((?!https?:)", part)] == []
