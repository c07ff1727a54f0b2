"""The README's Python runs as it stands, on a small stock pipeline folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

from lowvar.calibrate import Calibration

ROOT = Path(__file__).resolve().parents[1]


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    monkeypatch.chdir(tmp_path)
    DDPMPipeline(unet, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained("theirs")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 20
    code = blocks[0].replace("path/to/pipeline", "theirs").replace("path/to/images", "digits")
    found: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), found)
    images = found["images"]
    assert isinstance(images, list)
    assert len(images) == 16
    again = DiffusionPipeline.from_pretrained("calibrated")
    assert type(again.scheduler).__name__ == "ReverseVarianceScheduler"
    calibration = found["calibration"]
    assert isinstance(calibration, Calibration)
    assert again.scheduler.calibration.fingerprint == calibration.fingerprint
