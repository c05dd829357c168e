"""`sphere_rl.regularize` of JAX arrays: an operation with a derivative of its own."""

from __future__ import annotations

import jax

from sphere_rl.integrations.gradient_share import SECOND_DERIVATIVE, Amount, gradients_of, with_share
from sphere_rl.penalty import Array

Arrays = tuple[Array, ...]


def _identity(options: Amount, arrays: Arrays) -> Arrays:
    """The arrays; in the backward pass `with_share`."""
    return arrays


def _forward(options: Amount, arrays: Arrays) -> tuple[Arrays, Arrays]:
    return arrays, arrays


def _backward(options: Amount, arrays: Arrays, incoming: Arrays) -> tuple[Arrays]:
    return (_once(with_share(options, incoming, gradients_of(options, *arrays))),)


identity = jax.custom_vjp(_identity, nondiff_argnums=(0,))
identity.defvjp(_forward, _backward)


def _refuse(_: None, incoming: Arrays) -> tuple[Arrays]:
    raise NotImplementedError(SECOND_DERIVATIVE)


_once = jax.custom_vjp(lambda arrays: arrays)  # gradients that must not be differentiated again
_once.defvjp(lambda arrays: (arrays, None), _refuse)
