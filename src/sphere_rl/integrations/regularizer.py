"""SPHERE in the backward pass alone: an identity that adds the penalty's gradient to the gradient that comes back.

    features, gates = sp.regularize(features, gates)     # the loss and its trainer stay as they are

PyTorch's operation is in `torch_regularizer`, JAX's in `jax_regularizer`; what both compute is in `share`.
"""

from __future__ import annotations

from typing import overload

from array_api_compat import is_jax_array, is_torch_array

from sphere_rl.integrations.gradient_share import Amount, amount
from sphere_rl.penalty import Array, Scale, check_array, check_routed


@overload
def regularize(
    features: Array, gates: None = None, *, rho: float | None = None, strength: float | None = None, scale: Scale = ...
) -> Array: ...
@overload
def regularize(
    features: Array, gates: Array, *, rho: float | None = None, strength: float | None = None, scale: Scale = ...
) -> tuple[Array, Array]: ...
def regularize(
    features: Array,
    gates: Array | None = None,
    *,
    rho: float | None = None,
    strength: float | None = None,
    scale: Scale = "free",
) -> Array | tuple[Array, Array]:
    """Return what went in, and in the backward pass add the penalty's gradient to the gradient of what went in.

    ``regularize(features, gates)`` takes features [N, E, H] and routing weights [N, E] and returns both;
    ``regularize(phi)`` one array [N, m] of weighted or dense features. With L = sphere_penalty(Φ, scale), Φ the
    ``weighted_features`` or phi, x all that went in as one vector and g = ∂loss/∂x what comes back to it:

        g  ←  g + rho · ‖g‖ / ‖∇_x L‖ · ∇_x L        rho: a share of the norm, 0.1 by default
        g  ←  g + strength · ∇_x L                   as if strength · L were part of the loss

    Nothing is added where ∇_x L is zero (no features, or an even spectrum), nor with ``rho`` where g is. The share is
    of the gradient at x, not of the one over all parameters: this rho is not the number of ``--sphere.mode grad``.
    With ``rho`` a loss that is scaled (mixed precision, gradient accumulation) scales what is added, with ``strength``
    it does not; 0 of either adds nothing. Each call sees its own batch: a replica its part, a slice of vmap its rows.

    PyTorch (autograd, torch.func's grad, vjp and vmap, torch.compile, autocast, checkpoints) and JAX (jit, grad, vmap,
    scan) do as usual, but for second derivatives and forward mode: both refuse them. `sphere_rl.entk` of a module with
    this in it is that of the module without; of a JAX function take the one with ``rho=0``. The dtypes stay; what is
    added is computed in float32 at least. Raises ValueError on wrong axes, integer or NumPy input, arrays of two
    libraries, a negative or not finite ``rho`` or ``strength``, both of them, or another scale.
    """
    options = amount(rho, strength, scale)
    if gates is None:
        (phi,) = _identity({"features": features}, options)
        return phi
    features, gates = _identity({"features": features, "gates": gates}, options)
    return features, gates


def _identity(arrays: dict[str, Array], options: Amount) -> tuple[Array, ...]:
    tensors = tuple(arrays.values())
    if all(map(is_torch_array, tensors)):
        from sphere_rl.integrations.torch_regularizer import identity
    elif all(map(is_jax_array, tensors)):
        from sphere_rl.integrations.jax_regularizer import identity
    else:
        kinds = ", ".join(f"{type(array).__module__}.{type(array).__name__}" for array in tensors)
        raise ValueError(f"{', '.join(arrays)}: got {kinds}, allowed: arrays that have gradients, PyTorch or JAX")
    if "gates" in arrays:
        check_routed(arrays["features"], arrays["gates"])
    else:
        check_array("features", arrays["features"], "N m")
    return tensors if 0 in (options.rho, options.strength) else identity(options, tensors)
