"""Standard output and error that a command outlives: a reader that has left, or a disk without room, ends no run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, what standard output or error refuse is dropped, and so is all that comes after it there.

    Characters that the locale's encoding lacks are written as ``\\u03a3``, as on standard error anyway.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            if (stream := getattr(sys, name)) is not None:  # closed before the process began
                lasting: Any = Lasting(stream)
                if isinstance(stream, TextIOWrapper):
                    stack.callback(stream.reconfigure, errors=stream.errors)
                    stream.reconfigure(errors="backslashreplace")
                stack.callback(setattr, sys, name, stream)
                stack.callback(lasting.flush)  # here, and not where Python ends and says so
                setattr(sys, name, lasting)
        yield


class Lasting:
    """A text stream; from the first error of the operating system on, its file descriptor is ``/dev/null``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has: ``isatty``, ``encoding``."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop it."""
        with self._dropped():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write, or drop them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what is buffered, or drop it."""
        with self._dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # none: a stream of no file
                os.dup2(nowhere.fileno(), self._stream.fileno())
