"""Whether the kernel of a network is being measured here.

K is that of the function a network computes. What only changes gradients on their way back (`sphere_rl.regularize`, a
tracker's) is the identity in that function, and stands aside while this is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OPEN: ContextVar[bool] = ContextVar("measuring", default=False)


def measuring() -> bool:
    """Whether it is, in this thread or task."""
    return _OPEN.get()


@contextmanager
def as_measured() -> Iterator[None]:
    """In here it is."""
    before = _OPEN.set(True)
    try:
        yield
    finally:
        _OPEN.reset(before)
