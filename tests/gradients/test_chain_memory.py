"""Memory of backpropagation through a long chain of the demo's network, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from lowvar.gradients import reverse_chain
from lowvar.process import CosineVP, Independent, ReverseKernel
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.grid import trailing
from lowvar.train.networks import build_network


def peak():  # KiB; ru_maxrss would begin with the parent's peak
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

schedule, steps, checkpoint = CosineVP(), int(sys.argv[1]), int(sys.argv[2])
denoiser = NetworkDenoiser(build_network((1, 8, 8)), schedule, "epsilon", clip=1.0)
chain = reverse_chain(denoiser, ReverseKernel(variance="small"), trailing(schedule, steps))
before = peak()
chain.surrogate(
    lambda x: x.mean((1, 2, 3)), Independent(0), range(32), (1, 8, 8), checkpoint=checkpoint
).loss.backward()
print(peak() - before)
"""


def peak(steps: int, checkpoint: int) -> int:
    """KiB of memory that a gradient needs. Small blocks go back to the system at once, else fragments are counted."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    command = [sys.executable, "-c", SCRIPT, str(steps), str(checkpoint)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the settings of the allocator are glibc's")
def test_two_hundred_steps_need_hardly_more_than_twenty() -> None:
    short, long, kept = peak(20, 1), peak(200, 1), peak(20, 0)
    assert long < 1.5 * short
    assert kept > 3 * short
