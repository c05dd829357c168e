"""The words of ``sphere train``, turned into a configuration: suite preset, TOML file, flags, in this order."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphere_rl.config import TrainConfig, load_toml, names_of, overridden, preset, read_toml, use_plugins
from sphere_rl.conversion import convert
from sphere_rl.errors import ConfigError
from sphere_rl.suites import make_suite
from sphere_rl.suites.env_args import FLAG as ENV_ARGS
from sphere_rl.suites.env_args import taken_from, word_of
from sphere_rl.terminal.options import train_parser
from sphere_rl.training.monitors import check_watchers


def parse_train(words: list[str]) -> tuple[TrainConfig, Path, bool]:
    """Configuration, run folder and quietness.

    Raises:
        ConfigError: a value that is not allowed.
        CommandLineError: a flag that does not exist, or a value of the wrong type.
    """
    arguments, words = taken_from(words)
    suite, path, named = _early(words)
    use_plugins(named)
    default = overridden(preset(make_suite(suite)), named)
    if path:
        default = load_toml(path, default)
    helpful = any(word in ("-h", "--help") for word in words)
    given = vars(train_parser(default, helpful).parse_args([flag_of(word) for word in words]))
    own = {name: given.pop(name, None) for name in ("config", "out", "quiet")}
    settings = overridden(default, given | {"env_args": arguments})
    check_watchers(settings)
    return settings, own["out"] or Path("runs") / default_name(settings), bool(own["quiet"])


def load_plugins(words: Sequence[str]) -> None:
    """Load the plugins that words of ``sphere train`` name, and the file among them."""
    use_plugins(_early(words)[2])


def _early(words: Sequence[str]) -> tuple[str, Path | None, dict[str, Any]]:
    """What has to be known before the words can be parsed: the suite, the file, and the table of plugins."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--suite", nargs="?")
    first.add_argument("--config", nargs="?", type=Path)
    first.add_argument("--plugin", nargs="*")
    early, _ = first.parse_known_args(words)
    file = _peek(early.config) if early.config else {}
    suite = early.suite or convert("suite", file.get("suite", ""), str) or "cw10"
    return suite, early.config, {"plugin": early.plugin or file.get("plugin", ())}


def option_words(name: str, value: Any) -> list[str]:
    """Words of ``sphere train`` that set an option: ``--sphere.rho 0.1``, ``--no-crelu``, ``--env-args g=1.6``."""
    table, dot, inner = name.removeprefix("network.").replace("_", "-").rpartition(".")
    if table.partition(".")[0] == ENV_ARGS.removeprefix("--"):  # whose name may have underscores and dots
        word = f"{name.partition('.')[2]}={word_of(value)}"
        return [f"{ENV_ARGS}={word}"] if word.startswith("-") else [ENV_ARGS, word]
    if isinstance(value, bool):
        return [f"--{table}{dot}{'' if value else 'no-'}{inner}"]
    flag = f"--{table}{dot}{inner}"
    if isinstance(value, str) and value.startswith("-"):
        return [f"{flag}={value}"]
    return [flag, *map(str, value if isinstance(value, list | tuple) else [value])]


def flag_of(word: str) -> str:
    """A flag with dashes, where it was written with underscores."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def named_options(words: Sequence[str]) -> list[str]:
    """The options that words of ``sphere train`` set, and the file among them: ``sphere.rho`` for ``--sphere.rho``."""
    flags = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    file = _early(words)[1]
    return [*(names_of(read_toml(file)) if file else ()), *(flag.replace("-", "_") for flag in flags)]


def default_name(config: TrainConfig) -> str:
    """Name of a run's folder where none is given."""
    return f"{config.suite}-{config.protocol}-{config.actor}-{'+'.join(config.method)}-seed{config.seed}"


def _peek(path: Path) -> dict[str, Any]:
    """What a TOML file holds; whatever is wrong with the file is said when it is loaded."""
    with contextlib.suppress(ConfigError):
        return read_toml(path)
    return {}
