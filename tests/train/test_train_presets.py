"""The preset `variance_reduction: auto`: what it stands for, and that all of it together is unbiased."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lowvar.errors import UserError
from lowvar.process import Independent
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.train import (
    PRESETS,
    CrossPairs,
    DrawPlan,
    GradientNormTimes,
    Objective,
    ReferencePlan,
    Simple,
    TrainConfig,
    UniformTimes,
    config_from,
    make_plan,
    make_references,
    make_schedule,
    make_times,
    reference_noise,
)

DATA = torch.tensor([-0.9, -0.2, 0.1, 0.4, 0.8, 0.9]).reshape(-1, 1, 1, 1)


class Images:
    def __len__(self) -> int:
        return len(DATA)

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        return DATA[indices]


class Line(nn.Module):
    """eps_hat = w x."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.w * x


def test_auto_is_the_parts_and_what_is_given_wins() -> None:
    config = config_from({"variance_reduction": "auto", "pairing": "same", "updates": 3})
    assert (config.times, config.stratified, config.pairing, config.target) == (
        "gradient-norm",
        True,
        "same",
        "stable",
    )
    assert config_from(yaml.safe_load("variance_reduction: off")) == config_from({}) == TrainConfig()
    assert config_from(yaml.safe_load("variance_reduction: 'off'")) == TrainConfig()


@pytest.mark.parametrize("coupling", ["optimal-transport", "immiscible"])
def test_a_stable_target_refuses_noise_that_knows_the_images(coupling: str) -> None:
    with pytest.raises(UserError, match=f"coupling is {coupling} and target stable.*leave one of them out"):
        config_from({"target": "stable", "coupling": coupling})


def test_the_preset_goes_with_classes() -> None:
    assert config_from({"variance_reduction": "auto", "conditional": True}).target == "stable"


@pytest.mark.parametrize("word", ["full", 1, None, ["auto"], True])
def test_other_words_are_refused(word: object) -> None:
    with pytest.raises(UserError, match=r"variance_reduction is .*; allowed: off, auto"):
        config_from({"variance_reduction": word})


def test_every_part_of_auto_is_unbiased() -> None:
    config = config_from({"variance_reduction": "auto", "batch_size": 8})
    schedule = make_schedule(config)
    plan, references = make_plan(config, Images(), schedule), make_references(config, Images())
    assert references is not None
    assert make_times(config, schedule).label == plan.pairing.label == references.target(0).label == "unbiased"
    assert plan.stratified
    assert set(PRESETS["auto"]) <= set(TrainConfig.__dataclass_fields__)


@pytest.mark.parametrize("include", [True, False])
def test_all_of_it_together_has_the_plain_expected_gradient(include: bool) -> None:
    """|z| < 4 over 1,500 batches, detecting a bias of 6% of the gradient; with the source left out there is one."""
    steps, w = 4, 0.3
    schedule = make_schedule(config_from({"train_timesteps": steps}))
    network = Line(w)
    denoiser = NetworkDenoiser(network, schedule, "epsilon")
    times = GradientNormTimes(plain=UniformTimes(steps), bins=steps, least=1)
    times = times.updated(torch.arange(steps), torch.tensor([9.0, 1.0, 0.3, 4.0]))
    assert times.warm
    plan = DrawPlan(Images(), schedule, 64, 3, Independent(3), pairing=CrossPairs(), stratified=True)
    references = ReferencePlan(Images(), 3, reference_noise(3), include_source=include)
    found = []
    for update in range(1500):
        draws = plan.draws(update, times)
        losses = Objective(Simple()).losses(denoiser, draws.x0, draws.eps, draws.level, references.target(update))
        loss = (draws.weight.to(losses.loss) * losses.loss).mean()
        found.append(float(torch.autograd.grad(loss, [network.w])[0]))
    level = schedule.at((torch.arange(steps) + 1) / steps)
    second = float((DATA.double() ** 2).mean())
    exact = float((-2 * level.sigma + 2 * w * (level.alpha**2 * second + level.sigma**2)).mean())
    values = torch.tensor(found, dtype=torch.float64)
    # batches of an epoch are not independent (6 images): standard error over blocks of 15
    blocks = values.reshape(-1, 15).mean(1)
    z = (float(blocks.mean()) - exact) / (float(blocks.std()) / math.sqrt(len(blocks)))
    if include:
        assert abs(z) < 4
        assert float(blocks.std()) / math.sqrt(len(blocks)) < 0.015 * abs(exact)
    else:
        assert abs(z) > 6


def test_command_line(tmp_path: Path) -> None:
    from lowvar.cli import main

    arguments = ["train", "--data", "digits", "--updates", "2", "--batch-size", "4", "--quiet", "--device", "cpu"]
    assert main([*arguments, "--variance-reduction", "auto", "--out", str(tmp_path / "run")]) in (0, None)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    text = str(kept)
    assert "'stratified': True" in text
    assert "'target': 'stable'" in text
