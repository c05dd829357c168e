"""A mixture's forward pass as one TorchScript call: gate, routing and experts, without Python in between."""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.mlp import chain_outputs
from sphere_rl.kernels.routing import Assigned, Gating, blocks_of, route
from sphere_rl.kernels.script import scriptable, scripted


class Layers(NamedTuple):
    """Weights [E, out, in] and biases [E, out] of each layer of a grouped MLP."""

    weights: list[Tensor]
    biases: list[Tensor]


class Passed(NamedTuple):
    """A forward pass: which rows go where, and inputs and outputs of all layers of the gate and of the experts."""

    assigned: Assigned
    gate: list[Tensor]
    experts: list[Tensor]


@scriptable
def mixture_pass(parts: list[Layers], gating: Gating, rows: Tensor, num_lanes: int) -> Passed:
    """Rows [N, D] through the experts, ``parts[0]``, and the gate before them, ``parts[1]``, if there is one."""
    n = rows.size(0)
    if len(parts) > 1:
        gate = chain_outputs(rows, parts[1].weights, parts[1].biases, [(0, 0, n)], 1)
        found = route(gate[-1], gating)
        rows = rows.index_select(0, found.sample)
    else:
        gate = [rows]
        ones, sample = rows.new_ones(n, 1), torch.arange(n, device=rows.device)
        found = Assigned(ones, torch.zeros_like(sample), sample, ones[:, 0], [n])
    experts = chain_outputs(rows, parts[0].weights, parts[0].biases, blocks_of(found.counts), num_lanes)
    return Passed(found, gate, experts)


@scriptable
def mixed(found: Passed, n: int) -> Tensor:
    """Σ_e g_e · expert_e(x) of each of N samples."""
    rows, assigned = found.experts[-1], found.assigned
    if len(assigned.counts) == 1:  # every sample once, in order, with weight 1
        return rows
    output = rows.new_zeros(n, rows.size(1))
    return output.index_add_(0, assigned.sample, rows * assigned.gate.unsqueeze(1))


@scripted
def mixture_output(parts: list[Layers], gating: Gating, rows: Tensor, num_lanes: int) -> Tensor:
    """The output [N, A] alone."""
    return mixed(mixture_pass(parts, gating, rows, num_lanes), rows.size(0))
