"""Seeds of a run's many random streams, derived from one, and the process's own streams, which environments may use."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
import torch
from numpy.random import SeedSequence


def derive_seed(*parts: int | str) -> int:
    """Mix integers and names into an independent 31-bit seed; equal parts give equal seeds on every machine."""
    words = [crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(SeedSequence(words).generate_state(1)[0]) >> 1


def seed_globals(seed: int) -> None:
    """Start the global streams of Python, NumPy and PyTorch (CPU) anew: nothing here draws from them, environments may.

    Their states are not saved anywhere, so they start anew wherever environments do, and at each segment of a run.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


@contextmanager
def global_streams(seed: int) -> Iterator[None]:
    """Inside, the global streams start from this seed; afterwards they go on where they were before."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed_globals(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
