"""How many digits sums of products have: those of float32 at least."""

from torch import Tensor, finfo


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or in float32 where it is a floating one with fewer digits."""
    return tensor.float() if tensor.is_floating_point() and finfo(tensor.dtype).bits < 32 else tensor
