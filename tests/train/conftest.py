"""What several tests of training use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Ends = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture
def on_one_and_two_processes(tmp_path: Path) -> Callable[[dict[str, Any]], tuple[Ends, Ends]]:
    """Trains on digits with some settings, by one and by two CPU processes (gloo): predictions and learned times.

    The runs are the folders `1` and `2`. Not their weights: a bias in front of a group normalisation has no gradient
    but rounding, which Adam scales up.
    """

    def trained(settings: dict[str, Any]) -> tuple[Ends, Ends]:
        script = tmp_path / "script.py"
        script.write_text(
            "import sys, torch; torch.set_num_threads(1)\n"
            "from lowvar.data import load\n"
            "from lowvar.train import Trainer, config_from\n"
            f"trainer = Trainer(load('digits'), config_from({settings!r}), sys.argv[1], device='cpu')\n"
            "for record in trainer.run(): pass\n"
            "if trainer.accelerator.is_main_process:\n"
            "    x = torch.linspace(-2, 2, 256).reshape(4, 1, 8, 8)\n"
            "    labels = torch.arange(4) if trainer.config.conditional else None\n"
            "    out = trainer.ema_network()(x, torch.arange(4.0), class_labels=labels).sample\n"
            "    torch.save([out, trainer.times.state()], sys.argv[1] + '/final.pt')\n"
        )
        ends = []
        for n in (1, 2):
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
            run = [sys.executable, *launch, str(script), str(tmp_path / str(n))]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            ends.append(torch.load(tmp_path / str(n) / "final.pt", weights_only=True))
        return ends[0], ends[1]

    return trained
