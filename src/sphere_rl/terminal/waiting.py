"""What a user reads while nothing can be seen yet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def waiting(what: str, quiet: bool = False) -> Iterator[None]:
    """Say what is being prepared, on a terminal, until it is; no library is loaded for it."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    print(f"\r{what} …", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
