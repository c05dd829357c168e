"""The words of ``sphere train``, turned into a configuration: suite preset, TOML file, flags, in this order."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from sphere_rl.config import TrainConfig, load_toml, names_of, override, preset, read_toml
from sphere_rl.errors import CommandLineError
from sphere_rl.suites import make_suite
from sphere_rl.suites.env_args import EnvArgs, argument_of, taken_from, word_of
from sphere_rl.terminal.parsers import whole
from sphere_rl.training.monitors import check_log


@dataclass(frozen=True)
class Train:
    """Train an agent on a sequence of tasks. Flags win over the file, the file over the suite's preset."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: Path | None = None
    """TOML file with any of these options."""
    out: Path | None = None
    """Run folder; by default runs/<suite>-<protocol>-<actor>-<method>-seed<seed>."""
    quiet: bool = False
    """No progress display."""


TYPES = ConstructorRegistry()
"""How words become values, where tyro's own way is not ours."""


@TYPES.primitive_rule
def whole_number(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """``--steps-per-task 1e6`` is a whole number, too."""
    if kind.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


@TYPES.primitive_rule
def environment_arguments(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[EnvArgs] | None:
    """Only to be shown by ``--help``: `parse_train` takes them before, from wherever they stand."""
    if kind.type is not EnvArgs:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[KEY=VALUE ...]",
        instance_from_str=lambda words: EnvArgs(dict(map(argument_of, words))),
        is_instance=lambda value: isinstance(value, EnvArgs),
        str_from_instance=lambda value: [f"{name}={word_of(one)}" for name, one in value.items()],
    )


def parse_train(words: list[str]) -> tuple[TrainConfig, Path, bool]:
    """Configuration, run folder and quietness.

    Raises:
        ConfigError: a value that is not allowed.
        CommandLineError: a flag that does not exist, or a value of the wrong type.
    """
    arguments, words = taken_from(words)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--suite", nargs="?")
    first.add_argument("--config", nargs="?", type=Path)
    early, _ = first.parse_known_args(words)
    default = preset(make_suite(early.suite or (_suite_of(early.config) if early.config else None) or "cw10"))
    if early.config:
        default = load_toml(early.config, default)
    parsed = parse(Train, Train(settings=default), words, "train")
    settings = override(parsed.settings, {"env_args": arguments})
    check_log(settings.log)
    return settings, parsed.out or Path("runs") / default_name(settings), parsed.quiet


def named_options(words: Sequence[str]) -> list[str]:
    """The options that words of ``sphere train`` set, and the file among them: ``sphere.rho`` for ``--sphere.rho``."""
    flags = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    file = first.parse_known_args(words)[0].config
    return [*(names_of(read_toml(file)) if file else ()), *(flag.replace("-", "_") for flag in flags)]


def default_name(config: TrainConfig) -> str:
    """Name of a run's folder where none is given."""
    return f"{config.suite}-{config.protocol}-{config.actor}-{'+'.join(config.method)}-seed{config.seed}"


def parse(kind: Any, default: Any, words: list[str], command: str) -> Any:
    """Parse words into a dataclass with tyro; its framed errors become one line."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return tyro.cli(kind, default=default, args=words, prog=f"sphere {command}", registry=TYPES)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise CommandLineError(_first_sentence(screen.getvalue())) from None


def _suite_of(path: Path) -> str | None:
    """The suite that a TOML file names; whatever is wrong with the file is said when it is loaded."""
    with contextlib.suppress(OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return tomllib.loads(path.read_text()).get("suite")
    return None


def _first_sentence(framed: str) -> str:
    """The message of a framed error: the lines between the frame's top and its first rule."""
    inner = [line.strip(" │") for line in framed.splitlines() if line.startswith("│")]
    stop = next((i for i, line in enumerate(inner) if set(line) <= {"─", " "}), len(inner))
    message = " ".join(inner[:stop]) or " ".join(framed.split())
    return re.sub(r"^Error parsing settings[\w.]*: ", "", message)
