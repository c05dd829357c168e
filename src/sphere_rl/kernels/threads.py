"""Two threads for training on a CPU.

PyTorch's own threads split one operation. A mixture's operations are too small for that: products of 10 to 200 rows run
no faster on two cores, but two of them side by side do. So inside `two_lanes` independent work is shared: half of the
experts of a pass (`sphere_rl.kernels.mlp`), the critic's step beside the actor's. All operations are the same as
without, and so are the threads' settings; results are bitwise equal.

That there are two is known to the thread that is inside `two_lanes` and to no other, and gone with it: what runs on
the second lane, or beside a run in the same process, sees one. Kernels ask (`lanes`) instead of being told, because
between them and the run lie autograd and the hooks of methods, which pass nothing on.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from sphere_rl.kernels.script import SCRIPTED, scriptable, scripted


class _Present(threading.local):
    """The second lane that this thread may use and what it does; there is none for the second lane itself."""

    second: ThreadPoolExecutor | None = None
    tasks: Sequence[Any] = ()


_present = _Present()


def flushes_denormals() -> bool:
    """Whether this thread computes with zero where a number is too small for float32's full precision."""
    return torch.tensor(1e-38, device="cpu").mul(0.1).item() == 0


class _Interop:
    """PyTorch's inter-op threads, on which scripted work of the second lane runs.

    Like every thread they have a setting of their own for denormal numbers, that of whoever made them: another part of
    the process may have, before a run. With another setting than the first lane's their results are other bits.
    """

    def __init__(self) -> None:
        self._flush: bool | None = None
        self._all = threading.Barrier(1)
        self._lock = threading.Lock()

    def adopt(self, flush: bool) -> None:
        """Let all of them flush denormal numbers, or none."""
        with self._lock:
            if flush is self._flush:
                return
            self._all = threading.Barrier(torch.get_num_interop_threads())
            for arrival in [_start_arrival(flush) for _ in range(self._all.parties)]:
                arrival.wait()
            self._flush = None if self._all.broken else flush

    def arrive(self, flush: bool) -> None:
        """Set the one that this runs on; it is free for a second task when each has had its own, or after 10 s."""
        torch.set_flush_denormal(flush)
        with suppress(threading.BrokenBarrierError):
            self._all.wait(10)


_interop = _Interop()


@torch.jit.ignore  # type: ignore[reportArgumentType]
def _arrive(flush: bool) -> None:
    _interop.arrive(flush)


@scripted
def _start_arrival(flush: bool) -> torch.jit.Future[None]:
    return torch.jit.fork(_arrive, flush)  # type: ignore[reportReturnType]


@contextmanager
def two_lanes(threads: int) -> Iterator[None]:
    """Share work between two lanes if ``threads`` are at least two; each then has half of PyTorch's threads."""
    if threads < 2:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads // 2)
    flush = flushes_denormals()
    if SCRIPTED:
        _interop.adopt(flush)
    with ThreadPoolExecutor(1, "second lane", initializer=partial(torch.set_flush_denormal, flush)) as second:
        second.submit(torch.set_num_threads, threads // 2).result()
        _present.second = second
        try:
            yield
        finally:
            for task in _present.tasks:
                with suppress(Exception):  # whoever asks for the result meets it
                    _result_of(task)()
            _present.second, _present.tasks = None, ()
            torch.set_num_threads(before)


def lanes() -> int:
    """Lanes that this thread may use."""
    return 1 if _present.second is None else 2


def beside(task: Callable[[], Any], start: Callable[[], Any] | None = None) -> Callable[[], Any]:
    """Start a task on the second lane; call what this returns for its result. With one lane it runs only then.

    ``start`` begins the same task by itself and returns a `torch.jit.Future`: TorchScript, which needs no Python lock.
    """
    if _present.second is None:
        return task
    future = start() if start else _present.second.submit(task)
    _present.tasks = [*(earlier for earlier in _present.tasks if not earlier.done()), future]
    return _result_of(future)


def begin(run: Callable[..., Any], start: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Begin ``run`` on the second lane, where ``start``, scripted, forks it; with one lane it runs only when asked for.

    Call what this returns for the result.
    """

    def here() -> Any:
        with torch.inference_mode():
            return run(*arguments)

    return beside(here, partial(start, *arguments) if SCRIPTED else None)


def _result_of(future: Any) -> Callable[[], Any]:
    return future.result if isinstance(future, Future) else future.wait


@scriptable
def halves(work: list[int]) -> tuple[list[int], list[int]]:
    """Positions of two shares that are about equal in work, from the largest item to the smallest."""
    mine: list[int] = []
    others: list[int] = []
    order, ahead = [(-own, position) for position, own in enumerate(work)], 0
    order.sort()
    for less, position in order:
        if ahead > 0:
            others.append(position)
            ahead += less
        else:
            mine.append(position)
            ahead -= less
    return mine, others


@scriptable
def split_rows(rows: list[int], num_lanes: int) -> tuple[list[int], list[int]]:
    """Positions of an MLP's blocks of so many rows for this lane and, with two, the second, about equal in work."""
    none: list[int] = []
    if num_lanes == 1:
        return [position for position, _ in enumerate(rows)], none
    return halves([own + 32 for own in rows])  # 32: the weights, read for the first row
