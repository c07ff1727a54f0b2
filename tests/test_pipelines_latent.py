"""Latent pipelines of diffusers with our scheduler: Stable Diffusion, PixArt, SD3 and Flux, tiny and random."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `latent_pipelines.py` measured, in a process of its own."""
    scripts = [str(Path(__file__).with_name(f"{name}.py")) for name in ("transformers_stand_in", "latent_pipelines")]
    program = f"import runpy\nfor script in {scripts!r}: runpy.run_path(script, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_stable_diffusion(found: dict[str, Any]) -> None:
    """Stock DDPM's latents; the pipeline's switching off of clip_sample is heeded; every solver runs."""
    of = found["stable diffusion"]
    assert of["ddpm"] < 1e-4  # float32 tables against float64 ones
    assert of["largest"] > 1.5  # latents leave [-1, 1]: nothing was clipped
    assert of["finite"]


def test_image_to_image(found: dict[str, Any]) -> None:
    """`add_noise`, `set_begin_index` and a chain that begins in the middle, as stock DDPM's."""
    assert found["stable diffusion"]["img2img"] < 1e-4
    assert found["stable diffusion"]["img2img heun"]


def test_twin_flow_begins_without_an_evaluation(found: dict[str, Any]) -> None:
    """Guided noise that `scale_model_input` lets flow, as the state made beforehand; an image with noise as it is."""
    assert found["stable diffusion"]["begin"] < 1e-5
    assert found["stable diffusion"]["begin img2img"] < 1e-6


def test_pixart(found: dict[str, Any]) -> None:
    """A learned variance that the pipeline cuts off is asked for, and `keep_head` brings it to the scheduler."""
    of = found["pixart"]
    assert of["head"] == "range"
    assert "lowvar.pipelines.keep_head(pipeline)" in of["without"]
    assert of["kept"] < 1e-6
    assert of["finite"]


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow(name: str, found: dict[str, Any]) -> None:
    """DDIM's steps on a flow are Euler's: stock latents, at stock timesteps, with static and dynamic shift."""
    of = found[name]
    assert of["timesteps"] < 1e-3
    assert of["euler"] < 1e-5
    assert of["finite"]
