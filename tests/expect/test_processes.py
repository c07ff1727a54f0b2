"""`estimate(accelerator=)`: two processes share the units and hold the same sums, so the result is that of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from lowvar.expect import estimate
from lowvar.testing.expectations import smooth_map
accelerator = Accelerator(cpu=True)
found = {}
for design in ("auto", "independent", "sobol", "multilevel"):
    e = estimate(smooth_map(), lambda x: x.square().sum(1), tol=0.2, design=design, accelerator=accelerator)
    found[design] = [float(e.value), float(e.se), e.half_width]
    if design != "auto":
        assert e.half_width <= 0.2
rank = accelerator.process_index
with open(f"{sys.argv[1]}-{accelerator.num_processes}-{rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_processes_agree_with_each_other_and_with_one(tmp_path: Path) -> None:
    """Units are numbered, not dealt out by process: with a fixed design the units of two processes hold those of one.

    A batch on two processes is twice as large, so a run may end a batch later; values agree within both errors.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for n in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        run = [sys.executable, *launch, str(script), str(tmp_path / "found")]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    one, first, second = (json.loads((tmp_path / f"found-{k}.json").read_text()) for k in ("1-0", "2-0", "2-1"))
    assert first == second
    for design, (value, se, _) in one.items():
        other, its, _ = first[design]
        assert abs(value - other) < 4 * max(se, its), design
    assert first["independent"][:2] == pytest.approx(one["independent"][:2], rel=0.05)
