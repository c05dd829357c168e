"""TorchScript, where PyTorch still promises it."""

import sys
import warnings
from collections.abc import Callable
from inspect import unwrap
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

SCRIPTED = sys.version_info < (3, 14)
"""Later PyTorch does not promise TorchScript; the same loops then run as plain Python, on one thread."""


def scripted(function: Function) -> Function:
    """The same function in TorchScript, where that is promised."""
    if not SCRIPTED:
        return function
    with warnings.catch_warnings():  # deprecated in favour of torch.compile, which needs a compiler on the machine
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(unwrap(function))  # without a type checker that tests wrap around it


def scriptable(function: Function) -> Function:
    """A function of Python that scripted ones may call, too: they compile it for themselves."""
    return unwrap(function)  # type: ignore[reportReturnType]
