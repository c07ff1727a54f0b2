"""Runs diffusers' latent pipelines, tiny and randomly initialised, with our scheduler; prints one JSON table.

A program of its own that `test_pipelines_latent.py` runs after `transformers_stand_in.py`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import diffusers
import torch
from torch import Tensor

from lowvar.calibrate import calibrate
from lowvar.pipelines import keep_head
from lowvar.process import DCTBasis, GaussianTwin, Independent, schedule_from_diffusers
from lowvar.schedulers import ReverseVarianceScheduler

torch.set_num_threads(1)


def embeddings(batch: int, length: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def vae(channels: int) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, layers_per_block=1, latent_channels=channels, sample_size=8
    ).eval()


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    # clip_sample on: the pipeline switches it off in the config of the scheduler it is given
    scheduler: Any = ReverseVarianceScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    made = diffusers.StableDiffusionPipeline(
        vae=vae(4), unet=unet.eval(), scheduler=scheduler, requires_safety_checker=False, **parts
    )
    call = {
        "prompt_embeds": embeddings(2, 4, 8),
        "negative_prompt_embeds": embeddings(2, 4, 8, 1),
        "guidance_scale": 3.0,
    }
    return made, {**call, "height": 8, "width": 8}


def pixart() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
    )
    scheduler: Any = diffusers.DPMSolverMultistepScheduler(variance_type="learned_range")
    made = diffusers.PixArtAlphaPipeline(None, None, vae(4), transformer.eval(), scheduler)  # type: ignore[arg-type]
    mask = torch.ones(2, 4)
    call = {"prompt_embeds": embeddings(2, 4, 8), "negative_prompt_embeds": embeddings(2, 4, 8, 1)}
    call |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    call |= {"prompt": None, "negative_prompt": None, "guidance_scale": 3.0, "use_resolution_binning": False}  # type: ignore[dict-item]
    return made, {**call, "height": 8, "width": 8}


def sd3() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=4,
    )
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    parts: dict[str, Any] = {**dict.fromkeys(names), "transformer": transformer.eval(), "vae": vae(4)}
    made = diffusers.StableDiffusion3Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pooled = {
        "pooled_prompt_embeds": embeddings(2, 1, 8)[:, 0],
        "negative_pooled_prompt_embeds": embeddings(2, 1, 8, 1)[:, 0],
    }
    call = {"prompt_embeds": embeddings(2, 4, 8), "negative_prompt_embeds": embeddings(2, 4, 8, 1), **pooled}
    return made, {**call, "guidance_scale": 3.0, "height": 8, "width": 8}


def flux() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    made = diffusers.FluxPipeline(scheduler=scheduler, vae=vae(1), transformer=transformer.eval(), **parts)
    call = {"prompt_embeds": embeddings(2, 4, 8), "pooled_prompt_embeds": embeddings(2, 1, 8)[:, 0]}
    return made, {**call, "height": 8, "width": 8}


def latents(pipeline: Any, call: dict[str, Any], steps: int = 4, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        made = pipeline(**call, num_inference_steps=steps, generator=generator, output_type="latent", **more)
    return made.images


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def finite(pipeline: Any, call: dict[str, Any], *fields: dict[str, Any], stock: Any = None) -> bool:
    own = pipeline.scheduler if stock is None else stock
    good = []
    for each in fields:
        pipeline.scheduler = ReverseVarianceScheduler.from_scheduler(own, **each)
        good.append(bool(torch.isfinite(latents(pipeline, call)).all()))
    return all(good)


SAMPLERS = [{"sampler": name} for name in ("ddpm-small", "ddim", "adams-sde", "dpmpp-2m", "unipc", "sa", "heun")]


def about_stable_diffusion() -> dict[str, Any]:
    pipeline, call = stable_diffusion()
    ours = latents(pipeline, call)
    config = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    peer: Any = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, steps_offset=1)
    pipeline.scheduler = peer
    found = {"ddpm": distance(ours, latents(pipeline, call)), "largest": float(ours.abs().max())}
    scheduler = ReverseVarianceScheduler.from_scheduler(config)
    found["finite"] = finite(pipeline, call, *SAMPLERS, stock=scheduler)
    # image to image: the chain begins in the middle
    image = diffusers.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    call = {k: v for k, v in call.items() if k not in ("height", "width")}
    picture, results = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)), []
    for each in (peer, ReverseVarianceScheduler.from_scheduler(peer)):
        image.scheduler = each
        results.append(latents(image, call, steps=10, image=picture, strength=0.5))
    found["img2img"] = distance(results[1], results[0])
    image.scheduler = ReverseVarianceScheduler.from_scheduler(peer, sampler="heun", grid=None)
    found |= about_begin(pipeline, call, image, picture)
    found["img2img heun"] = bool(torch.isfinite(latents(image, call, steps=10, image=picture, strength=0.5)).all())
    return found


def about_begin(pipeline: Any, call: dict[str, Any], image: Any, picture: Tensor) -> dict[str, float]:
    """twin-flow: noise handed over (`input`) against the state that `start` makes of it; image to image with both."""
    stock = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    schedule = schedule_from_diffusers(stock.config)
    shape = (4, 8, 8)
    twin = GaussianTwin(torch.zeros(shape), DCTBasis(shape), torch.linspace(1.0, 0.1, 256).reshape(shape))
    data = twin.sample(Independent(1).normal(range(32), shape))
    calibration = calibrate(twin.denoiser(schedule), lambda: [data], replicates=1, components=(), paths=8)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    noise = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
    text, images = [], []
    for mode in ("input", True):
        fields = {"sampler": "twin-flow", "grid": "path", "start_with_twin": mode}
        scheduler = ReverseVarianceScheduler.from_scheduler(stock, calibration, **fields)
        scheduler.set_timesteps(4)
        pipeline.scheduler = image.scheduler = scheduler
        text.append(latents(pipeline, call | {"height": 8, "width": 8}, latents=scheduler.start(noise)))
        images.append(latents(image, call, image=picture, strength=1.0))
    return {"begin": distance(text[0], text[1]), "begin img2img": distance(images[0], images[1])}


def about_pixart() -> dict[str, Any]:
    pipeline, call = pixart()
    stock = pipeline.scheduler
    found: dict[str, Any] = {"finite": finite(pipeline, call, *SAMPLERS, stock=stock)}
    found["head"] = pipeline.scheduler.config["head"]
    learned = ReverseVarianceScheduler.from_scheduler(stock, sampler="ddpm-learned", timestep_spacing="leading")
    pipeline.scheduler = learned
    try:
        latents(pipeline, call)
    except ValueError as error:
        found["without"] = str(error)
    with keep_head(pipeline):
        kept = latents(pipeline, call)
    # the same by hand: conditional half of the head, guided mean
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x = torch.cat([torch.randn(1, 4, *pipeline_shape(pipeline, call), generator=g) for g in generators])
    learned.set_timesteps(4)
    text = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    with torch.no_grad():
        for t in learned.timesteps:
            out = pipeline.transformer(
                torch.cat([x, x]),
                encoder_hidden_states=text,
                encoder_attention_mask=torch.ones(4, 4),
                timestep=t.expand(4),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
            (u, c), head = out[:, :4].chunk(2), out[2:, 4:]
            x = learned.step(torch.cat([u + 3.0 * (c - u), head], 1), t, x, generator=generators).prev_sample
    found["kept"] = distance(kept, x)
    return found


def pipeline_shape(pipeline: Any, call: dict[str, Any]) -> tuple[int, int]:
    return call["height"] // pipeline.vae_scale_factor, call["width"] // pipeline.vae_scale_factor


def about_flow(made: Any) -> dict[str, Any]:
    pipeline, call = made
    stock = pipeline.scheduler
    theirs = latents(pipeline, call, sigmas=[1.0, 0.75, 0.5, 0.25])
    used = stock.timesteps.tolist()
    pipeline.scheduler = ReverseVarianceScheduler.from_scheduler(stock, sampler="ddim")  # Euler's steps are DDIM's
    ours = latents(pipeline, call, sigmas=[1.0, 0.75, 0.5, 0.25])
    found: dict[str, Any] = {"euler": distance(ours, theirs)}
    found["timesteps"] = max(abs(a - b) for a, b in zip(used, pipeline.scheduler.timesteps.tolist(), strict=True))
    found["finite"] = finite(pipeline, call, *SAMPLERS, stock=stock)
    return found


if __name__ == "__main__":
    found = {
        "stable diffusion": about_stable_diffusion(),
        "pixart": about_pixart(),
        "sd3": about_flow(sd3()),
        "flux": about_flow(flux()),
    }
    sys.stdout.write(json.dumps(found) + "\n")
