"""Tables by class in a pipeline's call: every sample reads the table of its own class, and of its guidance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, ConditionalTable, calibrate
from lowvar.errors import UserError
from lowvar.evaluation import sampler_of
from lowvar.pipelines import ClassConditionalPipeline
from lowvar.process import Independent, NetworkDenoiser, WithCovariance
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.schedulers import ReverseVarianceScheduler, sampler_fields

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries below diffusers
SHAPE = (1, 8, 8)
SCHEDULE = schedule_from_diffusers({})
FACTORS = (0.25, 1.0, 4.0)
SAMPLERS = ("ddpm-basis", "ddim-basis", "ddpm-pixel", "ddpm-isotropic", "unipc-basis")


def network(x: Tensor, t: Any) -> Tensor:
    return 0.7 * x + 0.1 * torch.sin(3 * x)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Of three classes, whose tables are those of all classes times a factor, at guidance 2."""
    data = Independent(1).normal(range(40), SHAPE).clamp(-1, 1)
    logsnr = torch.linspace(-6, 6, 4, dtype=torch.float64)
    denoiser = NetworkDenoiser(network, SCHEDULE, clip=1.0)
    made = calibrate(denoiser, lambda: [data], logsnr=logsnr, replicates=1, components=(), paths=0)
    tables = {
        name: ConditionalTable(tuple(replace(table, variance=f * table.variance) for f in FACTORS))
        for name, table in made.tables.items()
    }
    return replace(made, conditional=tables, guidance=2.0)


def scheduler(calibration: Calibration, name: str) -> ReverseVarianceScheduler:
    return ReverseVarianceScheduler(grid="trailing", calibration=calibration, **sampler_fields(name))


def run(made: ReverseVarianceScheduler, x: Tensor, index: list[int], steps: int = 4) -> Tensor:
    made.set_timesteps(steps)
    for t in made.timesteps:
        x = made.step(network(x, t), t, x, generator=Independent(3), index=index).prev_sample
    return x


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sample_has_the_table_of_its_class(name: str, calibration: Calibration) -> None:
    made, labels = scheduler(calibration, name), [2, 0, 2, 1]
    x = Independent(8).normal(range(4), SHAPE)
    plain = run(made, x, [0, 1, 2, 3])
    made.keep_classes(torch.tensor(labels), 2.0)
    mixed = run(made, x, [0, 1, 2, 3])
    for i, label in enumerate(labels):
        own = run(scheduler(calibration.of_class(label), name), x[i : i + 1], [i])
        assert torch.allclose(mixed[i : i + 1], own, atol=1e-5)
        made.keep_classes(label, 2.0)  # one class for all is the table of that class
        assert torch.allclose(run(made, x[i : i + 1], [i]), own, atol=1e-6)
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)
    made.keep_classes(labels, 1.5)  # measured under another guidance
    assert torch.equal(run(made, x, [0, 1, 2, 3]), plain)
    made.keep_classes(None)
    assert torch.equal(run(made, x, [0, 1, 2, 3]), plain)


def test_a_doubled_batch_repeats_its_classes(calibration: Calibration) -> None:
    made = scheduler(calibration, "ddim-basis")
    made.keep_classes([0, 2], 2.0)
    x = Independent(8).normal(range(2), SHAPE)
    once = run(made, x, [0, 1])
    assert torch.allclose(run(made, torch.cat([x, x]), [0, 1, 0, 1]), torch.cat([once, once]), atol=1e-6)
    with pytest.raises(ValueError, match="2 class labels for 3 states"):
        run(made, torch.cat([x, x[:1]]), [0, 1, 2])


def test_classes_that_cannot_be(calibration: Calibration) -> None:
    made = scheduler(calibration, "ddpm-basis")
    with pytest.raises(UserError, match=r"class_labels is \[3\]; calibrated classes: 0 to 2"):
        made.keep_classes(3)
    with pytest.raises(UserError, match="class_labels is empty"):
        made.keep_classes([])
    made.keep_classes([0, 1], 2.0)
    made.set_timesteps(4)
    x = torch.zeros(2, *SHAPE)
    with pytest.raises(UserError, match="several classes take one timestep"):
        made.step(x, made.timesteps[:2], x)
    plain = ReverseVarianceScheduler()
    plain.keep_classes([7])  # nothing is calibrated: nothing to read
    plain.set_timesteps(2)
    assert plain.step(x, plain.timesteps[0], x).prev_sample.shape == x.shape


def conditional(calibration: Calibration, name: str) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        num_class_embeds=4,  # three, and the null class
    )
    made = ClassConditionalPipeline(unet.eval(), scheduler(calibration, name), ["a", "b", "c"])
    made.set_progress_bar_config(disable=True)
    return made


def test_the_pipelines_say_their_classes(calibration: Calibration) -> None:
    pipeline = conditional(calibration, "ddpm-basis")

    def images(made: ClassConditionalPipeline, **words: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.as_tensor(made(2, generator, 3, output_type="pt", **words).images)

    of_all = conditional(replace(calibration, conditional={}), "ddpm-basis")
    for label in (0, 2):
        own = conditional(calibration.of_class(label), "ddpm-basis")
        words = {"class_labels": label, "guidance_scale": 2.0}
        assert torch.equal(images(pipeline, **words), images(own, **words))
        assert not torch.allclose(images(pipeline, **words), images(of_all, **words), atol=1e-3)
    assert torch.equal(images(pipeline), images(of_all))  # the call before is forgotten
    words = {"class_labels": 0}  # at guidance 1 nothing was measured
    assert torch.equal(images(pipeline, **words), images(of_all, **words))
    mixed = images(pipeline, class_labels=[0, 2], guidance_scale=2.0)
    assert torch.allclose(mixed[:1], images(pipeline, class_labels=0, guidance_scale=2.0)[:1], atol=1e-5)


def test_the_sampler_of_a_class_reads_its_table(calibration: Calibration) -> None:
    pipeline = conditional(calibration, "ddpm-basis")
    for label, guidance, factor in ((0, 2.0, 0.25), (0, 1.0, 1.0), (None, 1.0, 1.0)):
        denoiser = sampler_of(pipeline, 3, label=label, guidance=guidance).denoiser
        assert isinstance(denoiser, WithCovariance)
        table: Any = denoiser.model
        assert torch.allclose(table.variance, factor * calibration.table("basis").variance)


def test_dit_is_told_before_its_call(calibration: Calibration) -> None:
    """DiTPipeline doubles the batch that it steps; the classes of its call are said to the scheduler before."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_num_groups=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, layers_per_block=1, latent_channels=1)
    made: Any = scheduler(calibration, "ddpm-basis")
    pipeline: Any = diffusers.DiTPipeline(transformer.eval(), vae.eval(), made)
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        torch.manual_seed(1)  # it hands no generator to the scheduler
        words = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
        return torch.as_tensor(pipeline([2, 2], **words).images)

    plain = images()
    assert torch.equal(plain, images())
    made.keep_classes([2, 2], 2.0)
    told = images()
    assert not torch.allclose(told, plain, atol=1e-4)
    pipeline.scheduler = scheduler(calibration.of_class(2), "ddpm-basis")
    assert torch.equal(told, images())
