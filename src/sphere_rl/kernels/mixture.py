"""A mixture's forward pass as one TorchScript call: gate, routing and experts, without Python in between."""

from typing import NamedTuple

import torch
from torch import Tensor

from sphere_rl.kernels.mlp import chain_outputs
from sphere_rl.kernels.routing import Assignments, Gating, blocks_of, route
from sphere_rl.kernels.script import scriptable, scripted


class Layers(NamedTuple):
    """Weights [E, out, in] and biases [E, out] of each layer of a grouped MLP."""

    weights: list[Tensor]
    biases: list[Tensor]


class MixturePass(NamedTuple):
    """All that a forward pass computed."""

    assigned: Assignments
    gate: list[Tensor]
    """Rows of the gate [N, D] and the output of each of its layers; the rows alone where there is no gate."""
    experts: list[Tensor]
    """Rows of the experts [M, D], sorted by expert, and the output of each of their layers."""


@scriptable
def mixture_pass(parts: list[Layers], gating: Gating, rows: Tensor, num_lanes: int) -> MixturePass:
    """Rows [N, D] through the experts, ``parts[0]``, and the gate before them, ``parts[1]``, if there is one."""
    n = rows.size(0)
    if len(parts) > 1:
        gate = chain_outputs(rows, parts[1].weights, parts[1].biases, [(0, 0, n)], 1)
        found = route(gate[-1], gating)
        rows = rows.index_select(0, found.sample)
    else:
        gate = [rows]
        ones, sample = rows.new_ones(n, 1), torch.arange(n, device=rows.device)
        found = Assignments(ones, torch.zeros_like(sample), sample, ones[:, 0], [n])
    experts = chain_outputs(rows, parts[0].weights, parts[0].biases, blocks_of(found.counts), num_lanes)
    return MixturePass(found, gate, experts)


@scriptable
def mixed_output(found: MixturePass, n: int) -> Tensor:
    """Σ_e g_e · expert_e(x) of each of N samples."""
    rows, assigned = found.experts[-1], found.assigned
    if len(assigned.counts) == 1:  # every sample once, in order, with weight 1
        return rows
    output = rows.new_zeros(n, rows.size(1))
    return output.index_add_(0, assigned.sample, rows * assigned.gate.unsqueeze(1))


@scripted
def mixture_output(parts: list[Layers], gating: Gating, rows: Tensor, num_lanes: int) -> Tensor:
    """The output [N, A] alone."""
    return mixed_output(mixture_pass(parts, gating, rows, num_lanes), rows.size(0))
