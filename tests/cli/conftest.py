"""A tiny model folder, and the command line called in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on stderr that says what was wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("lowvar: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("lowvar: ")

    @property
    def json(self) -> dict[str, Any]:
        """Stdout as JSON: fails if anything else stands there."""
        return json.loads(self.out)


Lowvar = Callable[..., Done]


@pytest.fixture
def lowvar(capsys: pytest.CaptureFixture[str]) -> Lowvar:
    """Calls `lowvar` in this process."""
    from lowvar.cli import main

    def call(*words: object) -> Done:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock diffusers pipeline folder, untrained, with a learned-range head."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("models") / "stock"
    torch.manual_seed(0)
    unet: Any = UNet2DModel(out_channels=2, **TINY)  # type: ignore[arg-type]
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    DDPMPipeline(unet, scheduler).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, calibrated by the command."""
    from lowvar.cli import main

    out = tmp_path_factory.mktemp("models") / "calibrated"
    words = ["calibrate", "--model", str(model), "--data", "digits", "--n", "48", "--replicates", "1", "--choose", "0"]
    assert main([*words, "--steps", "2", "--out", str(out), "--quiet"]) == 0
    return out
