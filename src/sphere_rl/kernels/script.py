"""TorchScript, where PyTorch still promises it."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import unwrap
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

SCRIPTED = sys.version_info < (3, 14) and os.environ.get("PYTORCH_JIT") != "0"
"""On later Pythons PyTorch does not promise TorchScript, and PYTORCH_JIT=0 is its own switch against it: then the same
loops run as plain Python, on one thread, and every step goes through autograd."""


def scripted(function: Function) -> Function:
    """The same function in TorchScript, where that is promised."""
    if not SCRIPTED:
        return function
    with undeprecated():
        return torch.jit.script(unwrap(function))  # without a type checker that tests wrap around it


@contextmanager
def undeprecated() -> Iterator[None]:
    """Without PyTorch's word that TorchScript is deprecated, whatever its category: FutureWarning since 2.14.

    What it names instead compiles on the machine, which needs a compiler there, or writes files that C++ cannot read.
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", "`?torch.jit", category)
        yield


def scriptable(function: Function) -> Function:
    """A function of Python that scripted ones may call, too: they compile it for themselves."""
    return unwrap(function)  # type: ignore[reportReturnType]
