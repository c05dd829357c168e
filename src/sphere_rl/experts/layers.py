"""Grouped expert layers: one forward and one backward pass that compute only the selected experts.

A gate assigns every sample to some of E experts. The assignments are kept sorted by expert, so every expert owns
one contiguous block of rows, and a linear layer of all experts is a few matrix products on such blocks. Dense
routing, always-on experts and a plain MLP (one expert) are special cases of the same routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sphere_rl.experts.routing import Routing
from sphere_rl.kernels.gram import routed_penalty
from sphere_rl.kernels.mixture import Layers
from sphere_rl.kernels.mlp import expert_chain
from sphere_rl.kernels.precision import at_least_float32
from sphere_rl.penalty import Scale, penalty_gradient, sphere_penalty

SETTLING = 15
"""Power iterations that find the spectral norm of weights that are new."""


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers from ``generator``, on PyTorch's default device, whichever the generator's is."""
    return torch.randn(shape, generator=generator, device=generator.device).to(torch.get_default_device())


class GroupedLinear(nn.Module):
    """One linear layer for each of E experts; row j of the input goes through the expert of assignment j.

    Weights [E, out, in] are LeCun-normal (standard deviation 1/√in), biases [E, out] zero. With spectral_norm
    every W_e is divided by an estimate of its largest singular value: one power iteration in each training
    forward that records gradients (Miyato et al. 2018).
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        num_experts: int,
        *,
        generator: torch.Generator,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        normal = drawn((num_experts, out_dim, in_dim), generator)
        self.weight = nn.Parameter(normal * in_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_experts, out_dim))
        self.spectral_norm = spectral_norm
        if spectral_norm:
            self.register_buffer("u", F.normalize(drawn((num_experts, out_dim), generator), dim=1))
            self.register_buffer("v", F.normalize(drawn((num_experts, in_dim), generator), dim=1))
            self.settle_norm()

    def forward(self, x: Float[Tensor, "M in"], routing: Routing) -> Float[Tensor, "M out"]:
        """y_j = W_e x_j + b_e with e the expert of assignment j: rows sorted by expert, one output row for each."""
        weight, bias = self.effective()
        return expert_chain(x, (weight,), (bias,), routing.counts)[0]

    def effective(self) -> tuple[Float[Tensor, "E out in"], Float[Tensor, "E out"]]:
        """Weight and bias that rows are multiplied by."""
        return (self.normalized_weight() if self.spectral_norm else self.weight), self.bias

    @property
    def uses_its_parameters(self) -> bool:
        """Whether rows are multiplied by ``weight`` and ``bias`` as they are, and nothing made of them."""
        return type(self) is GroupedLinear and not self.spectral_norm

    def normalized_weight(self) -> Float[Tensor, "E out in"]:
        """W_e/σ_e, with one power iteration in training mode."""
        if self.training and torch.is_grad_enabled():  # not while experience is collected
            self._power_iteration()
        # Clones: a later forward moves the buffers in place while this graph may still need them.
        sigma = torch.einsum("eo,eoi,ei->e", self.u.clone(), self.weight, self.v.clone())
        return self.weight / sigma[:, None, None]

    def settle_norm(self) -> None:
        """Find σ of weights that are new: experience is collected with them before the first training pass."""
        for _ in range(SETTLING if self.spectral_norm else 0):
            self._power_iteration()

    @torch.no_grad()
    def _power_iteration(self) -> None:
        self.v.copy_(F.normalize(torch.einsum("eoi,eo->ei", self.weight, self.u), dim=1))
        self.u.copy_(F.normalize(torch.einsum("eoi,ei->eo", self.weight, self.v), dim=1))

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        experts, out_dim, in_dim = self.weight.shape
        return f"in={in_dim}, out={out_dim}, experts={experts}, spectral_norm={self.spectral_norm}"


class _DensePenalty(torch.autograd.Function):
    """`sphere_rl.sphere_penalty`; where it has no gradient, autograd's own would be round-off."""

    @staticmethod
    def forward(ctx: Any, phi: Tensor, scale: Scale) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(phi)
        return sphere_penalty(phi, scale)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (phi,) = ctx.saved_tensors
        return grad_outputs[0] * penalty_gradient(phi, ctx.scale), None


def dense_penalty(phi: Float[Tensor, "N m"], scale: Scale) -> Float[Tensor, ""]:
    """`sphere_rl.sphere_penalty` with `sphere_rl.penalty.penalty_gradient`."""
    return _DensePenalty.apply(at_least_float32(phi), scale)  # type: ignore[return-value]


@dataclass(frozen=True)
class RoutedFeatures:
    """Hidden features of one expert layer, for the routed (sample, expert) pairs only.

    The weighted features are φ(x) = [g_1 h_1 ‖ … ‖ g_E h_E] ∈ ℝᵐ, m = E·H, and A = ΦᵀΦ/N.

    Attributes:
        values: after the activation, one row an assignment.
        routing: which rows these are.
    """

    values: Float[Tensor, "M H"]
    routing: Routing

    def dense(self) -> Float[Tensor, "N E H"]:
        """Features without gate weights, zero where an expert was not selected."""
        return self._scatter(self.values)

    def weighted(self) -> Float[Tensor, "N m"]:
        """Φ: gate-weighted features of all experts side by side, m = E·H."""
        return self._scatter(self.routing.gate[:, None] * self.values).flatten(1)

    def gram(self) -> Float[Tensor, "N N"]:
        """ΦΦᵀ/N, summed over experts from the routed rows only; in float32 at least, under autocast, too."""
        n = self.routing.num_samples
        weighted = at_least_float32(self.routing.gate[:, None] * self.values)
        gram = weighted.new_zeros(n, n)
        with torch.autocast(gram.device.type, enabled=False):
            for (_, start, end), rows in zip(self.routing.blocks, self.routing.block_rows, strict=True):
                block = weighted[start:end]
                gram = gram.index_put((rows[:, None], rows[None, :]), block @ block.t(), accumulate=True)
        return gram / n

    def sphere_penalty(self, scale: Scale = "literal") -> Float[Tensor, ""]:
        """`sphere_rl.sphere_penalty` of Φ, all experts jointly; gradients reach the features and the gate.

        Raises RuntimeError when differentiated with create_graph.
        """
        routing = self.routing
        return routed_penalty(
            self.values, routing.gate, routing.sample, routing.counts, routing.num_samples, free=scale == "free"
        )

    def sphere_penalty_per_expert(self, scale: Scale = "literal") -> Float[Tensor, ""]:
        """`sphere_rl.per_expert_penalty`: of A_e = Φ_eᵀΦ_e/N, without cross-expert terms."""
        weighted = self.routing.gate[:, None] * self.values
        penalty = weighted.new_zeros(())
        for _, start, end in self.routing.blocks:
            own = dense_penalty(weighted[start:end], scale)  # of Φ_eᵀΦ_e over the expert's own rows
            penalty = penalty + (own if scale == "free" else own * ((end - start) / self.routing.num_samples) ** 2)
        return penalty

    def _scatter(self, rows: Float[Tensor, "M H"]) -> Float[Tensor, "N E H"]:
        n, experts = self.routing.num_samples, self.routing.num_experts
        dense = rows.new_zeros(n, experts, rows.shape[1])
        return dense.index_put((self.routing.sample, self.routing.expert), rows)


@dataclass(frozen=True)
class ExpertOutput:
    """Result of an expert MLP: out [N, A] = Σ_e g_e · expert_e(x), each expert_e(x), and features of hidden layers."""

    out: Float[Tensor, "N A"]
    rows: Float[Tensor, "M A"]
    features: tuple[RoutedFeatures, ...]


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what goes into this module or comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class ExpertMLP(nn.Module):
    """E MLPs of the same shape with ReLU, mixed by a routing: out = Σ_e g_e · expert_e(x).

    layer_norm: Linear → LayerNorm (no affine) → activation. crelu: the activation is [relu(z), relu(−z)] on
    half as many linear units, so `hidden` stays the width of the features. spectral_norm: hidden layers only.
    layerwise: set it where derivatives of the output with respect to features are needed.
    """

    layerwise = False

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        num_experts: int,
        *,
        generator: torch.Generator,
        layer_norm: bool = False,
        crelu: bool = False,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        odd = [width for width in hidden if crelu and width % 2]
        if odd:
            raise ValueError(f"hidden = {tuple(hidden)}: expected even widths with crelu")
        self.layer_norm, self.crelu = layer_norm, crelu
        layers, width = [], in_dim
        for features in hidden:
            units = features // 2 if crelu else features
            layers.append(GroupedLinear(width, units, num_experts, generator=generator, spectral_norm=spectral_norm))
            width = features
        self.hidden = nn.ModuleList(layers)
        self.head = GroupedLinear(width, out_dim, num_experts, generator=generator)

    def forward(self, x: Float[Tensor, "N in"], routing: Routing) -> ExpertOutput:
        """Rows of x through their experts; `routing` must have been made for as many rows and experts."""
        alone = routing.num_experts == 1  # every sample once, in order: nothing to gather or add up
        rows = x if alone else x.index_select(0, routing.sample)
        *hidden, rows = self._all_layers(rows, routing) if self.is_chain else self._layer_by_layer(rows, routing)
        weighted = routing.gate[:, None] * rows
        out = weighted.new_zeros(len(x), weighted.shape[1])
        out = weighted if alone else out.index_add(0, routing.sample, weighted)
        return ExpertOutput(out=out, rows=rows, features=tuple(RoutedFeatures(h, routing) for h in hidden))

    @property
    def layers(self) -> tuple[GroupedLinear, ...]:
        """Hidden layers and head."""
        return (*self.hidden, self.head)  # type: ignore[arg-type]

    @property
    def is_chain(self) -> bool:
        """Whether all layers can be one operation, which neither hooks nor forwards of their own see."""
        plain = not (self.layerwise or self.layer_norm or self.crelu)
        return plain and not any(
            is_hooked(layer) or type(layer).forward is not GroupedLinear.forward for layer in self.layers
        )

    def effective(self) -> Layers:
        """Weights and biases that rows are multiplied by."""
        return Layers(*map(list, zip(*(layer.effective() for layer in self.layers), strict=True)))

    def _all_layers(self, rows: Tensor, routing: Routing) -> Sequence[Tensor]:
        return expert_chain(rows, *self.effective(), routing.counts)

    def _layer_by_layer(self, h: Tensor, routing: Routing) -> Sequence[Tensor]:
        outputs = []
        for layer in self.hidden:
            h = self._activate(layer(h, routing))
            outputs.append(h)
        return *outputs, self.head(h, routing)

    def _activate(self, z: Tensor) -> Tensor:
        if self.layer_norm:
            z = F.layer_norm(z, z.shape[-1:])
        return torch.cat((z.relu(), (-z).relu()), dim=-1) if self.crelu else z.relu()

    def every(self, x: Float[Tensor, "N in"]) -> Float[Tensor, "E N A"]:
        """What every expert makes of every row, in operations that do not depend on who is selected."""
        h = x.expand(self.head.weight.shape[0], -1, -1)
        for layer in self.layers:
            weight, bias = layer.effective()
            z = torch.baddbmm(bias[:, None], h, weight.transpose(1, 2))
            h = z if layer is self.head else self._activate(z)
        return h
