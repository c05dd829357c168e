"""SPHERE: a penalty on the spread of a feature Gram's spectrum (Luo et al., ICML 2026, arXiv 2605.04712).

Every function takes NumPy, PyTorch or JAX arrays of one floating dtype and returns an array of the same kind:
it differentiates under ``torch.autograd``, ``torch.func`` and ``jax.grad`` and compiles under ``jax.jit``.

    loss = ppo_loss + strength * sphere_penalty(weighted_features(features, gates))
"""

from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace, device
from jaxtyping import Float

Array = Any  # NumPy, PyTorch or JAX: the shape strings below are checked for all three


def weighted_features(features: Float[Array, "N E H"], gates: Float[Array, "N E"]) -> Float[Array, "N E*H"]:
    """Return φ(x) = [g_1 h_1 ‖ … ‖ g_E h_E], each expert's features scaled by its routing weight.

    ``features`` [N, E, H] are the experts' hidden activations, ``gates`` [N, E] the routing weights after
    top-k (zero for experts that were not selected). Raises ValueError on wrong axes or integer input.
    """
    _check_routed(features, gates)
    samples, experts, width = features.shape
    return (features * gates[:, :, None]).reshape((samples, experts * width))


def sphere_penalty(phi: Float[Array, "N m"]) -> Float[Array, ""]:
    """Return ‖A − (tr A / m) I‖_F² for A = ΦᵀΦ / N: zero when the eigenvalues of A are equal.

    ``phi`` [N, m] holds one sample a row. When N < m the N×N Gram takes the place of A; m stays the number of
    columns. For the gradient-factor variant pass δ [N·C, m], one row for each (sample, output) pair. Raises
    ValueError on wrong axes or integer input. Source: Luo et al. 2026, the loss L_SPHERE.
    """
    _check("phi", phi, "N m")
    return _spread(phi)


def layers_penalty(phis: Sequence[Float[Array, "N _"]]) -> Float[Array, ""]:
    """Return Σ_l sphere_penalty(Φ_l), the variant over several layers. Raises ValueError for no layer."""
    if not phis:
        raise ValueError("phis: got no layer, allowed: at least one array [N, m]")
    total = sphere_penalty(phis[0])
    for phi in phis[1:]:
        total = total + sphere_penalty(phi)
    return total


def per_expert_penalty(features: Float[Array, "N E H"], gates: Float[Array, "N E"]) -> Float[Array, ""]:
    """Return Σ_e ‖A_e − (tr A_e / H) I‖_F², A_e the Gram of g_e h_e: no cross-expert terms.

    Arguments as in ``weighted_features``. Raises ValueError on wrong axes or integer input.
    """
    _check_routed(features, gates)
    xp = array_namespace(features, gates)
    return xp.sum(_spread(xp.permute_dims(features * gates[:, :, None], (1, 0, 2))))


def gate_penalty(gates: Float[Array, "N E"]) -> Float[Array, ""]:
    """Return (‖GᵀG/N‖_F² − tr(GᵀG/N)²/E) / E, G [N, E] the routing weights.

    It is zero when experts are used evenly and never together.
    Raises ValueError on wrong axes or integer input.
    """
    _check("gates", gates, "N E")
    return _spread(gates) / gates.shape[1]


def _spread(phi: Float[Array, "*b N m"]) -> Float[Array, "*b"]:
    """Penalty of each [N, m] matrix of a stack, from the smaller Gram.

    With n = min(N, m) and c = tr/m the other m − n eigenvalues are zero, so the penalty is
    ‖Gram − c I_n‖² + (m − n) c²: a sum of squares, free of the cancellation in ‖A‖² − tr²/m when the spectrum
    is almost flat.
    """
    xp = array_namespace(phi)
    samples, width = phi.shape[-2:]
    transposed = xp.matrix_transpose(phi)
    gram = (phi @ transposed if samples < width else transposed @ phi) / samples
    size = min(samples, width)
    mean = xp.linalg.trace(gram) / width
    identity = xp.eye(size, dtype=phi.dtype, device=device(phi))
    centred = gram - mean[..., None, None] * identity
    return xp.sum(centred * centred, axis=(-2, -1)) + (width - size) * mean * mean


def _check(name: str, array: Array, axes: str) -> None:
    shape, wanted = tuple(array.shape), axes.split()
    if len(shape) != len(wanted) or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}, allowed: [{', '.join(wanted)}], no axis empty")
    if not array_namespace(array).isdtype(array.dtype, "real floating"):
        raise ValueError(f"{name}: got dtype {array.dtype}, allowed: a real floating dtype")


def _check_routed(features: Array, gates: Array) -> None:
    _check("features", features, "N E H")
    _check("gates", gates, "N E")
    if tuple(features.shape[:2]) != tuple(gates.shape):
        wanted = tuple(features.shape[:2])
        raise ValueError(f"gates: got shape {tuple(gates.shape)}, allowed: {wanted}, the axes N, E of features")
