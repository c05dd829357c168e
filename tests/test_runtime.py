import platform
import subprocess
import sys

import pytest

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


LANES = """
import torch
from sphere_rl.runtime import tune_process

asked, ask = [], torch.set_num_interop_threads
torch.set_num_interop_threads = lambda number: (asked.append(number), ask(number))
for threads in (1, 2, 4):
    tune_process(threads)
print(asked, torch.get_num_interop_threads())
"""


def test_two_lanes_have_two_threads_and_a_second_request_is_no_error():
    result = subprocess.run([sys.executable, "-c", LANES], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[2, 2] 2"
