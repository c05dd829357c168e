"""Kinds of a method's options: those that there are work in files and as flags, all others are refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sphere_rl import plugins
from sphere_rl.cli import main
from sphere_rl.config import TrainConfig, from_dict, override, to_dict
from sphere_rl.errors import ConfigError
from sphere_rl.terminal.arguments import option_words, parse_train
from sphere_rl.terminal.options import train_parser

METHOD = """
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

from sphere_rl.methods import Method, MethodConfig

@dataclass(frozen=True)
class Nested:
    rate: float = 1.0

@dataclass(frozen=True)
class Options(MethodConfig):
    value: {field}
    \"\"\"What is tried, 100 %.\"\"\"

class Kinds(Method):
    summary, citation, Config = "tries kinds of options", "Nobody 2026", Options
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the plugin ``kinds``, whose method has this one field."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_modules", {})
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    train_parser.cache_clear()  # equal configurations of other classes are one to it
    yield lambda field: (tmp_path / "kinds.py").write_text(METHOD.format(field=field))
    train_parser.cache_clear()
    sys.modules.pop("kinds", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bool = False", True),
        ("int = 1", 2),
        ("float = 1.0", 2.5),
        ("str = 'a'", "b"),
        ("Literal['a', 'b'] = 'a'", "b"),
        ("float | None = None", 2.5),
        ("float | None = 1.0", None),
        ("None | float = None", 2.5),
        ("None | float = 1.0", None),
        ("Optional[int] = 1", None),
        ("str | None = None", "b"),
        ("Literal['a', 'b'] | None = None", "b"),
        ("Literal['a', 'b'] | None = 'a'", None),
        ("int | Literal['auto'] = 3", "auto"),
        ("int | Literal['auto'] | None = 3", None),
        ("tuple[float, ...] = ()", (1.0, 2.5)),
        ("tuple[int, int] = (1, 2)", (3, 4)),
        ("tuple[str, ...] = field(default=())", ("a", "b")),
        ("tuple[Literal['a', 'b'], ...] = ()", ("b", "a")),
    ],
)
def test_kinds_that_there_are_are_read_from_files_flags_and_runs(field: str, value: Any, plugin) -> None:
    plugin(field)
    config = override(TrainConfig(), {"plugin": ["kinds"], "method": ["kinds"], "kinds.value": value})
    assert config.options.kinds.value == value
    words = ["--plugin", "kinds", "--method", "kinds", *option_words("kinds.value", value)]
    assert parse_train(words)[0] == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(SystemExit):  # after its help
        parse_train([*words, "--help"])


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("list[float] = field(default_factory=list)", "list[float]"),
        ("int | float | None = None", "int | float | None"),
        ("Any = None", "Any"),
        ("bool | None = None", "bool | None"),
        ("tuple[float, ...] | None = None", "tuple[float, ...] | None"),
        ("tuple[bool, ...] = ()", "tuple[bool, ...]"),
        ("tuple[int, str] = (1, 'a')", "tuple[int, str]"),
        ("tuple[()] = ()", "tuple[()]"),
        ("tuple = ()", "tuple"),
        ("Literal[1, 2] = 1", "Literal[1, 2]"),
        ("dict[str, int] = field(default_factory=dict)", "dict[str, int]"),
        ("Path = Path('.')", "pathlib.Path"),
        ("Nested = Nested()", "kinds.Nested"),
        ("float", None),
    ],
)  # fmt: skip
def test_other_kinds_are_refused_in_one_line(field: str, shown: str | None, plugin, capsys: Any) -> None:
    plugin(field)
    assert main(["list", "methods", "--plugin", "kinds"]) == 2
    error = capsys.readouterr().err
    expected = "'no default' is not allowed; expected a field with a default" if shown is None else shown
    assert error.startswith("sphere: kinds.value: ")
    assert expected in error
    assert shown is None or "expected one of the kinds bool, int, float, str, Literal of texts, tuples" in error
    assert error.count("\n") == 1


def test_kinds_that_cannot_be_looked_up_are_one_line(plugin) -> None:
    plugin("Missing = None")
    Path("kinds.py").write_text("from __future__ import annotations\n" + Path("kinds.py").read_text())
    with pytest.raises(ConfigError, match=r"kinds: 'Options' is not allowed; expected kinds that can be .*Missing"):
        parse_train(["--plugin", "kinds"])
