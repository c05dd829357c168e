"""The empirical neural tangent kernel K = J Jᵀ, J = ∂f/∂θ, of a policy's outputs on a batch of states.

Exact and cheap by structure. A linear layer with input a_i and back-propagated signal δ_i^c = ∂f_c(x_i)/∂z_i has the
per-sample gradient δ_i^c a_iᵀ, so its block of K is (a_i·a_j + 1)(δ_i^c·δ_j^d), the 1 for the bias. K is the sum over
layers, and over the experts that two samples share; no per-sample Jacobian is ever formed. For modules with other
trainable tensors K comes from Jacobian products of `torch.func`, a bounded number of columns at a time.

f is what ``policy(observations)`` returns, [N, A]; rows of K are (state, output) pairs in that order. The policy's
mode is respected and nothing of it is changed: gradients, buffers, hooks and the global random state stay as they are.
What is lower than float32, by its dtype or under autocast, is computed in float32: in fewer digits K is not positive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from sphere_rl.kernels.precision import at_least_float32
from sphere_rl.measuring import as_measured
from sphere_rl.spectrum.jacobian import Factor, Factors, Observations, factorise
from sphere_rl.spectrum.ranks import RankEstimate, estimate_effective_rank, kernel_rank

Outputs = Literal["full", "sum"]
KERNEL_ROWS = 256 * 19
"""Rows of K at most where training measures it, those of 256 states of H1: its eigenvalues take 200 MB and seconds."""
CHUNK_BYTES = 2**28
"""Memory that the Jacobian columns of one chunk may take when a module has no structure to use."""


def entk(policy: nn.Module, observations: Observations, outputs: Outputs = "full") -> Float[Tensor, "n n"]:
    """Return the exact eNTK of ``policy`` on ``observations``, in the policy's dtype or float32 if that is lower.

    ``observations``: a tensor of N states [N, …], or several in a dict, tuple or list, as the policy's one argument.
    ``outputs`` "full": [N·A, N·A], rows (state, output); "sum": [N, N], the sum over output coordinates of their
    kernels (the trace kernel). Every trainable tensor that f depends on takes part, gate included; K is 0 where there
    is none. Raises ValueError when f is not [N, A], nothing is trainable or the policy is no module. f is the policy in
    the mode that it is in: with BatchNorm or Dropout, call ``policy.eval()`` first for the kernel of the policy as it
    acts. Source: Jacot et al. 2018; definition as in Luo et al. 2026.
    """
    _check_outputs(outputs)
    with _measured(policy, observations) as observations:
        factors = _factors(policy, observations)
        if factors is not None:
            return factors.kernel(outputs)
        return _kernel_by_products(policy, observations, outputs)


def kernel_states(states: int, outputs: int, rows: int | None = None) -> Int[Tensor, "n"]:
    """Which of N ``states`` a K of at most ``rows`` rows is of: all, or an even spread of rows // A of them, 1 or more.

    The cost of K's eigenvalues grows with the cube of N·A. r_e(K) of fewer states is another, smaller number.
    """
    count = states if rows is None else max(1, min(states, rows // outputs))
    return torch.from_numpy(np.linspace(0, states - 1, count).round().astype(np.int64))


def estimate_entk_rank(policy: nn.Module, observations: Observations, *, seed: int = 0, **options: Any) -> RankEstimate:
    """Estimate r_e(K) of the full K without forming it: for batches whose N·A × N·A kernel does not fit.

    Options (probes, deflated, steps) and source: `sphere_rl.spectrum.ranks.estimate_effective_rank`.
    """
    with _measured(policy, observations) as observations:
        factors = _factors(policy, observations)
        if factors is not None:
            product, size, like = factors.product, factors.rows, factors
        else:
            product, like = _jacobian_product(policy, observations)
            size = like.numel()
        options |= {"generator": torch.Generator().manual_seed(seed), "dtype": like.dtype, "device": like.device}
        return estimate_effective_rank(product, size, **options)


@dataclass(frozen=True)
class BlockShare:
    """One block of K: the gate, a layer (all its experts) or an expert (all its layers).

    Gate and layers add to 1, and so do gate and experts.

    Attributes:
        kind: which of the three.
        name: ``gate``, the layer's name, or the expert's number.
        share: tr K_b / tr K, in [0, 1].
        effective_rank: r_e(K_b).
    """

    kind: Literal["gate", "layer", "expert"]
    name: str
    share: float
    effective_rank: float


def block_view(policy: nn.Module, observations: Observations, outputs: Outputs = "full") -> tuple[BlockShare, ...]:
    """Return the share of tr K and the r_e of the gate, of each expert layer and of each expert.

    From the same factors as `entk`; experts that saw no state are left out. Raises ValueError for a module
    without that structure.
    """
    _check_outputs(outputs)
    with _measured(policy, observations) as observations:
        factors = factorise(policy, observations)
        if factors is None:
            raise ValueError(
                f"policy: {type(policy).__name__} has no block structure, allowed: linear and expert layers only"
            )
        groups: dict[tuple[str, str], list[Factor]] = {}
        for factor in factors.blocks:
            if "gate" in factor.layer.split("."):
                groups.setdefault(("gate", "gate"), []).append(factor)
            else:
                groups.setdefault(("layer", factor.layer), []).append(factor)
                groups.setdefault(("expert", str(factor.expert)), []).append(factor)
        kernels = {key: factors.kernel(outputs, members) for key, members in groups.items()}
    total = sum(float(kernel.trace()) for (kind, _), kernel in kernels.items() if kind != "expert")
    return tuple(
        BlockShare(
            kind=kind,
            name=name,
            share=float(kernel.trace()) / total if total else 0.0,
            effective_rank=kernel_rank(kernel),
        )
        for kind in ("gate", "layer", "expert")
        for (of, name), kernel in kernels.items()
        if of == kind
    )


def entk_jax(
    apply: Callable[[Any, Any], Any], params: Any, observations: Any, outputs: Outputs = "full", chunk: int = 64
) -> Any:
    """Return the exact eNTK of a JAX function ``apply(params, observations) -> [N, A]`` as a JAX array.

    ``params``: any pytree of floating arrays, all of it trainable. ``chunk`` columns of K are formed at a time, each
    with one tangent of the size of ``params``. Rows and ``outputs`` as in `entk`, and so is the precision: ``params``
    and observations lower than float32 are passed to ``apply`` in float32. Raises ValueError where ``params`` hold
    other arrays, ``apply`` does not return [N, A] or has `sphere_rl.regularize` in it.
    """
    import jax
    import jax.numpy as jnp

    _check_outputs(outputs)
    kinds = {str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)}
    if odd := sorted(kind for kind in kinds if not jnp.issubdtype(kind, jnp.floating)):
        raise ValueError(f"params: got arrays of {', '.join(odd)}, allowed: floating ones, all trainable")
    params, observations = jax.tree.map(_jax_float32, (params, observations))
    shape = jax.eval_shape(lambda p: apply(p, observations), params).shape
    if len(shape) != 2:
        raise ValueError(f"apply: got outputs of shape {shape}, allowed: [N, A]")
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs keep fewer digits unless they are told
        out, pull = jax.vjp(lambda p: apply(p, observations), params)
        push = jax.linear_transpose(pull, out)  # no forward mode, which operations with a custom_vjp have not
        samples, actions = out.shape

        def column(cotangent: Any) -> Any:
            return push(pull(cotangent))[0]

        units = jnp.eye(samples * actions, dtype=out.dtype).reshape(-1, samples, actions)
        try:
            kernel = jax.lax.map(column, units, batch_size=chunk).reshape(samples, actions, samples, actions)
        except NotImplementedError as error:
            what = "has a gradient that is not linear in what comes back (sp.regularize)"
            raise ValueError(f"apply: {what}, allowed: the function without it, rho=0 for sp.regularize") from error
    if outputs == "sum":
        return jnp.einsum("icjc->ij", kernel)
    return kernel.reshape(samples * actions, samples * actions)


def _jax_float32(leaf: Any) -> Any:
    """The array, of whichever library, or in float32 where it is a floating one with fewer digits."""
    import jax.numpy as jnp

    array = jnp.asarray(leaf)
    low = jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if low else leaf


@contextmanager
def _measured(policy: nn.Module, observations: Observations) -> Iterator[Observations]:
    """The observations, fit for gradients, while the policy is `untouched` and all is in float32 at least."""
    if not isinstance(policy, nn.Module):
        raise ValueError(f"policy: got {type(policy).__name__}, allowed: a torch.nn.Module")
    devices = {
        tensor.device.type
        for tensor in tree_leaves((list(policy.parameters()), observations))
        if isinstance(tensor, Tensor)
    }
    with ExitStack() as open_:
        for device in devices:
            open_.enter_context(torch.autocast(device, enabled=False))
        open_.enter_context(untouched(policy))
        open_.enter_context(_widened(policy))
        open_.enter_context(as_measured())
        yield tree_map(_fit, observations)


def _fit(one: Any) -> Any:
    if not isinstance(one, Tensor):
        return one
    return at_least_float32(one.clone() if one.is_inference() else one)


@contextmanager
def _widened(policy: nn.Module) -> Iterator[None]:
    """Parameters and buffers that are lower than float32 are in float32, and then what they were."""
    before = [(tensor, tensor.data) for tensor in (*policy.parameters(), *policy.buffers())]
    lower = [(tensor, data) for tensor, data in before if at_least_float32(data) is not data]
    try:
        for tensor, data in lower:
            tensor.data = at_least_float32(data)
        yield
    finally:
        for tensor, data in lower:
            tensor.data = data


@contextmanager
def untouched(policy: nn.Module) -> Iterator[None]:
    """Put back every buffer that a forward pass changes (power iterations, running statistics), bit for bit.

    The global random state, too (dropout draws from it). Gradients can be taken in it, wherever it stands.

    Normalisation over the batch computes with the batch's statistics as in training, and does not record them: to
    `torch.func` a recording would be an effect.
    """
    recording = [m for m in policy.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    saved = [(buffer, buffer.detach().clone()) for buffer in policy.buffers()]
    devices = {p.device.index or 0 for p in policy.parameters() if p.device.type == "cuda"}
    try:
        for norm in recording:
            norm.track_running_stats = False
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for norm in recording:
            norm.track_running_stats = True
        with torch.no_grad():
            for buffer, value in saved:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _factors(policy: nn.Module, observations: Observations) -> Factors | None:
    """`factorise`, and buffers and random state as before it: where there are none another way starts from them."""
    with untouched(policy):
        return factorise(policy, observations)


def _kernel_by_products(policy: nn.Module, observations: Observations, outputs: Outputs) -> Float[Tensor, "n n"]:
    """K column by column as J(Jᵀ e): exact for any module, batch coupling included."""
    product, out = _jacobian_product(policy, observations)
    (samples, actions), size = out.shape, out.numel()
    chunk = _columns_per_chunk(policy, size)
    kernel = out.new_zeros(size, size) if outputs == "full" else out.new_zeros(samples, samples)
    for start in range(0, size, chunk):
        index = torch.arange(start, min(start + chunk, size), device=out.device)
        columns = product(out.new_zeros(size, len(index)).index_put_((index, index - start), out.new_ones(())))
        if outputs == "full":
            kernel[:, index] = columns
        else:
            same_output = columns.view(samples, actions, -1)[:, index % actions, index - start]
            kernel.index_add_(1, index // actions, same_output)
    return kernel


def _jacobian_product(
    policy: nn.Module, observations: Observations
) -> tuple[Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]], Float[Tensor, "N A"]]:
    """V ↦ J(Jᵀ V), n = N·A, and the outputs; row by row where `torch.func` does not take the policy."""
    try:
        with untouched(policy):
            product, out = _functional_product(policy, observations)
            product(out.new_zeros(out.numel(), 1))
    except RuntimeError:  # checkpoints, autograd functions of the old kind, backward passes without vmap
        return _plain_product(policy, observations)
    return _functional_product(policy, observations)


def _plain_product(
    policy: nn.Module, observations: Observations
) -> tuple[Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]], Float[Tensor, "N A"]]:
    """By rows of J from plain backward passes, each taken twice for a product: slow, and for any module."""
    trainable, out = [p for p in policy.parameters() if p.requires_grad], policy(observations)
    flat, chunk = out.flatten(), _columns_per_chunk(policy, out.numel())

    def rows() -> Iterator[tuple[slice, Float[Tensor, "c P"]]]:
        for start in range(0, len(flat), chunk):
            part = flat[start : start + chunk]
            found = [torch.autograd.grad(one, trainable, retain_graph=True, materialize_grads=True) for one in part]
            yield slice(start, start + len(part)), torch.stack([torch.cat([g.flatten() for g in row]) for row in found])

    def product(vectors: Tensor) -> Tensor:
        pulled = sum(jacobian.T @ vectors[where] for where, jacobian in rows())
        return torch.cat([jacobian @ pulled for _, jacobian in rows()])

    return product, out.detach()


def _functional_product(
    policy: nn.Module, observations: Observations
) -> tuple[Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]], Float[Tensor, "N A"]]:
    """By two reverse passes for every column.

    J u is the derivative of v ↦ Jᵀ v along u, so the forward pass is traced once and no forward-mode rules are needed.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    params = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}

    def outputs_of(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(policy, values, (observations,))

    with sdpa_kernel(SDPBackend.MATH):  # of the ways to compute attention the one with second derivatives
        out, pull, *_ = torch.func.vjp(outputs_of, params)
    _, push, *_ = torch.func.vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(out))

    def product(vectors: Tensor) -> Tensor:
        pieces = []
        for part in vectors.split(_columns_per_chunk(policy, out.numel()), dim=1):
            (tangents,) = torch.func.vmap(pull)(part.T.reshape(-1, *out.shape))
            (images,) = torch.func.vmap(push)(tangents)
            pieces.append(images.detach().flatten(1).T)
        return torch.cat(pieces, dim=1)

    return product, out.detach()


def _columns_per_chunk(policy: nn.Module, size: int) -> int:
    column = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    return min(size, max(1, CHUNK_BYTES // max(1, column)))


def _check_outputs(outputs: str) -> None:
    if outputs not in ("full", "sum"):
        raise ValueError(f'outputs: got {outputs!r}, allowed: "full" or "sum"')
