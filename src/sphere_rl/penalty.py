"""SPHERE: a penalty on the spread of a feature Gram's spectrum (Luo et al., ICML 2026, arXiv 2605.04712).

Every function takes NumPy, PyTorch or JAX arrays of one floating dtype and returns an array of the same kind:
it differentiates under ``torch.autograd``, ``torch.func`` and ``jax.grad`` and compiles under ``jax.jit``. Penalties of
what is lower than float32, by dtype or under ``torch.autocast``, are computed and returned in float32.

    loss = actor_loss + strength * sphere_penalty(weighted_features(features, gates))
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from array_api_compat import array_namespace, device, is_jax_array, is_torch_array
from jaxtyping import Float

Array = Any  # NumPy, PyTorch or JAX: the shape strings below are checked for all three

ROUND_OFF = 64
"""How many units in the last place, beside what cancels, a gradient of the penalty may have and count as zero."""

Scale = Literal["literal", "free"]
"""``literal``: the paper's penalty, of degree 4 in the features. ``free``: that of A/tr A, which their scale leaves
alone: its gradient turns features and never shrinks them.
"""


def weighted_features(features: Float[Array, "N E H"], gates: Float[Array, "N E"]) -> Float[Array, "N E*H"]:
    """Return φ(x) = [g_1 h_1 ‖ … ‖ g_E h_E], each expert's features scaled by its routing weight.

    ``features`` [N, E, H] are the experts' hidden activations, ``gates`` [N, E] the routing weights after
    top-k (zero for experts that were not selected). Raises ValueError on wrong axes or integer input.
    """
    check_routed(features, gates)
    samples, experts, width = features.shape
    return (features * gates[:, :, None]).reshape((samples, experts * width))


def sphere_penalty(phi: Float[Array, "N m"], scale: Scale = "literal") -> Float[Array, ""]:
    """Return ‖A − (tr A / m) I‖_F² for A = ΦᵀΦ / N: zero when the eigenvalues of A are equal.

    ``phi`` [N, m] holds one sample a row. When N < m the N×N Gram takes the place of A; m stays the number of
    columns. For the gradient-factor variant pass δ [N·C, m], one row for each (sample, output) pair. ``scale`` "free"
    is ‖A / tr A − I / m‖_F² = ‖A‖_F² / (tr A)² − 1/m, in [0, 1 − 1/m] and 0 for Φ = 0: equal for Φ and cΦ, so that
    ⟨∇_Φ, Φ⟩ = 0; 1 / (it + 1/m) is the participation ratio of A. Raises ValueError on wrong axes, integer input or
    another scale. Source: Luo et al. 2026, the loss L_SPHERE, which is the literal one.
    """
    check_array("phi", phi, "N m")
    return _spread(phi, scale)


def layers_penalty(phis: Sequence[Float[Array, "N _"]], scale: Scale = "literal") -> Float[Array, ""]:
    """Return Σ_l sphere_penalty(Φ_l, scale), the variant over several layers. Raises ValueError for no layer."""
    if not isinstance(phis, Sequence) or not phis:
        raise ValueError(f"phis: got {type(phis).__name__}, allowed: a list of at least one array [N, m]")
    one_library(phis=phis)
    total = sphere_penalty(phis[0], scale)
    for phi in phis[1:]:
        total = total + sphere_penalty(phi, scale)
    return total


def per_expert_penalty(
    features: Float[Array, "N E H"], gates: Float[Array, "N E"], scale: Scale = "literal"
) -> Float[Array, ""]:
    """Return Σ_e ‖A_e − (tr A_e / H) I‖_F², A_e the Gram of g_e h_e: no cross-expert terms.

    Arguments as in ``weighted_features``. ``scale`` "free": each expert's A_e over its own trace; one whose features
    are all zero adds 0. Raises ValueError on wrong axes, integer input or another scale.
    """
    check_routed(features, gates)
    xp = array_namespace(features, gates)
    return xp.sum(_spread(xp.permute_dims(features * gates[:, :, None], (1, 0, 2)), scale))


def gate_penalty(gates: Float[Array, "N E"], scale: Scale = "literal") -> Float[Array, ""]:
    """Return (‖GᵀG/N‖_F² − tr(GᵀG/N)²/E) / E, G [N, E] the routing weights; ``scale`` as in ``sphere_penalty``.

    It is zero when experts are used evenly and never together.
    Raises ValueError on wrong axes, integer input or another scale.
    """
    check_array("gates", gates, "N E")
    return _spread(gates, scale) / gates.shape[1]


def _spread(phi: Float[Array, "*b N m"], scale: Scale) -> Float[Array, "*b"]:
    """Penalty of each [N, m] matrix of a stack, from the smaller Gram.

    With n = min(N, m) and c = tr/m the other m − n eigenvalues are zero, so the penalty is
    ‖Gram − c I_n‖² + (m − n) c²: a sum of squares, free of the cancellation in ‖A‖² − tr²/m when the spectrum
    is almost flat. The same of Gram / tr, whose c is 1/m, is the scale-free one.
    """
    check_scale(scale)
    xp = array_namespace(phi)
    samples, width = phi.shape[-2:]
    if xp.finfo(phi.dtype).bits < 32:
        phi = xp.astype(phi, xp.float32)
    phi = phi if scale == "literal" else unit_features(phi)
    gram = _smaller_gram(phi)
    size = min(samples, width)
    trace = xp.linalg.trace(gram)
    mean = trace / width
    if scale == "free":
        nonzero = xp.astype(trace > 0, phi.dtype)
        gram = gram / (trace + (1 - nonzero))[..., None, None]
        mean = nonzero / width
    identity = xp.eye(size, dtype=phi.dtype, device=device(phi))
    centred = gram - mean[..., None, None] * identity
    spread = xp.sum(centred * centred, axis=(-2, -1)) + (width - size) * mean * mean
    return xp.where(xp.isinf(trace), trace, spread)  # where infinity less infinity would be no number


def penalty_gradient(phi: Float[Array, "N m"], scale: Scale) -> Float[Array, "N m"]:
    """Return ∇_Φ sphere_penalty(Φ, scale), and zeros where nothing but round-off is left of it.

    It is 4/N · Φ(A − cI), c = tr A/m. The scale-free penalty's is the same of B = A/tr A, over tr A, with c = ‖B‖_F².
    Where all eigenvalues of A that are not zero are equal (one sample, equal samples) ΦA and cΦ cancel, and what is
    left of them has no direction that means anything: a share of a norm must not be given to it.
    """
    xp = array_namespace(phi)
    samples, width = phi.shape
    unit = xp.max(xp.abs(phi))
    unit = unit + xp.astype(unit == 0, phi.dtype)
    phi = phi / unit
    gram = _smaller_gram(phi)
    size = xp.linalg.trace(gram)
    even = size / width
    if scale == "free":
        size = size + xp.astype(size == 0, phi.dtype)
        gram = gram / size
        even = xp.sum(gram * gram)
    centred = gram - even * xp.eye(gram.shape[0], dtype=phi.dtype, device=device(phi))
    gradient = _product(centred, phi) if samples < width else _product(phi, centred)
    round_off = ROUND_OFF * xp.finfo(phi.dtype).eps * even
    lost = xp.sum(gradient * gradient) <= round_off * round_off * xp.sum(phi * phi)
    gradient = gradient * (4 / samples) * (unit * unit * unit if scale == "literal" else 1 / (size * unit))
    return xp.where(lost, xp.zeros_like(gradient), gradient)


def _smaller_gram(phi: Float[Array, "*b N m"]) -> Float[Array, "*b n n"]:
    """ΦᵀΦ/N, or ΦΦᵀ/N if that is smaller."""
    xp = array_namespace(phi)
    samples, width = phi.shape[-2:]
    transposed = xp.matrix_transpose(phi)
    return (_product(phi, transposed) if samples < width else _product(transposed, phi)) / samples


def _product(left: Float[Array, "*b n k"], right: Float[Array, "*b k l"]) -> Float[Array, "*b n l"]:
    """Left times right with all digits of their dtype: on GPUs and TPUs JAX keeps fewer unless it is told, and so does
    PyTorch under autocast.
    """
    if is_jax_array(left):
        from jax.numpy import matmul

        return matmul(left, right, precision="highest")
    if is_torch_array(left):
        import torch

        if torch.is_autocast_enabled(left.device.type):
            with torch.autocast(left.device.type, enabled=False):
                return left @ right
    return left @ right


def unit_features(phi: Float[Array, "*b N m"]) -> Float[Array, "*b N m"]:
    """Each matrix over its largest absolute entry, so that no product over- or underflows; zero stays zero.

    The entry counts as a constant: what scale leaves alone has the same gradient either way.
    """
    xp = array_namespace(phi)
    largest = constant(xp.max(xp.abs(phi), axis=(-2, -1), keepdims=True))
    return phi / (largest + xp.astype(largest == 0, phi.dtype))


def constant(array: Array) -> Array:
    """The same values without gradient."""
    if is_torch_array(array):
        return array.detach()
    if is_jax_array(array):
        from jax.lax import stop_gradient

        return stop_gradient(array)
    return array


def check_scale(scale: str) -> None:
    """Raise ValueError for a scale that there is not."""
    if scale not in get_args(Scale):
        raise ValueError(f"scale: got {scale!r}, allowed: {', '.join(get_args(Scale))}")


def check_array(name: str, array: Array, axes: str) -> None:
    """Raise ValueError unless ``array`` has these axes, none empty, and a real floating dtype."""
    if not hasattr(array, "shape"):
        raise ValueError(f"{name}: got {type(array).__name__}, allowed: an array of NumPy, PyTorch or JAX")
    shape, wanted = tuple(array.shape), axes.split()
    if len(shape) != len(wanted) or 0 in shape:
        raise ValueError(f"{name}: got shape {shape}, allowed: [{', '.join(wanted)}], no axis empty")
    if not array_namespace(array).isdtype(array.dtype, "real floating"):
        raise ValueError(f"{name}: got dtype {array.dtype}, allowed: a real floating dtype")


def one_library(**arrays: Sequence[Array]) -> None:
    """Raise ValueError unless these, by name, are all of NumPy, all of PyTorch or all of JAX."""
    kinds = {is_torch_array(array) + 2 * is_jax_array(array) for given in arrays.values() for array in given}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(arrays)}: got arrays of several libraries, allowed: all of one")


def check_routed(features: Array, gates: Array) -> None:
    """Raise ValueError unless ``features`` are [N, E, H] and ``gates`` [N, E], real and floating."""
    check_array("features", features, "N E H")
    check_array("gates", gates, "N E")
    one_library(features=[features], gates=[gates])
    if tuple(features.shape[:2]) != tuple(gates.shape):
        wanted = tuple(features.shape[:2])
        raise ValueError(f"gates: got shape {tuple(gates.shape)}, allowed: {wanted}, the axes N, E of features")
