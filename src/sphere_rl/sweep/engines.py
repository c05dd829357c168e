"""What carries a sweep's runs out: processes of this machine, or tasks of a Ray cluster; the process is the same."""

from __future__ import annotations

import logging
import os
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sphere_rl.errors import CommandLineError, RunFolderError, described
from sphere_rl.extras import require
from sphere_rl.runs import RunFolder
from sphere_rl.runtime import cores
from sphere_rl.sweep.plan import PlannedRun

LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
"""Whose thread pools are pinned to the run's own number of threads."""
STOP_SECONDS = 60
ANSWER_SECONDS = 10
RETRIES = 10
"""How often a run is started again, from its checkpoint, whose process was killed or whose worker Ray lost."""


@runtime_checkable
class Watcher(Protocol):
    """Whoever shows a sweep to its user."""

    def started(self, run: PlannedRun) -> None:
        """The run's process is there, or is handed to Ray."""

    def ended(self, run: PlannedRun, code: int) -> None:
        """The run's process has ended with this exit code."""

    def tick(self) -> None:
        """Some time has passed."""


Engine = Callable[[Sequence[PlannedRun], Watcher], dict[str, int]]


def local(jobs: int) -> Engine:
    """Up to ``jobs`` processes side by side on this machine."""

    def run_all(runs: Sequence[PlannedRun], watcher: Watcher) -> dict[str, int]:
        waiting, codes, share = deque(runs), dict[str, int](), max(1, cores() // min(jobs, len(runs)))
        running: dict[subprocess.Popen[bytes], PlannedRun] = {}
        kills = Counter[str]()
        try:
            while waiting or running:
                for run in take(waiting, jobs - len(running)):
                    running[start(*process_of(run, share))] = run
                    watcher.started(run)
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    if again(run.folder, process.returncode, kills[run.name]):
                        kills[run.name] += killed(process.returncode)
                        waiting.append(run)
                        continue
                    codes[run.name] = process.returncode
                    watcher.ended(run, process.returncode)
                watcher.tick()
        finally:
            stop(list(running))
        return codes

    return run_all


def take(waiting: deque[PlannedRun], most: int) -> list[PlannedRun]:
    """Take up to ``most`` runs from those that wait; those that another sweep trains at the moment go on waiting.

    When that one has ended or died, such a run is taken like any other: its process sees how far it is.
    """
    taken = list[PlannedRun]()
    for _ in range(len(waiting)):
        if len(taken) == most:
            break
        run = waiting.popleft()
        (waiting if RunFolder(run.folder).in_use else taken).append(run)
    return taken


def again(folder: Path, code: int, kills: int) -> bool:
    """Whether a run whose process ended with ``code`` has to be started again, after so many that were killed.

    It does if it was killed, as by a machine that is short of memory, or if another sweep has taken the run between the
    start of our process and its own, or is done with it.
    """
    if killed(code):
        return kills < RETRIES
    with suppress(RunFolderError):
        return code != 0 and (RunFolder(folder).in_use or RunFolder(folder).status().get("state") == "finished")
    return False


def killed(code: int) -> bool:
    """Whether a process was killed without a word; one that was asked to stop by SIGTERM exits with 130."""
    return code == -signal.SIGKILL


def ray(address: str | None, jobs: int | None) -> Engine:
    """A task of Ray for each run, up to ``jobs`` at a time; ``address`` of a cluster, or a Ray of this machine.

    Ray's own ``RAY_ADDRESS``, which it sets in what it is given as a job, stands for an address that is not given.

    Raises:
        MissingExtraError: Ray is not installed.
        CommandLineError: nobody answers at the address.
    """
    require("ray", "engine")
    import ray
    from ray.exceptions import RayError

    address = address or os.environ.get("RAY_ADDRESS")
    if address:  # before anything is written
        connect(address, None)

    def run_all(runs: Sequence[PlannedRun], watcher: Watcher) -> dict[str, int]:
        if not ray.is_initialized():
            connect(address, jobs and jobs * max(run.threads for run in runs))
        task, codes = ray.remote(carry_out), dict[str, int]()
        try:
            left, waiting = deque(runs), {}
            while left or waiting:
                while left and len(waiting) < (jobs or len(runs)):
                    run = left.popleft()
                    gpus = 1 if run.config.device.startswith("cuda") else 0
                    options = {"num_cpus": run.threads, "num_gpus": gpus, "max_retries": RETRIES, "name": run.name}
                    waiting[task.options(**options).remote(*process_of(run))] = run
                    watcher.started(run)
                for done in ray.wait(list(waiting), timeout=0.5)[0]:
                    run = waiting.pop(done)
                    try:
                        codes[run.name] = ray.get(done)
                    except RayError:  # lost more often than it may be: a failed run, not a failed sweep
                        codes[run.name] = 3
                    watcher.ended(run, codes[run.name])
                watcher.tick()
        finally:
            ray.shutdown()  # its workers die, and with them the processes of their runs
        return codes

    return run_all


def connect(address: str | None, cores: int | None) -> None:
    """Connect to the Ray at an address; without one, start a Ray of this machine, with so many cores.

    Raises:
        CommandLineError: nobody answers there.
    """
    import ray

    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:  # and not whatever Ray happens to run here
        ray.init(address="local", num_cpus=cores, **quiet)
        return
    try:
        knock(address)
        ray.init(address=address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        expected = f"the address of a Ray cluster that answers ({described(error)})"
        raise CommandLineError(f"--address: {address!r} is not allowed; expected {expected}") from None


def knock(address: str) -> None:
    """Raise `OSError` or `OverflowError` where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


def process_of(run: PlannedRun, share: int = 1) -> tuple[str, tuple[str, ...], str, int, str]:
    """What it takes to start a run's process anywhere: folder, words, log, threads and `import_path`.

    ``share``: threads for those that are ``auto``.
    """
    given = max(run.threads, share) if run.takes_what_is_given else run.threads
    return str(run.folder.absolute()), run.words, str(run.log.absolute()), given, import_path()


def import_path() -> str:
    """Where this process finds modules that are not installed, its folder first: those of a user's environments."""
    standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    installed = [Path(path).resolve() for path in (*standard, *site.getsitepackages(), site.getusersitepackages())]
    places = [place for place in dict.fromkeys(Path(name).resolve() for name in ("", *sys.path)) if place.is_dir()]
    own = [place for place in places if not any(place.is_relative_to(other) for other in installed)]
    return os.pathsep.join(map(str, own))


def start(folder: str, words: Sequence[str], log: str, threads: int, path: str = "") -> subprocess.Popen[bytes]:
    """Start the process of a run, out of reach of the terminal's Ctrl-C: the sweep passes it on.

    ``path``: where it looks for modules; this process's own where none is given.
    """
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    pinned = {f"{library}_NUM_THREADS": str(threads) for library in LIBRARIES}
    pinned["PYTHONPATH"] = path or import_path()
    command = [sys.executable, "-m", "sphere_rl.sweep.child", str(os.getpid()), folder, *words]
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=os.environ | pinned, start_new_session=True
        )


def carry_out(folder: str, words: Sequence[str], log: str, threads: int, path: str) -> int:
    """Carry one run out in a worker of Ray, to its exit code."""
    kills = 0
    while True:
        process = start(folder, words, log, threads, path)
        try:
            code = process.wait()
        finally:
            stop([process])
        if not again(Path(folder), code, kills):
            return code
        kills += killed(code)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to stop, let them write that into their status, and wait until they are gone."""
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        process.terminate()
    for process in alive:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
