"""Settings of the process that training speed depends on; results do not, up to float32 rounding."""

from __future__ import annotations

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
KEEP_FREED, KEEP_BLOCKS = 1 << 30, 1 << 25  # bytes; 32 MiB is the most that older glibc accepts for the latter


def tune_process(torch_threads: int) -> None:
    """Set torch's threads, flush denormal numbers to zero, and keep freed memory in the process.

    Denormals: the Adam moments of an expert that the gate no longer selects decay by β each step; after about 800
    steps they are below 1e-38, and arithmetic on such numbers makes each Adam step 15 to 20 times slower for good.
    Memory: gradients are megabytes that are freed and allocated again in every minibatch; glibc would give them back
    to the system and page them in anew, 1 to 2 ms a minibatch.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(torch_threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_FREED)
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BLOCKS)
