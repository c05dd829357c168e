"""The flags of ``sphere train``, made from the fields of the configuration: kinds, groups, defaults and sentences."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sphere_rl.config import TrainConfig
from sphere_rl.conversion import parts_of
from sphere_rl.experts.options import NetworkOptions
from sphere_rl.methods import MethodConfig, methods
from sphere_rl.suites.env_args import EnvArgs, word_of
from sphere_rl.terminal.parsers import ArgumentParser, integer

GROUPS = {
    "what is trained": "plugin suite tasks env_args max_episode_steps protocol actor critic method label seed "
    "steps_per_task",
    "rollout and PPO": "num_envs num_steps minibatch_size num_epochs gamma gae_lambda clip target_kl value_coefficient "
    "entropy_coefficient max_grad_norm",
    "learning rate": "learning_rate learning_rate_schedule learning_rate_end kl_target learning_rate_bounds adam_eps",
    "observations and rewards": "normalize_observations observation_clip normalize_rewards",
    "network": " ".join(field.name for field in fields(NetworkOptions)),
    "measuring": "eval_every eval_episodes final_eval_episodes eval_max_steps spectrum_every",
    "process": "checkpoint_every on_nan env_timeout env_threads torch_threads device log films",
}
"""Every option of a run but the methods' own, in the groups that ``--help`` and the documentation have."""


@dataclass(frozen=True)
class Option:
    """A field as a flag: its name in `sphere_rl.config.override`, its flag, kind, default and sentence."""

    name: str
    flag: str
    kind: Any
    default: Any
    sentence: str


@cache
def train_parser(default: TrainConfig, helpful: bool) -> ArgumentParser:
    """A parser of every option; what is not given is not in its result. Sentences only where ``helpful``."""
    parser = ArgumentParser(
        others=" (sphere train --help lists the options)",
        prog="sphere train",
        usage="sphere train [OPTIONS]",
        description="Train an agent on a sequence of tasks. Flags win over the file, the file over the suite's preset, "
        "whose defaults these are.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.IGNORECASE)  # -1e6 is no flag
    run = parser.add_argument_group("run")
    run.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any of these options")
    run.add_argument(
        "--out", type=Path, metavar="FOLDER", help="run folder (runs/SUITE-PROTOCOL-ACTOR-METHOD-seedSEED)"
    )
    run.add_argument("--quiet", action="store_true", help="no progress display")
    run.add_argument("--no-quiet", dest="quiet", action="store_false", help=argparse.SUPPRESS)
    for title, options in grouped(default, helpful):
        group = parser.add_argument_group(title)
        for option in options:
            add(group, option)
    return parser


def grouped(default: TrainConfig, helpful: bool) -> Iterator[tuple[str, list[Option]]]:
    """Titles and options: the groups, then the methods that have options."""
    own = {option.name: option for option in options_of(default, "", helpful)}
    own |= {o.name.partition(".")[2]: o for o in options_of(default.network, "network.", helpful)}
    for title, names in GROUPS.items():
        yield title, [own[name] for name in names.split()]
    for name in methods():
        if options := options_of(getattr(default.options, name), f"{name}.", helpful):
            yield f"method {name}", options


def options_of(instance: Any, prefix: str, helpful: bool) -> list[Option]:
    """The fields of a dataclass as options; those that are dataclasses themselves are left out."""
    kinds, said = hints(type(instance)), sentences(type(instance)) if helpful else {}
    shown = "" if prefix == "network." else prefix
    return [
        Option(
            prefix + name, f"--{(shown + name).replace('_', '-')}", kind, getattr(instance, name), said.get(name, "")
        )
        for name, kind in kinds.items()
        if name not in ("network", "options")
    ]


@cache
def hints(kind: type) -> dict[str, Any]:
    """Kinds of a dataclass's fields."""
    found = get_type_hints(kind)
    return {field.name: found[field.name] for field in fields(kind)}


def add(group: Any, option: Option) -> None:
    """Add an option to a group; a truth value is a pair of flags, ``--sphere.pcgrad`` and ``--sphere.no-pcgrad``."""
    text = option.sentence.replace("%", "%%").removesuffix(".") + f" ({shown(option.default)})"
    if option.kind is bool:
        head, dot, tail = option.flag.removeprefix("--").rpartition(".")
        group.add_argument(option.flag, dest=option.name, action="store_true", help=text)
        off = f"--{head}{dot}no-{tail}"
        group.add_argument(off, dest=option.name, action="store_false", help=argparse.SUPPRESS)
    else:
        group.add_argument(option.flag, dest=option.name, help=text, **words_of(option.kind))


def words_of(kind: Any) -> Mapping[str, Any]:
    """How the words of an option of this kind are read, as arguments of ``add_argument``."""
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is EnvArgs:
        return {"nargs": "*", "metavar": "KEY=VALUE"}
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        return {**words_of(inner), "nargs": "*" if rest == [...] else 1 + len(rest)}
    if get_origin(kind) in (UnionType, Union):  # X | None, X | Literal["auto"]
        inner, words = parts_of(kind)
        read = words_of(inner)
        if "choices" in read:
            return {"type": lambda word: None if word == "None" else word, "choices": (*read["choices"], *words)}
        return {
            "type": lambda word: next((one for one in words if str(one) == word), None) if word in map(str, words)
            else read["type"](word),
            "metavar": "|".join([read["metavar"], *map(str, words)]),
        }  # fmt: skip
    return {"type": {int: integer, float: real}.get(kind, str), "metavar": METAVARS.get(kind, "NAME")}


METAVARS = {int: "N", float: "X", str: "NAME"}


def real(word: str) -> float:
    """A number as a type of argparse."""
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not allowed; expected a number") from None


def shown(default: Any) -> str:
    """A default as a user would write it."""
    if isinstance(default, Mapping):
        return " ".join(f"{name}={word_of(value)}" for name, value in default.items()) or "none"
    if isinstance(default, tuple):
        return " ".join(map(shown, default)) or "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        return f"{default:g}"
    return {None: "not set", "": "none"}.get(default, str(default))


@cache
def sentences(kind: type) -> dict[str, str]:
    """The text under each field of a class, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, TrainConfig | NetworkOptions | MethodConfig):
            found |= {name: text for owner, name, text in _texts(inspect.getfile(base)) if owner == base.__name__}
    return found


@cache
def _texts(path: str) -> list[tuple[str, str, str]]:
    """Class, field and text of every annotated field of a file with a text under it."""
    return [
        (owner.name, field.target.id, inspect.cleandoc(text.value.value))
        for owner in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
        if isinstance(owner, ast.ClassDef)
        for field, text in zip(owner.body, owner.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    ]  # fmt: skip
