"""docs/expectations.md: the table is what the code knows, and every block runs on small models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowvar.metrics import STATISTICS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "expectations.md"


def test_table_is_made_from_the_code() -> None:
    rows = "\n".join(f"| `{name}` | {about} |" for name, about in STATISTICS.items())
    table = f"| name | what is averaged |\n|---|---|\n{rows}"
    found = re.search(r"<!-- statistics -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.S)
    assert found is not None
    assert found.group(1) == table, f"put this into {PAGE.name}:\n{table}"


def test_table_of_inpainting_is_the_benchmark_s() -> None:
    file = PAGE.parents[1] / "benchmarks" / "results" / "inverse.json"

    def cell(value: dict[str, float]) -> str:
        return f"{value['value']:.3f} ± {value['se']:.3f}"

    rows = [
        f"| {row['name']} | {row['nfe']:,} | "
        + " | ".join(cell(row[key]) for key in ("error", "said", "coverage", "error_less_basis"))
        + " |"
        for row in json.loads(file.read_text())["rows"]
    ]
    found = re.search(r"<!-- inverse -->\n(.*?)\n<!-- end inverse -->", PAGE.read_text(), re.S)
    assert found is not None
    assert found.group(1).splitlines()[2:] == rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/before` and `runs/after`: two untrained networks for 8x8 photos, the second calibrated."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from lowvar.cli import main

    place = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("before", "stock")):
        torch.manual_seed(seed)
        unet: Any = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        )
        scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        DDPMPipeline(unet, scheduler).save_pretrained(str(place / "runs" / name))
    words = [
        "calibrate",
        "--model",
        str(place / "runs" / "stock"),
        "--data",
        "photos:8",
        "--n",
        "32",
        "--replicates",
        "1",
    ]
    assert main([*words, "--choose", "0", "--steps", "2", "--out", str(place / "runs" / "after"), "--quiet"]) == 0
    return place


@pytest.mark.slow
def test_every_block_runs(runs: Path) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 5
    script = runs / "page.py"
    script.write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, script], cwd=runs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    for pattern in (
        r"brightness = -?[\d.e-]+ \[",
        r"ahead|behind|level",
        r"bias taken off",
        r"coverage 0\.\d\d",
        r"1280 eval",
    ):
        assert re.search(pattern, said), (pattern, said)
    coverage = re.search(r"coverage ([\d.]+)", said)
    assert coverage is not None
    assert 0.8 < float(coverage[1]) <= 1


@pytest.mark.slow
def test_the_command_of_the_page_runs(runs: Path) -> None:
    (command,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=runs,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (runs / "runs" / "brightness" / "report.html").is_file()
