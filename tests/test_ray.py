"""Sweeps on a Ray of two machines that lose processes, drivers and machines, and end bitwise as undisturbed runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comparing import run_difference
from toy_runs import WORDS, config, train

from sphere_rl.cli import main
from sphere_rl.runs import RunFolder, checkpoint

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),  # JAX's, where another test has loaded it
]

HERE = Path(__file__).parent
METHODS = ("none", "sphere")
STEPS = 3200


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """The runs of the sweep by name, never disturbed."""
    place = tmp_path_factory.mktemp("whole")
    runs = {method: config("Drawing", method=[method], steps_per_task=STEPS) for method in METHODS}
    return {f"gym-crl-topk_moe-{method}-seed0": train(run, place / method) for method, run in runs.items()}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that carries nothing out, and two machines with room for a run each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(wait=False, num_cpus=1)
    yield made
    made.shutdown()


class Sweep:
    """``sphere sweep --engine ray`` in a process of its own."""

    def __init__(self, out: Path, address: str) -> None:
        self.out, self.folders = out, [RunFolder(out / f"gym-crl-topk_moe-{method}-seed0") for method in METHODS]
        words = ["--suite", "gym", "--tasks", "toy_envs:Drawing-v0", "--methods", *METHODS, *WORDS[2:]]
        words += ["--steps-per-task", str(STEPS), "--engine", "ray", "--address", address, "--out", str(out)]
        self.line = [sys.executable, "-m", "sphere_rl.cli", "sweep", *words]
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.line, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_for_checkpoints(self) -> None:
        """Until both runs have some, and are not over."""
        wait_until(lambda: all(len(checkpoint.run_checkpoints(folder)) > 1 for folder in self.folders))
        assert all(processes_of(folder) for folder in self.folders)

    def ends_as(self, whole: dict[str, RunFolder]) -> None:
        assert self.driver.wait(300) == 0
        for folder in self.folders:
            assert run_difference(whole[folder.path.name], folder) is None

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for folder in self.folders for path in folder.path.glob("*.json*")}


@pytest.fixture
def sweep(cluster: Any, tmp_path: Path) -> Iterator[Sweep]:
    """It has begun, and both of its runs are going on."""
    found = Sweep(tmp_path / "out", cluster.address)
    try:
        found.wait_for_checkpoints()
        yield found
    finally:
        found.driver.kill()
        found.driver.wait()


def wait_until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_of(folder: RunFolder) -> list[int]:
    """Processes that train this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(folder.path).encode() in words and b"sphere_rl.cli" in words:
                found.append(int(path.parent.name))
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_runs_go_on_when_their_processes_or_workers_are_killed(sweep: Sweep, whole: dict[str, RunFolder]) -> None:
    """As by a machine that is short of memory: of one run the process, of the other the worker of Ray that minds it."""
    (one,), (other,) = (processes_of(folder) for folder in sweep.folders)
    os.kill(one, signal.SIGKILL)
    os.kill(parent_of(other), signal.SIGKILL)
    sweep.ends_as(whole)


@pytest.mark.slow
def test_a_driver_that_is_killed_takes_its_runs_along_and_is_started_again(
    sweep: Sweep, whole: dict[str, RunFolder]
) -> None:
    sweep.driver.kill()
    sweep.driver.wait()
    wait_until(lambda: not any(folder.in_use or processes_of(folder) for folder in sweep.folders), 60)
    before = sweep.files()
    assert {folder.status()["state"] for folder in sweep.folders} <= {"running", "interrupted"}
    time.sleep(2)
    assert sweep.files() == before  # nobody writes on
    sweep.driver = sweep.start()
    sweep.ends_as(whole)


@pytest.mark.slow
def test_a_driver_is_started_again_while_the_runs_of_the_dead_one_still_write(
    sweep: Sweep, whole: dict[str, RunFolder]
) -> None:
    """Processes that hear no signal, as in a call of an environment that hangs: the new ones wait for their locks."""
    orphans = [pid for folder in sweep.folders for pid in processes_of(folder)]
    for pid in orphans:
        os.kill(pid, signal.SIGSTOP)
    sweep.driver.kill()
    sweep.driver.wait()
    sweep.driver = sweep.start()
    time.sleep(10)
    assert sweep.driver.poll() is None
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    sweep.ends_as(whole)


@pytest.mark.slow
def test_runs_of_a_machine_that_is_lost_go_on_on_another(
    sweep: Sweep, cluster: Any, whole: dict[str, RunFolder]
) -> None:
    before = {pid for folder in sweep.folders for pid in processes_of(folder)}
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    wait_until(lambda: len(before - {pid for folder in sweep.folders for pid in processes_of(folder)}) == 1, 60)
    sweep.ends_as(whole)


@pytest.mark.parametrize("address", ["127.0.0.1:x", "127.0.0.1:1", "127.0.0.1:99999", "no such host:6379"])
def test_an_address_that_nobody_answers_at_is_one_line(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", "gym", "--tasks", "toy_envs:Drawing-v0", *WORDS[2:], "--out", str(tmp_path / "out")]
    assert main(["sweep", *words, "--engine", "ray", "--address", address]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"sphere: --address: '{address}' is not allowed; expected the address of a Ray cluster")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
