"""Mitigation methods: one file each, found by itself.

A module of this package defines one subclass of `Method`, named after the file: its rule, defaults and citation. A
method acts through hooks at fixed places of training; what it does not override does nothing. Several methods compose
in the order given.

Rules that hold for every method: parameters keep their identity (they are changed in place, never replaced by new
objects); what is replaced or reset starts with fresh Adam moments (`ActorCritic.moments`, `ActorCritic.forget`);
randomness comes from ``agent.generator``; whatever the next minibatch depends on is in ``state_dict``;
``critic_penalty`` shares no state with the actor's hooks, and draws nothing at random, because it may run beside them
on a second thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from sphere_rl.errors import ConfigError
from sphere_rl.methods.base import ActorStep, Method, MethodConfig, check_range

__all__ = ["ActorStep", "Method", "MethodConfig", "check_methods", "check_range", "methods"]


@cache
def methods() -> dict[str, type[Method]]:
    """All methods by name. Modules whose name begins with an underscore are what several methods share."""
    found: dict[str, type[Method]] = {}
    for name in (module.name for module in iter_modules(__path__) if not module.name.startswith("_")):
        module = import_module(f"{__name__}.{name}")
        for member in vars(module).values():
            own = isinstance(member, type) and member.__module__ == module.__name__
            if own and issubclass(member, Method) and member is not Method:
                member.name = name
                found[name] = member
    return found


def check_methods(names: Sequence[str]) -> None:
    """Raise `ConfigError` for a name that no method has or that is given twice, and for two optimisers."""
    for name in names:
        if name not in methods():
            raise ConfigError("method", name, f"one or more of {', '.join(methods())}")
        if names.count(name) > 1:
            raise ConfigError("method", " ".join(names), "each method once")
    optimizers = [name for name in names if methods()[name].make_optimizer is not Method.make_optimizer]
    if len(optimizers) > 1:
        raise ConfigError("method", " ".join(names), f"at most one that replaces Adam, not {' and '.join(optimizers)}")
