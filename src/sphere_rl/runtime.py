"""Settings of the process that training speed depends on; results do not, up to float32 rounding."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from typing import Literal

import torch

from sphere_rl.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from glibc's malloc.h
OMP_PAUSE_HARD = 2  # from OpenMP's omp.h
KEEP_FREED, KEEP_BLOCKS = 1 << 27, 1 << 22  # bytes; a gradient of ten 256 x 256 experts has 2.6 MB


def cores() -> int:
    """Cores that this process may keep busy: those it is bound to, and no more than OMP_NUM_THREADS if it is set."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS
    pinned = os.environ.get("OMP_NUM_THREADS", "")
    return min(bound, max(1, int(pinned))) if pinned.isdecimal() else bound


def threads(asked: int | Literal["auto"]) -> int:
    """How many threads ``auto`` may stand for."""
    return cores() if asked == "auto" else asked


def devices() -> list[str]:
    """Names of devices that PyTorch can compute on here: ``cpu``, and accelerators as ``cuda`` and ``cuda:0``."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ["cpu"]
    return ["cpu", found.type, *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count()))]


def check_device(name: str, field: str = "device") -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: PyTorch does not know it, or cannot compute on it here.
    """
    if name not in devices():
        others = "" if len(devices()) > 1 else " (PyTorch finds no accelerator here)"
        raise ConfigError(field, name, f"one of {', '.join(devices())}{others}")
    return torch.device(name)


class LaneChoice:
    """Threads for the next iteration: those asked for, or with ``auto`` one or two, whichever has been faster.

    The first iteration, in which code is compiled, counts for nothing; the second is timed with two, the third with
    one. At a new task both are timed again, as other programs come and go. Results are the same, bit by bit.
    """

    def __init__(self, asked: int | Literal["auto"]) -> None:
        self.measures = asked == "auto" and cores() > 1
        self._threads = 1 if asked == "auto" else asked
        self._seconds: dict[int, float] = {}
        self._warm = False

    def renew(self) -> None:
        """Time both again."""
        self._seconds.clear()

    @property
    def threads(self) -> int:
        """For the next iteration."""
        if not self.measures:
            return self._threads
        left = [number for number in (2, 1) if number not in self._seconds]
        return left[0] if left else min(self._seconds, key=self._seconds.__getitem__)

    def took(self, seconds: float) -> None:
        """The iteration with `threads` has taken this long."""
        if self._warm:
            self._seconds.setdefault(self.threads, seconds)
        self._warm = True


def tune_process(asked: int | Literal["auto"]) -> None:
    """Set torch's threads, flush denormal numbers to zero, and keep freed memory in the process.

    ``auto`` is two threads where there are two cores: what is trained, and what reads it, computes alike everywhere.
    Denormals: the Adam moments of an expert that the gate no longer selects decay by β each step; after about 800
    steps they are below 1e-38, and arithmetic on such numbers makes each Adam step 15 to 20 times slower for good.
    Each thread has a setting of its own, taken from the one that makes it: those that this thread has made before go.
    Memory: gradients are megabytes that are freed and allocated again in every minibatch; glibc would give them back
    to the system and page them in anew, 1 to 2 ms a minibatch. Larger blocks go back at once, and all threads share
    one arena, if this comes before the first of them: else each keeps what was freed in its own.
    Lanes: PyTorch makes as many inter-op threads as there are cores; two lanes (`sphere_rl.kernels.threads`) use two.
    """
    torch_threads = min(2, cores()) if asked == "auto" else asked
    torch.set_flush_denormal(True)
    with suppress(OSError):  # PyTorch is built with another OpenMP
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(OMP_PAUSE_HARD)
    torch.set_num_threads(max(1, torch_threads // 2))  # outside lanes, too: measured kernels have the same bits
    if torch_threads > 1:
        with suppress(RuntimeError):  # they run already
            torch.set_num_interop_threads(2)
    if libc := glibc():
        libc.mallopt(M_TRIM_THRESHOLD, KEEP_FREED)
        libc.mallopt(M_MMAP_THRESHOLD, KEEP_BLOCKS)
        libc.mallopt(M_ARENA_MAX, 1)


def release_memory() -> None:
    """Give freed memory back to the system: for where environments have been closed and others are made.

    Kept memory (`tune_process`) takes in what a new environment allocates; what is allocated after it comes to lie
    above, and when the environment is closed it leaves a hole of 13 MB. A run that makes new ones at every checkpoint
    would hold more and more of them.
    """
    if libc := glibc():
        libc.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """The C library, where it is the one whose allocator these settings are of."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
