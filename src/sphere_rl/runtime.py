"""Settings of the process that training speed depends on; results do not, up to float32 rounding."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h
KEEP_FREED, KEEP_BLOCKS = 1 << 27, 1 << 22  # bytes; a gradient of ten 256 x 256 experts has 2.6 MB


def tune_process(torch_threads: int) -> None:
    """Set torch's threads, flush denormal numbers to zero, and keep freed memory in the process.

    Denormals: the Adam moments of an expert that the gate no longer selects decay by β each step; after about 800
    steps they are below 1e-38, and arithmetic on such numbers makes each Adam step 15 to 20 times slower for good.
    Memory: gradients are megabytes that are freed and allocated again in every minibatch; glibc would give them back
    to the system and page them in anew, 1 to 2 ms a minibatch. Larger blocks go back at once, and all threads share
    one arena: else the environments that are made and closed for evaluations leave holes that only grow.
    Lanes: PyTorch makes as many inter-op threads as there are cores; two lanes (`sphere_rl.lanes`) use two.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(torch_threads)
    if torch_threads > 1:
        with suppress(RuntimeError):  # they run already
            torch.set_num_interop_threads(2)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_FREED)
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BLOCKS)
        libc.mallopt(M_ARENA_MAX, 1)
