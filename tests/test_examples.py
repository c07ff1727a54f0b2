"""The examples run, and change what they say they change."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

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
