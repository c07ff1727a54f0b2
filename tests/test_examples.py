"""The examples run, and change what they say they change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def opened(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_diffusers_training_has_three_changed_lines_and_trains() -> None:
    text = (EXAMPLES / "diffusers_training.py").read_text()
    assert sum("# lowvar" in line for line in text.splitlines() if not line.startswith(("r", '"'))) == 3
    pipeline, losses = opened("diffusers_training").train(12, batch_size=32)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()
    assert pipeline.unet.config["in_channels"] == 1


def test_a_plans_timesteps_are_diffusers_timesteps() -> None:
    """`draws.bin` noises an image exactly as the plan's level says it does."""
    from diffusers import DDPMScheduler

    from lowvar.data import load
    from lowvar.process.discrete import schedule_from_diffusers
    from lowvar.train import CrossPairs, DrawPlan, UniformTimes

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    plan = DrawPlan(
        load("digits").train, schedule_from_diffusers(scheduler.config), 16, pairing=CrossPairs(), stratified=True
    )
    draws = plan.draws(3, UniformTimes(1000))
    shape = (-1, 1, 1, 1)
    ours = draws.level.alpha.reshape(shape) * draws.x0 + draws.level.sigma.reshape(shape) * draws.eps
    theirs = scheduler.add_noise(draws.x0, draws.eps, draws.bin)  # pyright: ignore[reportArgumentType]
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.slow  # six estimators are measured on a U-Net
def test_tuning_a_stock_pipeline_raises_its_reward(tmp_path: Path) -> None:
    """The network of a DDPMPipeline, changed in place: brighter samples, and a folder that diffusers opens."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from lowvar.reward import TuneConfig

    torch.manual_seed(0)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    network = UNet2DModel(**shape, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    pipeline = DDPMPipeline(network, DDPMScheduler())
    config = TuneConfig(updates=8, batch=16, learning_rate=3e-3, beta=1e-4, pilot_batch=16, pilot_repeats=2)
    records = opened("tune_pipeline").tune(pipeline, config, steps=4)
    assert records[0].why
    assert records[-1].reward > records[0].reward + 0.1
    assert records[0].kl < 1e-6 < records[-1].kl
    pipeline.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert torch.equal(next(iter(again.unet.parameters())), next(iter(network.parameters())))
