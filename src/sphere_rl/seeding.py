"""Seeds of a run's many random streams, derived from one."""

from __future__ import annotations

from zlib import crc32

from numpy.random import SeedSequence


def derive_seed(*parts: int | str) -> int:
    """Mix integers and names into an independent 31-bit seed; equal parts give equal seeds on every machine."""
    words = [crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(SeedSequence(words).generate_state(1)[0]) >> 1
