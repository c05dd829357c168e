"""What `sphere_rl.regularize` adds to a gradient, in arithmetic that PyTorch and JAX share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import inf
from numbers import Real
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from sphere_rl.penalty import Array, Scale, check_scale, constant, penalty_gradient, unit_features, weighted_features

SECOND_DERIVATIVE = "regularize: got a second derivative, allowed: first ones: what it adds is no function's gradient"


class Amount(NamedTuple):
    """How much of the penalty's gradient is added: a share ``rho`` of the incoming norm, or ``strength`` times."""

    rho: float | None
    strength: float | None
    scale: Scale


def amount(rho: float | int | None, strength: float | int | None, scale: Scale) -> Amount:
    """``rho`` is 0.1 unless ``strength`` is given. Raises ValueError for both, a bad number or another scale."""
    if rho is not None and strength is not None:
        raise ValueError(f"strength: got {strength!r} beside rho {rho!r}, allowed: one of the two")
    check_scale(scale)
    if strength is not None:
        return Amount(None, _not_negative("strength", strength), scale)
    return Amount(_not_negative("rho", 0.1 if rho is None else rho), None, scale)


def _not_negative(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < inf:
        raise ValueError(f"{name}: got {value!r}, allowed: a finite number ≥ 0")
    return float(value)


def gradients_of(options: Amount, *arrays: Array) -> tuple[Array, ...]:
    """∇L of one array Φ [N, m], or of features [N, E, H] and gates [N, E], in float32 at least."""
    arrays = widened(arrays)
    if len(arrays) == 1:
        return (feature_gradient(options, arrays[0]),)
    features, gates = arrays
    xp = array_namespace(features, gates)
    found = xp.reshape(feature_gradient(options, weighted_features(features, gates)), features.shape)
    return found * gates[:, :, None], xp.sum(found * features, axis=2)


def feature_gradient(options: Amount, phi: Array) -> Array:
    """∇_Φ L [N, m] in float32 at least.

    For a share of the norm only its direction counts, which is that of Φ over its largest entry: no size of features
    over- or underflows.
    """
    (phi,) = widened((phi,))
    return penalty_gradient(phi if options.rho is None else unit_features(phi), options.scale)


def with_share(options: Amount, incoming: Sequence[Array], gradients: Sequence[Array]) -> tuple[Array, ...]:
    """Each of ``incoming``, in its dtype, plus its part of `share`."""
    xp = array_namespace(*incoming)
    added = share(options, incoming, gradients)
    return tuple(xp.astype(g + a, g.dtype) for g, a in zip(incoming, added, strict=True))


def share(options: Amount, incoming: Sequence[Array], gradients: Sequence[Array]) -> tuple[Array, ...]:
    """What ``options`` add to ``incoming`` of ``gradients``, those of the penalty, in float32 at least."""
    gradients = widened(gradients)
    if options.rho is None:
        return tuple(options.strength * gradient for gradient in gradients)
    length, _, norm = _direction(widened(incoming))
    _, units, own = _direction(gradients)
    return tuple(options.rho * (length * norm) * (unit / own) for unit in units)


def widened(arrays: Sequence[Array]) -> tuple[Array, ...]:
    """The arrays in the widest of their dtypes and float32."""
    xp = array_namespace(*arrays)
    dtype = reduce(xp.result_type, (array.dtype for array in arrays), xp.float32)
    return tuple(xp.astype(array, dtype) for array in arrays)


def _direction(arrays: Sequence[Array]) -> tuple[Array, list[Array], Array]:
    """Largest entry a, the arrays over a, and the norm of those: that of the arrays is their product.

    Of zeros: 0, zeros and 1, so nothing over- or underflows or is divided by zero.
    """
    xp = array_namespace(*arrays)
    largest = constant(reduce(xp.maximum, (xp.max(xp.abs(array)) for array in arrays)))
    zero = xp.astype(largest == 0, largest.dtype)
    units = [array / (largest + zero) for array in arrays]
    return largest, units, xp.sqrt(sum((xp.sum(unit * unit) for unit in units), start=zero))
