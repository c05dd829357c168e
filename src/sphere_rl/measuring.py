"""Whether the kernel of a network is being measured here.

K is that of the function a network computes. What only changes gradients on their way back (`sphere_rl.regularize`, a
tracker's) is the identity in that function, and stands aside while this is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local

_here = local()  # no ContextVar: torch.compile does not trace one in PyTorch 2.13


def measuring() -> bool:
    """Whether it is, in this thread."""
    return getattr(_here, "open", False)


@contextmanager
def as_measured() -> Iterator[None]:
    """In here it is."""
    before, _here.open = measuring(), True
    try:
        yield
    finally:
        _here.open = before
