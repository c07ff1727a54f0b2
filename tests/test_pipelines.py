"""Pipeline folders: round trips through diffusers, what is refused, and networks read as denoisers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from lowvar.calibrate import Calibration, calibrate
from lowvar.errors import UserError
from lowvar.pipelines import ClassConditionalPipeline, denoiser_of, keep_head, network_of, open_pipeline, schedule_of
from lowvar.process.noise import Independent
from lowvar.schedulers import CALIBRATION_FILE, ReverseVarianceScheduler

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries below diffusers


def unet(channels: int = 1, out: int | None = None, **extra: Any) -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=out or channels,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        **extra,
    ).eval()


def small_calibration(denoiser: Any, channels: int = 1) -> Calibration:
    data = Independent(1).normal(range(40), (channels, 8, 8)).clamp(-1, 1)
    logsnr = torch.linspace(-6, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        return calibrate(denoiser, lambda: [data], logsnr=logsnr, replicates=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A calibrated DDPM pipeline with a variance head."""
    stock = diffusers.DDPMPipeline(unet(out=2), diffusers.DDPMScheduler(variance_type="learned_range"))
    calibration = small_calibration(denoiser_of(stock))
    scheduler: Any = ReverseVarianceScheduler.from_scheduler(stock.scheduler, calibration)
    diffusers.DDPMPipeline(stock.unet, scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def images(pipeline: Any, steps: int = 3) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    made = pipeline(batch_size=2, num_inference_steps=steps, generator=generator, output_type="pt")
    return torch.as_tensor(made.images)


# ---------------------------------------------------------------------------------------------------------- round trips


def test_round_trip_through_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == [
        "lowvar.schedulers",
        "ReverseVarianceScheduler",
    ]
    assert (folder / "scheduler" / CALIBRATION_FILE).is_file()
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline.scheduler) is ReverseVarianceScheduler
    assert pipeline.scheduler.config["variance"] == "basis"
    calibration: Any = pipeline.scheduler.calibration
    assert calibration.n == 40
    assert torch.equal(images(pipeline), images(open_pipeline(folder)))
    pipeline.save_pretrained(folder.parent / "again")
    assert torch.allclose(images(pipeline), images(open_pipeline(folder.parent / "again")), atol=1e-6)
    # a program that has not imported the module is told what to do
    monkeypatch.delitem(sys.modules, "lowvar.schedulers")
    with pytest.raises(ValueError, match=r"import lowvar\.schedulers before calling `from_pretrained`"):
        diffusers.DiffusionPipeline.from_pretrained(folder)


def test_pipeline_is_the_stock_one_with_stock_variance(tmp_path: Path) -> None:
    """The same images as DDPMPipeline with DDPMScheduler: same generator, same draws."""
    for variance in ("fixed_small", "fixed_large"):
        stock = diffusers.DDPMPipeline(unet(3), diffusers.DDPMScheduler(variance_type=variance))
        scheduler: Any = ReverseVarianceScheduler.from_scheduler(stock.scheduler)
        ours = diffusers.DDPMPipeline(stock.unet, scheduler)
        assert torch.allclose(images(stock, 10), images(ours, 10), atol=1e-4)


def test_other_schedulers_take_its_place(folder: Path) -> None:
    """And it takes theirs: the usual way of changing a pipeline's scheduler."""
    pipeline = open_pipeline(folder)
    with_head = pipeline.scheduler
    pipeline.scheduler = diffusers.DDPMScheduler.from_config(with_head.config, variance_type="learned_range")
    assert bool(torch.isfinite(images(pipeline)).all())
    pipeline.scheduler = ReverseVarianceScheduler.from_scheduler(pipeline.scheduler, with_head.calibration)
    assert bool(torch.isfinite(images(pipeline)).all())


def dit() -> diffusers.DiTPipeline:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, layers_per_block=1)
    scheduler: Any = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer.eval(), vae.eval(), scheduler)


def test_dit(tmp_path: Path) -> None:
    pipeline: Any = dit()
    pipeline.set_progress_bar_config(disable=True)
    choices: list[dict[str, Any]] = [{}, {"sampler": "adams-ode"}, {"sampler": "adams-sde"}]
    for fields in choices:
        pipeline.scheduler = ReverseVarianceScheduler.from_scheduler(pipeline.scheduler, head="range", **fields)
        made = pipeline([1, 2], num_inference_steps=3, output_type="np", guidance_scale=2.0)
        assert made.images.shape == (2, 4, 4, 3)
    pipeline.save_pretrained(tmp_path)
    denoiser = denoiser_of(open_pipeline(tmp_path), class_labels=7)
    assert (denoiser.head, denoiser.clip, denoiser.prediction) == ("range", None, "epsilon")
    x = torch.zeros(3, 4, 4, 4)
    with torch.no_grad():
        posterior = denoiser(x, denoiser.schedule.at(0.5))
        each = denoiser_of(pipeline, class_labels=torch.tensor([7, 7, 7]))(x, denoiser.schedule.at(0.5))
    assert posterior.mean.shape == x.shape
    assert posterior.fraction is not None
    assert torch.equal(posterior.mean, each.mean)
    with pytest.raises(UserError, match="DiTTransformer2DModel is conditioned on a class: give class_labels"):
        denoiser_of(pipeline)


def test_dit_with_its_learned_variance() -> None:
    """The pipeline cuts the head off; with `keep_head` the chain is the one of the whole output."""
    pipeline: Any = dit()
    pipeline.set_progress_bar_config(disable=True)
    fields: dict[str, Any] = {"sampler": "ddpm-learned", "head": "range"}
    pipeline.scheduler = scheduler = ReverseVarianceScheduler.from_scheduler(pipeline.scheduler, **fields)
    seen: list[Tensor] = []
    pipeline.vae.decode = lambda z: seen.append(z) or SimpleNamespace(sample=z)
    call: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 2.0}
    with pytest.raises(UserError, match="cuts the head off"):
        pipeline([1, 2], **call)
    with keep_head(pipeline):
        torch.manual_seed(3)
        pipeline([1, 2], **call)
    with pytest.raises(UserError, match="cuts the head off"):  # nothing is left behind
        pipeline([1, 2], **call)
    torch.manual_seed(3)
    x = torch.cat([torch.randn(2, 4, 4, 4)] * 2)
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = torch.cat([x[:2]] * 2)
            labels = torch.tensor([1, 2, 1000, 1000])
            out = pipeline.transformer(x, timestep=t.expand(4), class_labels=labels).sample
            (c, u), head = out[:, :4].chunk(2), out[:, 4:]
            guided = torch.cat([u + 2.0 * (c - u)] * 2)
            x = scheduler.step(torch.cat([guided, head], 1), t, x).prev_sample
    assert torch.allclose(seen[0] * pipeline.vae.config.scaling_factor, x[:2], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- denoisers


def test_denoiser_of_a_pipeline(folder: Path) -> None:
    pipeline = open_pipeline(folder)
    denoiser = denoiser_of(pipeline)
    assert denoiser.network is network_of(pipeline) is pipeline.unet
    assert not pipeline.unet.training
    assert (denoiser.head, denoiser.clip, denoiser.prediction) == ("range", 1.0, "epsilon")
    assert denoiser.schedule.fingerprint == pipeline.scheduler.calibration.fingerprint
    level, x = denoiser.schedule.at(0.5), torch.full((2, 1, 8, 8), 0.1)
    with torch.no_grad():
        out = pipeline.unet(x, 499).sample[:, :1]
        posterior = denoiser(x, level)
    wanted = (x - level.sigma * out) / level.alpha
    assert torch.allclose(posterior.mean, wanted.clamp(-1, 1), atol=1e-5)
    assert denoiser_of(pipeline, clip=0.5, head="logvar").head == "logvar"


@pytest.mark.parametrize(
    ("scheduler", "prediction", "clip", "family"),
    [
        (diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample_range=2.0), "v_prediction", 2.0, "vp"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="sample"), "sample", None, "vp"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), "flow", None, "flow"),
        (diffusers.EDMEulerScheduler(), "edm", None, "ve"),
    ],
)
def test_schedulers_say_what_is_predicted(scheduler: Any, prediction: str, clip: float | None, family: str) -> None:
    denoiser = denoiser_of(diffusers.DDPMPipeline(unet(), scheduler))
    assert (denoiser.prediction, denoiser.clip, denoiser.head) == (prediction, clip, None)
    assert denoiser.schedule.family == schedule_of(scheduler).family == family


def test_networks_that_cannot_be_read() -> None:
    def pipeline(network: nn.Module) -> Any:
        made: Any = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler())
        made.unet = network
        return made

    with pytest.raises(UserError, match="takes 1 channels and returns 3"):
        denoiser_of(pipeline(unet(1, 3)))
    with pytest.raises(UserError, match="no channels for one"):
        denoiser_of(pipeline(unet()), head="range")
    with pytest.raises(UserError, match="give class_labels"):
        denoiser_of(pipeline(unet(num_class_embeds=10)))
    labelled = denoiser_of(pipeline(unet(num_class_embeds=10)), class_labels=3)
    with torch.no_grad():
        assert labelled(torch.zeros(2, 1, 8, 8), labelled.schedule.at(0.5)).mean.shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="neither a unet nor a transformer"):
        network_of(object())


# ------------------------------------------------------------------------------------------------------------- refusals


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        open_pipeline(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        open_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        open_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="holds no table of components"):
        open_pipeline(tmp_path)


def test_code_is_not_run(folder: Path) -> None:
    edit(folder, _class_name=["pipeline", "Mine"])
    with pytest.raises(UserError, match="custom pipelines are code"):
        open_pipeline(folder)
    edit(folder, _class_name="Mine")
    with pytest.raises(UserError, match="names the pipeline 'Mine'"):
        open_pipeline(folder)
    edit(folder, _class_name="DDPMPipeline", scheduler=["os", "system"])
    with pytest.raises(UserError, match="takes its scheduler from the module 'os'; allowed: diffusers, transformers"):
        open_pipeline(folder)
    edit(folder, scheduler=["lowvar.schedulers", "torch"])
    with pytest.raises(UserError, match="there is ReverseVarianceScheduler only"):
        open_pipeline(folder)
    edit(folder, scheduler=["lowvar.schedulers", "ReverseVarianceScheduler"])
    code = folder / "scheduler" / "lowvar.schedulers.py"
    code.write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="holds code"):
        open_pipeline(folder)
    code.unlink()
    open_pipeline(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    pickle = weights.with_suffix(".bin")
    pickle.write_bytes(b"not read")
    open_pipeline(folder)  # safetensors beside it are taken
    weights.unlink()
    with pytest.raises(UserError, match="holds its weights as a pickle"):
        open_pipeline(folder)
    pickle.unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        open_pipeline(folder)


def test_broken_parts_are_said_in_a_sentence(folder: Path) -> None:
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be opened"):
        open_pipeline(folder)


def test_a_calibration_of_another_schedule(folder: Path) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.03}))
    with pytest.raises(UserError, match="was made for a noise schedule with fingerprint"):
        open_pipeline(folder)


def test_names_of_two_classes_are_no_component(tmp_path: Path) -> None:
    own = ClassConditionalPipeline(unet(num_class_embeds=3), diffusers.DDPMScheduler(), ["cat", "dog"])
    own.save_pretrained(str(tmp_path))
    opened = open_pipeline(tmp_path)
    assert opened.classes == ("cat", "dog")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = "DDPMPipeline"  # where the name means nothing, it is a component
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="takes its classes from the module 'cat'"):
        open_pipeline(tmp_path)
