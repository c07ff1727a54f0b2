"""`lowvar calibrate` on pipeline folders as stock diffusers writes them: any training scheduler, head or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar

from lowvar.pipelines import open_pipeline
from lowvar.schedulers import ReverseVarianceScheduler

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array:DeprecationWarning")

NETWORK: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "block_out_channels": (4,), "norm_num_groups": 2}
NETWORK |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "layers_per_block": 1}
NETWORK |= {"add_attention": False}
SCHEDULERS: dict[str, Any] = {
    "ddpm": diffusers.DDPMScheduler,
    "ddpm, scaled linear, x0": lambda: diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type="sample", variance_type="fixed_large"
    ),
    "ddpm, cosine, v, zero snr": lambda: diffusers.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "ddpm, sigmoid, no clip": lambda: diffusers.DDPMScheduler(beta_schedule="sigmoid", clip_sample=False),
    "ddpm, 200 betas": lambda: diffusers.DDPMScheduler(trained_betas=torch.linspace(1e-3, 0.1, 200).tolist()),
    "ddpm, learned": lambda: diffusers.DDPMScheduler(variance_type="learned_range"),
    "ddim, head": lambda: diffusers.DDIMScheduler(timestep_spacing="trailing"),
    "pndm": lambda: diffusers.PNDMScheduler(steps_offset=1),
    "euler": diffusers.EulerDiscreteScheduler,
    "euler ancestral, v": lambda: diffusers.EulerAncestralDiscreteScheduler(prediction_type="v_prediction"),
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpm-solver": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm-solver, sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "sa": diffusers.SASolverScheduler,
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
    "flow, 100 timesteps": lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
    "ddim, shifted snr": lambda: diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0),
    "flow, heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "edm": lambda: diffusers.EDMEulerScheduler(sigma_data=0.4),
    "edm, dpm-solver": lambda: diffusers.EDMDPMSolverMultistepScheduler(sigma_max=20.0),
}
QUICK = ("ddpm, cosine, v, zero snr", "ddim, head", "flow", "edm")
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULERS]
FEW = ("--n", 24, "--replicates", 1, "--steps", 2, "--choose", 0, "--batch-size", 64)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 8 x 8 grey noise, blurred down the rows; few, as every one is looked at in many ways."""
    folder = tmp_path_factory.mktemp("images")
    noise = torch.rand(40, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(1) / 8
    for i, picture in enumerate(noise):
        Image.fromarray((255 * picture).byte().numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_calibrate_on_a_stock_folder(name: str, lowvar: Lowvar, images: Path, tmp_path: Path) -> None:
    """The folder that comes out opens in diffusers, samples, and samples from the command line."""
    learned = "learned" in name or "head" in name
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**NETWORK, out_channels=2 if learned else 1)
    model, out = tmp_path / "model", tmp_path / "calibrated"
    diffusers.DDPMPipeline(unet, SCHEDULERS[name]()).save_pretrained(model)
    done = lowvar("calibrate", "--model", model, "--data", images, "--out", out, *FEW)
    assert done.status == 0, done.err
    pipeline: Any = open_pipeline(out)
    scheduler = pipeline.scheduler
    assert type(scheduler) is ReverseVarianceScheduler
    assert scheduler.config["sampler"] == "twin-flow"
    assert scheduler.config["head"] == ("range" if learned else None)
    assert json.loads((out / "summary.json").read_text())["fingerprint"] == scheduler.schedule.fingerprint
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    assert made.images.shape == (2, 8, 8, 1)
    # a kernel with a calibrated covariance, through the command line
    file = tmp_path / "samples.npz"
    done = lowvar("sample", "--model", out, "--sampler", "ddpm-basis", "--n", 3, "--steps", 3, "--out", file)
    assert done.status == 0, done.err


def test_folders_that_cannot_be_calibrated(lowvar: Lowvar, tmp_path: Path) -> None:
    for name, scheduler, says in [
        ("score", diffusers.ScoreSdeVeScheduler(), "is variance-exploding"),
        ("ipndm", diffusers.IPNDMScheduler(), "no table of betas"),
        ("edm, v", diffusers.EDMEulerScheduler(prediction_type="v_prediction"), "supported: epsilon"),
    ]:
        diffusers.DDPMPipeline(diffusers.UNet2DModel(**NETWORK, out_channels=1), scheduler).save_pretrained(
            tmp_path / name
        )
        done = lowvar("calibrate", "--model", tmp_path / name, "--data", "digits", "--out", tmp_path / "out", *FEW)
        assert done.status == 2
        assert says in done.sentence
