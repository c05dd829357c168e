"""The Jacobian ∂f/∂θ of a network of linear layers, kept as factors: each layer's inputs and back-propagated signals.

Rows of a layer belong to states; expert layers see a state once for each expert that the router selected. The
per-sample gradient of a weight is δ aᵀ and is never formed: blocks of K = J Jᵀ and products with it come from a and δ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sphere_rl.experts.layers import GroupedLinear
from sphere_rl.experts.routing import Routing, single_routing
from sphere_rl.kernels.precision import at_least_float32

Layer = nn.Linear | GroupedLinear

Observations = Any
"""What a policy takes as its one argument: a tensor of N states [N, …], or several in a dict, tuple or list."""


@dataclass(frozen=True)
class SpectralNorm:
    """What a weight divided by σ = uᵀWv adds: ∂f_c/∂W = (δ^c aᵀ − s^c u vᵀ)/σ with s^c = ⟨δ^c aᵀ, W/σ⟩."""

    sigma: Float[Tensor, ""]
    u: Float[Tensor, "out"]
    v: Float[Tensor, "in"]
    s: Float[Tensor, "R A"]


@dataclass(frozen=True)
class Factor:
    """One weight matrix [out, in] and its bias, as R rows of the batch see them.

    inputs: a. signals: δ, one for each of A outputs. sample: the state of each row. weight_scale, bias_scale: 1 if the
    tensor is trainable, else 0.
    """

    layer: str
    expert: int
    inputs: Float[Tensor, "R in"]
    signals: Float[Tensor, "R A out"]
    sample: Int[Tensor, "R"]
    weight_scale: float
    bias_scale: float
    norm: SpectralNorm | None = None

    def kernel(self, outputs: str) -> Float[Tensor, "n n"]:
        """This block of K among its own rows: [R·A, R·A] for "full", [R, R] summed over outputs for "sum"."""
        rows, actions, _ = self.signals.shape
        repeat = actions if outputs == "full" else 1
        signals = self.signals.reshape(rows * repeat, -1)
        scale = self.weight_scale / (1.0 if self.norm is None else self.norm.sigma.square())
        gram = (self.inputs @ self.inputs.T) * scale + self.bias_scale
        kernel = signals @ signals.T
        kernel.view(rows, repeat, rows, repeat).mul_(gram[:, None, :, None])
        if self.norm is not None:
            s = self.norm.s.reshape(rows * repeat, -1)
            t = (self.signals @ self.norm.u * (self.inputs @ self.norm.v)[:, None]).reshape(rows * repeat, -1)
            square = self.norm.u.square().sum() * self.norm.v.square().sum()
            kernel += scale * (square * s @ s.T - s @ t.T - t @ s.T)
        return kernel

    def gradient(self, vector: Float[Tensor, "N A"]) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out"]]:
        """Jᵀv for this weight and bias: what autograd accumulates for the loss v·f."""
        mine = vector[self.sample]
        mixed = (mine[:, None] @ self.signals)[:, 0]
        weight = mixed.T @ self.inputs
        if self.norm is not None:
            weight = (weight - (self.norm.s * mine).sum() * torch.outer(self.norm.u, self.norm.v)) / self.norm.sigma
        return self.weight_scale * weight, self.bias_scale * mixed.sum(0)

    def product(self, vectors: Float[Tensor, "R k A"]) -> Float[Tensor, "R k A"]:
        """This block of K times k vectors, among its own rows."""
        mixed = vectors @ self.signals
        left = self.weight_scale * self.inputs
        moved = torch.linalg.multi_dot((left, self.inputs.T, mixed.flatten(1))).view(mixed.shape)  # the cheaper order
        bias = self.bias_scale * mixed.sum(0)
        if self.norm is None:
            return moved.add_(bias) @ self.signals.mT
        u, v, s = self.norm.u, self.norm.v, self.norm.s
        scale = self.weight_scale / self.norm.sigma.square()
        pulled, along = torch.einsum("ra,rka->k", s, vectors), self.inputs @ v
        moved = moved / self.norm.sigma.square() - scale * along[:, None, None] * pulled[:, None] * u
        twice = scale * (along @ (mixed @ u) - pulled * u.square().sum() * v.square().sum())
        return (moved + bias) @ self.signals.mT - s[:, None, :] * twice[:, None]


@dataclass(frozen=True)
class Factors:
    """All factors of one network on one batch of N states with A outputs."""

    blocks: tuple[Factor, ...]
    samples: int
    actions: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        """N·A, the size of the full kernel."""
        return self.samples * self.actions

    def kernel(self, outputs: str, blocks: Sequence[Factor] | None = None) -> Float[Tensor, "n n"]:
        """K, or the part of it that comes from some of its blocks."""
        repeat = self.actions if outputs == "full" else 1
        size = self.samples * repeat
        kernel = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        states, outputs_of = (torch.arange(n, device=self.device) for n in (self.samples, repeat))
        for members in _by_states(self.blocks if blocks is None else blocks):
            part, sample = members[0].kernel(outputs), members[0].sample
            for block in members[1:]:
                part += block.kernel(outputs)
            if torch.equal(sample, states):
                kernel += part
            elif len(part):
                index = (sample[:, None] * repeat + outputs_of).flatten()
                kernel.index_put_((index[:, None], index[None, :]), part, accumulate=True)
        return kernel

    def product(self, vectors: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """K V without K, for V [N·A, k]."""
        shaped = vectors.view(self.samples, self.actions, -1).mT.contiguous()
        out = torch.zeros_like(shaped)
        for block in self.blocks:
            out.index_add_(0, block.sample, block.product(shaped[block.sample]))
        return out.mT.reshape(vectors.shape)


def _by_states(blocks: Iterable[Factor]) -> Iterable[list[Factor]]:
    """Blocks whose rows are the same states, together: an expert's layers go into K at once."""
    groups: dict[tuple[int, ...], list[Factor]] = {}
    for block in blocks:
        groups.setdefault(tuple(block.sample.tolist()), []).append(block)
    return groups.values()


class _Call(NamedTuple):
    """One application of a layer in a forward pass; u and v as they were then."""

    inputs: Tensor
    output: Tensor
    routing: Routing
    u: Tensor | None
    v: Tensor | None


def states_in(observations: Observations) -> int:
    """N. Raises ValueError where it is not one number: no tensors, or several of other lengths."""
    leaves = tree_leaves(observations)
    rows = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else type(leaf).__name__ for leaf in leaves}
    if len(rows) != 1 or not isinstance(samples := next(iter(rows)), int):
        got = f"{type(observations).__name__} of {', '.join(sorted(map(str, rows))) or 'nothing'}"
        raise ValueError(f"observations: got {got}, allowed: a tensor [N, …], or several in a dict, tuple or list")
    return samples


def factorise(policy: nn.Module, observations: Observations) -> Factors | None:
    """Run ``policy`` once forward and once backward for each output, and return its Jacobian's factors.

    None if the network has trainable tensors outside `nn.Linear` and `GroupedLinear` that f depends on, or if its rows
    depend on one another: Jᵀv from the factors is held against autograd for a random v before they are believed.
    Raises ValueError when f is not [N, A] or nothing in it is trainable.
    """
    samples = states_in(observations)
    trainable = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    layers: dict[str, Layer] = {name: m for name, m in policy.named_modules() if isinstance(m, Layer)}
    if not trainable:
        raise ValueError("policy: got no trainable tensor, allowed: at least one with requires_grad")
    with _recorded(layers) as calls, torch.enable_grad():
        out = policy(observations)
    if not isinstance(out, Tensor):
        raise ValueError(
            f"policy: got a {type(out).__name__} as output, allowed: one tensor [{samples}, A], the mean "
            "action or logits; wrap the policy in a module whose forward returns that"
        )
    if out.ndim != 2 or len(out) != samples:
        raise ValueError(f"policy: got outputs of shape {tuple(out.shape)}, allowed: [{samples}, A]")
    dtype = at_least_float32(out).dtype
    if not out.requires_grad:
        return Factors((), out.shape[0], out.shape[1], dtype, out.device)
    flat = [call for group in calls.values() for call in group if call.output.requires_grad]
    if not _shapes_fit(flat, samples):
        return None
    signals = _signals(out, flat)
    blocks = []
    for name, group in calls.items():
        pairs = [(call, signals[id(call)]) for call in group if id(call) in signals]
        if pairs:
            blocks.extend(_layer_factors(name, layers[name], pairs))
    factors = Factors(tuple(blocks), out.shape[0], out.shape[1], dtype, out.device)
    digits = min((call.output.dtype for call in flat), default=out.dtype, key=lambda kind: torch.finfo(kind).bits)
    return factors if _explains_gradient(factors, out, layers, trainable, torch.finfo(digits).eps) else None


@contextmanager
def _recorded(layers: Mapping[str, Layer]) -> Iterator[dict[str, list[_Call]]]:
    """Record every call of ``layers`` while the context is open."""
    calls: dict[str, list[_Call]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = dict(zip(("x", "routing"), args, strict=False)) | kwargs
            x = given["x"] if "x" in given else given["input"]
            routing = given["routing"] if "routing" in given else single_routing(len(x))
            u = v = None
            if isinstance(module, GroupedLinear) and module.spectral_norm:
                u, v = module.u.clone(), module.v.clone()
            calls[name].append(_Call(x.detach(), output, routing, u, v))
            return output.clone()  # so that an in-place activation does not change what was recorded

        return record

    handles = [m.register_forward_hook(recorder(name), with_kwargs=True) for name, m in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _shapes_fit(calls: Iterable[_Call], samples: int) -> bool:
    return all(c.inputs.ndim == 2 and c.routing.weights.shape[0] == samples for c in calls)


def _signals(out: Float[Tensor, "N A"], calls: Sequence[_Call]) -> dict[int, Float[Tensor, "R A out"]]:
    """δ of every call by its id: rows are independent, so a batch-summed output gives each row its own signal."""
    if not calls:
        return {}
    per_output = [
        torch.autograd.grad(column.sum(), [c.output for c in calls], retain_graph=True, materialize_grads=True)
        for column in out.unbind(1)
    ]
    return {
        id(call): torch.stack(grads, dim=1) for call, grads in zip(calls, zip(*per_output, strict=True), strict=True)
    }


def _layer_factors(name: str, layer: Layer, pairs: Sequence[tuple[_Call, Tensor]]) -> Iterator[Factor]:
    """One factor for each expert of a layer that saw rows; several calls of the layer are stacked."""
    weight, bias = layer.weight, layer.bias
    grouped = isinstance(layer, GroupedLinear)
    for expert in range(weight.shape[0] if grouped else 1):
        parts = []
        for call, signals in pairs:
            start = sum(call.routing.counts[:expert])
            rows = slice(start, start + call.routing.counts[expert])
            norm = _spectral(layer, expert, call, signals, rows) if isinstance(layer, GroupedLinear) else None
            parts.append((call.inputs[rows], signals[rows], call.routing.sample[rows], norm))
        if not sum(len(part[0]) for part in parts):
            continue
        yield Factor(
            layer=name,
            expert=expert,
            inputs=at_least_float32(torch.cat([p[0] for p in parts])),
            signals=at_least_float32(torch.cat([p[1] for p in parts])),
            sample=torch.cat([p[2] for p in parts]),
            weight_scale=float(weight.requires_grad),
            bias_scale=float(bias is not None and bias.requires_grad),
            norm=_joined([p[3] for p in parts]),
        )


def _spectral(layer: GroupedLinear, expert: int, call: _Call, signals: Tensor, rows: slice) -> SpectralNorm | None:
    if call.u is None or call.v is None:
        return None
    with torch.no_grad():
        u, v, weight = call.u[expert], call.v[expert], layer.weight[expert]
        s = torch.einsum("rao,ro->ra", signals[rows], call.output[rows] - layer.bias[expert])
        return SpectralNorm(u @ weight @ v, u, v, s)


def _joined(norms: Sequence[SpectralNorm | None]) -> SpectralNorm | None:
    """The norm of stacked calls, which share σ, u and v unless a power iteration ran between them."""
    first = norms[0]
    if first is None:
        return None
    return SpectralNorm(first.sigma, first.u, first.v, torch.cat([n.s for n in norms if n is not None]))


def _explains_gradient(
    factors: Factors,
    out: Float[Tensor, "N A"],
    layers: Mapping[str, Layer],
    trainable: Mapping[str, Tensor],
    eps: float,
) -> bool:
    """Whether Jᵀv from the factors is autograd's for a random v, tensor by tensor; false for shared tensors.

    For a tensor it is if the difference is below √eps of its part of Jᵀv, or round-off of the whole: what cancels in a
    tensor (the shift of a softmax) is no more than that. A tensor that is left out is a difference of its whole part.
    """
    v = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype, device="cpu")
    v = v.to(out.device)
    found = torch.autograd.grad(out, list(trainable.values()), v, allow_unused=True, materialize_grads=True)
    expected = {id(p): torch.zeros_like(p) for p in trainable.values()}
    if len(set(_owned(layers.values()))) < len(_owned(layers.values())):
        return False
    for block in factors.blocks:
        layer = layers[block.layer]
        for tensor, change in zip((layer.weight, layer.bias), block.gradient(v.to(factors.dtype)), strict=True):
            if id(tensor) in expected:  # not so for a weight that is computed from another tensor
                target = expected[id(tensor)]
                (target[block.expert] if isinstance(layer, GroupedLinear) else target).add_(change)
    sizes = [float(g.double().square().sum()) for g in found]
    return all(
        float((g.double() - e).square().sum()) <= eps * size + (4 * eps) ** 2 * sum(sizes)
        for g, e, size in zip(found, expected.values(), sizes, strict=True)
    )


def _owned(layers: Iterable[Layer]) -> list[int]:
    return [id(p) for layer in layers for p in layer.parameters(recurse=False)]
