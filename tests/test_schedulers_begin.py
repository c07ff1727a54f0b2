"""Sampler twin-flow in pipelines that hand over noise: no evaluation is spent on it, and what fails says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate
from lowvar.errors import UserError
from lowvar.own_pipelines import ImagePipeline
from lowvar.process import VE, CosineVP, Flow, Independent, Schedule
from lowvar.schedulers import ReverseVarianceScheduler
from lowvar.testing import mixture8

TARGET = mixture8()
DIM = TARGET.twin.mean.shape
VP = {"schedule": CosineVP().config(), "clip_sample": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "vp": VP,
    "flow": {"schedule": Flow().config(), "prediction_type": "flow_prediction", "clip_sample": False},
    "ve": {"schedule": VE().config(), "prediction_type": "edm", "clip_sample": False},
}


def schedule_of(family: str) -> Schedule:
    return ReverseVarianceScheduler(**FAMILIES[family]).schedule


def network(x: Tensor, t: Any) -> Tensor:
    """Any function of the state and the time will do, as long as it is no twin's."""
    return 0.8 * x + 0.2 * torch.sin(2 * x + 1e-3 * float(t))


@pytest.fixture(scope="module")
def calibrations() -> dict[str, Calibration]:
    data = TARGET.sample(range(256), Independent(1))
    logsnr = torch.linspace(-6, 6, 5, dtype=torch.float64)
    return {
        family: calibrate(TARGET.denoiser(schedule_of(family)), lambda: [data], logsnr=logsnr, replicates=1, paths=16)
        for family in FAMILIES
    }


def made(calibrations: dict[str, Calibration], family: str, mode: bool | str) -> ReverseVarianceScheduler:
    fields = {"sampler": "twin-flow", "grid": "path", "start_with_twin": mode, "calibration": calibrations[family]}
    return ReverseVarianceScheduler(**FAMILIES[family], **fields)


def run(scheduler: ReverseVarianceScheduler, x: Tensor, steps: int, kind: str = "plain") -> Tensor:
    """A pipeline's loop: plain, with the doubled batch of guidance, or DiT's, which steps from the network's input."""
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    for t in scheduler.timesteps:
        if kind == "guided":
            first, second = network(scheduler.scale_model_input(torch.cat([x, x]), t), t).chunk(2)
            assert torch.allclose(first, second)
            out = first
        else:
            entry = scheduler.scale_model_input(x, t)
            out = network(entry, t)
            x = entry if kind == "dit" else x
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("kind", ["plain", "guided", "dit"])
@pytest.mark.parametrize("family", ["vp", "flow", "ve"])
@pytest.mark.parametrize("steps", [1, 3])
def test_noise_flows_to_the_first_level(
    family: str, steps: int, kind: str, calibrations: dict[str, Calibration]
) -> None:
    """Handed over noise, the chain is the one that begins with `start`; a second run, and `start` itself, too."""
    if kind == "dit" and family == "ve":
        pytest.skip("DiT steps from the scaled input, which is no state of an EDM model")
    z = Independent(3).normal(range(4), DIM, dtype=torch.float64)
    wise, plain = made(calibrations, family, True), made(calibrations, family, "input")
    wise.set_timesteps(steps)
    assert float(wise.times[0]) < 1  # below pure noise
    wanted = run(wise, wise.start(z), steps)
    for _ in range(2):
        here = run(plain, z * plain.init_noise_sigma, steps, kind)
        torch.testing.assert_close(here, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(run(plain, plain.start(z), steps, kind), wanted, rtol=0, atol=1e-10)
    noisy = made(calibrations, family, False)
    assert not torch.allclose(run(noisy, z * noisy.init_noise_sigma, steps), wanted, atol=1e-3)


def test_a_pipeline_that_does_not_scale_is_told(calibrations: dict[str, Calibration]) -> None:
    scheduler = made(calibrations, "vp", "input")
    scheduler.set_timesteps(3)
    x = torch.zeros(2, *DIM)
    with pytest.raises(UserError, match="does not call scale_model_input"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.scale_model_input(x, scheduler.timesteps[0])
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(UserError, match="does not call scale_model_input"):  # a second chain has to as well
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(UserError, match="one timestep for the whole batch"):
        scheduler.step(x, scheduler.timesteps[:2], x)
    with pytest.raises(UserError, match="allowed: False, True, input"):
        made(calibrations, "vp", "yes")


def test_an_image_with_noise_is_taken_as_it_is(calibrations: dict[str, Calibration]) -> None:
    """Image to image at full strength and in the middle: `add_noise` makes the state of the level, and it stays so."""
    wise, plain = made(calibrations, "vp", True), made(calibrations, "vp", "input")
    image, eps = (Independent(k).normal(range(4), DIM, dtype=torch.float64) for k in (4, 5))
    for begin in (0, 1):
        results = []
        for scheduler in (wise, plain):
            scheduler.set_timesteps(3)
            scheduler.set_begin_index(begin)
            x = scheduler.add_noise(image, eps, scheduler.timesteps[begin : begin + 1])
            for t in scheduler.timesteps[begin:]:
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            results.append(x)
        torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
    plain.set_timesteps(3)  # and the next chain begins with noise again
    z = Independent(3).normal(range(4), DIM, dtype=torch.float64)
    wise.set_timesteps(3)
    torch.testing.assert_close(run(plain, z, 3), run(wise, wise.start(z), 3), rtol=0, atol=1e-10)


def test_pipelines(tmp_path: Path) -> None:
    """ImagePipeline, which scales, makes K evaluations below pure noise, also as loaded; DDPMPipeline is refused."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    unet: Any = diffusers.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, **blocks
    ).eval()
    calls: list[float] = []

    def note(module: Any, inputs: Any) -> None:
        calls.append(float(inputs[1].reshape(-1)[0]))

    unet.register_forward_pre_hook(note)
    data = 0.5 * Independent(1).normal(range(64), (1, 4, 4))
    first = ReverseVarianceScheduler(beta_schedule="squaredcos_cap_v2")
    denoiser = _denoiser(unet, first.schedule)
    logsnr = torch.linspace(-4, 4, 3, dtype=torch.float64)
    calibration = calibrate(denoiser, lambda: [data], logsnr=logsnr, replicates=1, paths=8)
    fields = {"sampler": "twin-flow", "grid": "path", "start_with_twin": "input"}
    scheduler = ReverseVarianceScheduler.from_scheduler(first, calibration, **fields)
    ImagePipeline(unet, scheduler).save_pretrained(str(tmp_path))
    loaded = ImagePipeline.from_pretrained(str(tmp_path))
    images = []
    for pipeline in (ImagePipeline(unet, scheduler), loaded):
        pipeline.set_progress_bar_config(disable=True)
        calls.clear()
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(2, generator=generator, num_inference_steps=3, output_type="pt").images)
    assert torch.allclose(torch.as_tensor(images[0]), torch.as_tensor(images[1]), atol=1e-5)
    calls.clear()
    ImagePipeline(unet, scheduler)(2, num_inference_steps=3, output_type="pt")
    assert len(calls) == 3
    assert max(calls) < 999
    stock = diffusers.DDPMPipeline(unet, scheduler)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not call scale_model_input"):
        stock(2, num_inference_steps=3)


def _denoiser(unet: Any, schedule: Schedule) -> Any:
    from lowvar.process import NetworkDenoiser

    class Called(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                return unet(x, t).sample

    return NetworkDenoiser(Called(), schedule, clip=1.0)
