"""Networks as graphs that are taken away: all experts are computed, and those that are not selected weigh nothing."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sphere_rl.kernels.routing import Gating
from sphere_rl.kernels.script import undeprecated


def is_being_exported() -> bool:
    """Whether this forward pass is recorded as a graph, which no sample may change."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]


def unsorted_weights(logits: Float[Tensor, "N R"], gating: Gating) -> Float[Tensor, "N E"]:
    """`sphere_rl.kernels.routing.gate_weights` without a stable sort, which ONNX does not have.

    An expert is chosen where fewer than k others come before it: larger logits, and equal ones of a lower index.
    """
    mine, other = logits[:, :, None], logits[:, None, :]
    lower = torch.ones(logits.shape[1], logits.shape[1], dtype=torch.bool, device=logits.device).tril(-1)
    before = ((other > mine) | ((other == mine) & lower)).to(torch.int64).sum(2)
    weights = (logits / gating.temperature).masked_fill(before >= gating.k, -float("inf")).softmax(1)
    shared = torch.ones_like(weights[:, :1]).expand(-1, gating.shared)
    return torch.cat((shared, weights), 1) if gating.shared else weights


def traced(module: nn.Module, inputs: Tensor) -> torch.jit.ScriptModule:
    """Trace a module that holds this library's networks; no number of rows is fixed by ``inputs`` [2, D]."""
    with undeprecated():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[reportPrivateImportUsage] # of checks of shapes
        found = torch.jit.trace(module.eval(), inputs, check_trace=False)  # type: ignore[reportPrivateImportUsage]
    assert isinstance(found, torch.jit.ScriptModule)
    return found
