"""Mitigation methods: one file each, found by itself.

A module of this package defines one subclass of `Method`, named after the file: its rule, defaults and citation. A
method acts through hooks at fixed places of training; what it does not override does nothing. Several methods compose
in the order given.

Rules that hold for every method: parameters keep their identity (they are changed in place, never replaced by new
objects); what is replaced or reset starts with fresh Adam moments (`ActorCritic.moments`, `ActorCritic.forget`);
randomness comes from ``agent.generator``; whatever the next minibatch depends on is in ``state_dict``;
``critic_penalty`` and the critic's ``observe`` and ``parameter_gradients`` share no state with the actor's hooks, and
draw nothing at random, because they may run beside them on a second thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from sphere_rl import plugins
from sphere_rl.conversion import check_fields
from sphere_rl.errors import ConfigError
from sphere_rl.methods.base import ActorStep, Method, MethodConfig, check_range

__all__ = ["ActorStep", "Method", "MethodConfig", "check_methods", "check_range", "methods"]


@cache
def own_methods() -> dict[str, type[Method]]:
    """Those of this package. Modules whose name begins with an underscore are what several methods share."""
    found: dict[str, type[Method]] = {}
    for name in (module.name for module in iter_modules(__path__) if not module.name.startswith("_")):
        for member in methods_in(import_module(f"{__name__}.{name}")):
            found[name] = named(member, name)
    return found


def methods() -> dict[str, type[Method]]:
    """All methods by name, those of plugins included.

    Raises:
        ConfigError: an entry point is no subclass of `Method`, two methods have one name, or one cannot be used.
    """
    found = dict(own_methods())
    others = [*plugins.offered("methods")]
    for module in plugins.loaded().values():
        others += called_in(module)
    for name, method in others:
        if not (isinstance(method, type) and issubclass(method, Method)):
            raise ConfigError("method", name, "a subclass of sphere_rl.methods.Method")
        if found.get(name, method) is not method:
            raise ConfigError("method", name, f"another name: {found[name].__module__} has one of that name")
        found[name] = named(method, name)
    return found


def methods_in(module: ModuleType) -> list[type[Method]]:
    """Subclasses of `Method` that are defined in a module, but those with an underscore, bases of others."""
    classes = dict.fromkeys(member for member in vars(module).values() if isinstance(member, type))
    own = [member for member in classes if member.__module__ == module.__name__ and member.__name__[0] != "_"]
    return [member for member in own if issubclass(member, Method) and member is not Method]


def called_in(module: ModuleType) -> list[tuple[str, type[Method]]]:
    """Methods of a plugin module and what they are called: a class has its ``name`` or the module's.

    Raises:
        ConfigError: several have no name.
    """
    found, name = methods_in(module), module.__name__.rpartition(".")[2]
    unnamed = [member.__name__ for member in found if "name" not in vars(member)]
    if len(unnamed) > 1:
        allowed = f"one class without a `name`, not {' and '.join(unnamed)} (of a base of others begin it with _)"
        raise ConfigError("plugin", module.__name__, allowed)
    return [(vars(member).get("name", name), member) for member in found]


def named(method: type[Method], name: str) -> type[Method]:
    """The class, told what it is called.

    Raises:
        ConfigError: the name is no word for files and flags, or the class lacks what every method must have.
    """
    check_described(method, name)
    method.name = name
    return method


@cache
def check_described(method: type[Method], name: str) -> None:
    """Raise `ConfigError` where a method cannot be named, listed or configured."""
    if not (isinstance(name, str) and name.isidentifier() and name[0] != "_"):
        raise ConfigError("method", name, "a name of letters, digits and underscores (set the class's `name`)")
    for text in ("summary", "citation"):
        if not isinstance(getattr(method, text, None), str):
            raise ConfigError("method", name, f"a `{text}` of its class {method.__name__}, a line of text")
    if not (isinstance(method.Config, type) and issubclass(method.Config, MethodConfig)):
        raise ConfigError("method", name, f"a `Config` that is a subclass of MethodConfig, not {method.Config!r}")
    check_fields(name, method.Config)


def check_methods(names: Sequence[str]) -> None:
    """Raise `ConfigError` for no name, one that no method has or that is given twice, and for two optimisers."""
    if not names:
        raise ConfigError("method", "()", f"one or more of {', '.join(methods())}")
    for name in names:
        if name not in methods():
            apart = " (composed ones with a space between)" if "+" in name else ""
            raise ConfigError("method", name, f"one or more of {', '.join(methods())}{apart}")
        if names.count(name) > 1:
            raise ConfigError("method", " ".join(names), "each method once")
    optimizers = [name for name in names if methods()[name].make_optimizer is not Method.make_optimizer]
    if len(optimizers) > 1:
        raise ConfigError("method", " ".join(names), f"at most one that replaces Adam, not {' and '.join(optimizers)}")
