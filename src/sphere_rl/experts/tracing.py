"""Networks as TorchScript traces: all experts are computed, and those that are not selected weigh nothing."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def traced(module: nn.Module, inputs: Tensor) -> torch.jit.ScriptModule:
    """Trace a module that holds this library's networks; no number of rows is fixed by ``inputs`` [2, D]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`?torch.jit", DeprecationWarning)  # its files are what C++ reads
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[reportPrivateImportUsage] # of checks of shapes
        found = torch.jit.trace(module.eval(), inputs, check_trace=False)  # type: ignore[reportPrivateImportUsage]
    assert isinstance(found, torch.jit.ScriptModule)
    return found
