import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from sphere_rl.runtime import LaneChoice, cores, threads

PROBE = """
import resource, torch
from sphere_rl.runtime import tune_process

tune_process(1)
tiny = torch.full((1000,), 1e-38) * 0.1

def gradients():
    return [torch.zeros(10, 256, 256) for _ in range(3)]

for _ in range(5):
    gradients()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    gradients()
print(torch.get_num_threads(), int(tiny.count_nonzero()), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory setting is glibc's")
def test_denormals_are_flushed_and_freed_gradients_stay_in_the_process():
    result = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    threads, denormals, page_faults = map(int, result.stdout.split())
    assert (threads, denormals) == (1, 0)
    assert page_faults < 640  # 8 MB in 4 KiB pages 20 times are 38 400 where memory goes back to the system


OLDER_THREADS = """
import torch
from sphere_rl.runtime import tune_process

tiny = torch.full((1 << 20,), 1e-38)  # long enough for four threads
torch.set_num_threads(4)
before = int((tiny * 0.1).count_nonzero())
tune_process(4)
print(before, torch.get_num_threads(), int((tiny * 0.1).count_nonzero()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch is built with another OpenMP")
def test_threads_that_ran_before_flush_denormals_too() -> None:
    result = subprocess.run([sys.executable, "-c", OLDER_THREADS], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(1 << 20), "2", "0"]


ARENAS = """
import ctypes, re, sys
from pathlib import Path
from sphere_rl.config import TrainConfig
from sphere_rl.protocol import check

check(TrainConfig(tasks=("push-wall",)))
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(len(re.findall("<heap nr", Path(sys.argv[1]).read_text())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory setting is glibc's")
def test_threads_of_a_runs_first_environments_allocate_where_all_do(tmp_path: Path) -> None:
    words = [sys.executable, "-c", ARENAS, str(tmp_path / "arenas.xml")]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "1\n"


LANES = """
import os
import torch
from sphere_rl.runtime import tune_process

asked, ask = [], torch.set_num_interop_threads
torch.set_num_interop_threads = lambda number: (asked.append(number), ask(number))
for threads in (1, 2, 4):
    tune_process(threads)
os.sched_getaffinity = lambda process: set(range(8))
tune_process("auto")
print(asked, torch.get_num_interop_threads(), torch.get_num_threads())
"""


def test_two_lanes_have_two_threads_and_a_second_request_is_no_error():
    """``auto`` is two of eight cores."""
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", LANES], capture_output=True, text=True, check=True, env=free)
    assert result.stdout.strip() == "[2, 2, 2] 2 1"


def test_cores_are_those_of_the_process_and_no_more_than_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert cores() == threads("auto") == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert (cores(), threads("auto"), threads(4)) == (2, 2, 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert cores() == 3


@pytest.mark.parametrize(("seconds", "best"), [({1: 3.0, 2: 2.0}, 2), ({1: 2.0, 2: 3.0}, 1)])
def test_auto_takes_the_faster_of_one_and_two_threads(
    seconds: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sphere_rl.runtime.cores", lambda: 8)
    choice, taken = LaneChoice("auto"), []
    for i in range(8):
        if i == 5:
            choice.renew()
        taken.append(choice.threads)
        choice.took(99.0 if i == 0 else seconds[choice.threads])  # the first one compiles
    assert taken == [2, 2, 1, best, best, 2, 1, best]


def test_threads_that_were_asked_for_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[int | Literal["auto"], int]] = [(1, 8), (2, 8), (4, 1), ("auto", 1)]
    for asked, number in cases:
        monkeypatch.setattr("sphere_rl.runtime.cores", lambda number=number: number)
        choice = LaneChoice(asked)
        for _ in range(4):
            assert choice.threads == (1 if asked == "auto" else asked)
            choice.took(1.0)
