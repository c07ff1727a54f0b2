"""Trained heads as samplers, ddpm-NAME and ddim-NAME: the same chain in a pipeline as in `lowvar.sample`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import HEADS, Calibration, FitConfig, add_head, calibrate, convert
from lowvar.calibrate.convert import Converted
from lowvar.calibrate.estimator import EVERYWHERE
from lowvar.calibrate.table import Structure
from lowvar.cli.models import Model, default_samplers
from lowvar.errors import UserError
from lowvar.evaluation import Cell, check_cell, draw, resolve
from lowvar.process import Independent, NetworkDenoiser, ReverseKernel, schedule_from_diffusers
from lowvar.process.grid import make_grid
from lowvar.sample import COVARIANCES, generate, named_sampler
from lowvar.schedulers import ReverseVarianceScheduler, sampler_fields
from lowvar.testing import random_mixture

torch.set_num_threads(1)
SHAPE, CLIP, N, STEPS = (1, 2, 2), 4.0, 5, 6
FIELDS: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "clip_sample_range": CLIP, "grid": "trailing"}
SCHEDULE = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
TARGET = random_mixture(4, 3, seed=2, width=0.35, ratio=10.0)
NAMES = (*HEADS, "convert")


def clean(x: Tensor, timestep: Tensor) -> Tensor:
    """The exact posterior mean of a mixture, and a learned-range head that depends on the state."""
    level = SCHEDULE.at(SCHEDULE.time_of(timestep.reshape(-1)[:1].double()))[0]
    mean = TARGET.posterior(x.flatten(1), level, None).mean.reshape(x.shape)
    return torch.cat([mean, torch.sin(2 * x)], 1)


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """The same as a noise prediction."""
    level = SCHEDULE.at(SCHEDULE.time_of(timestep.reshape(-1)[:1].double()))[0]
    mean, head = clean(x, timestep).chunk(2, 1)
    return torch.cat([(x - level.alpha.to(x) * mean) / level.sigma.to(x), head], 1)


DENOISER = NetworkDenoiser(network, SCHEDULE, head="range", clip=CLIP)
CLEAN = NetworkDenoiser(clean, SCHEDULE, "sample", head="range", clip=CLIP)
HEADLESS = NetworkDenoiser(lambda x, t: network(x, t)[:, :1], SCHEDULE, clip=CLIP)


def data() -> Tensor:
    return TARGET.sample(range(256), Independent(1)).float().reshape(-1, *SHAPE)


@pytest.fixture(scope="module")
def plain() -> Calibration:
    knots = torch.linspace(-8, 8, 9, dtype=torch.float64)
    return calibrate(DENOISER, lambda: [data()], logsnr=knots, replicates=1, paths=0)


@pytest.fixture(scope="module")
def calibration(plain: Calibration) -> Calibration:
    """With every head: trained for two rounds, in the bases pixel and pca, and used everywhere, gain or none."""
    config = FitConfig(rounds=2, pool=512, epochs=4, batch=64, rate=1e-2, knots=2, replicates=1)
    made = plain
    for name in HEADS:
        basis = "pca" if name in ("sn", "ocm") else "pixel"
        made, _ = add_head(made, DENOISER, data(), name, Independent(3), basis=basis, rank=2, width=8, config=config)
    heads = {name: head.trusted(EVERYWHERE) for name, head in made.heads.items()}
    converted, _ = convert(DENOISER, plain.table("pixel"), data(), Independent(4), knots=3, replicates=1)
    return replace(made, heads=heads, converted=replace(converted, trust=EVERYWHERE))


def through_the_scheduler(
    scheduler: ReverseVarianceScheduler, source: Independent, sizes: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Samples 0 .. sum(sizes) - 1 in batches of these sizes, on one grid: what one batch leaves the next one meets."""
    scheduler.set_timesteps(STEPS)
    asked, parts = (clean if scheduler.config["prediction_type"] == "sample" else network), []
    for index in torch.arange(sum(sizes)).split(sizes):
        x = scheduler.start(source.normal(index, SHAPE, draw=0, dtype=dtype))
        for t in scheduler.timesteps:
            x = scheduler.step(asked(x, t.expand(len(x))), t, x, generator=source, index=index).prev_sample
        parts.append(x)
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["ddpm", "ddim"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_is_generate_with_the_head_attached(name: str, family: str, prediction: str, calibration: Calibration) -> None:
    """Same noise, same samples, in two batches of one size and one of another; the head's table gives others.

    Predictions of the noise in float64: at t = 1 alpha is 5e-5, by which rounding of x0_hat is divided. The head itself
    rounds its inputs to float32.
    """
    sampler, source = named_sampler(f"{family}-{name}"), Independent(7)
    fields: dict[str, Any] = {**FIELDS, **sampler_fields(sampler.name), "head": "range", "prediction_type": prediction}
    scheduler = ReverseVarianceScheduler(**fields, calibration=calibration)
    grid = make_grid("trailing", SCHEDULE, STEPS)
    denoiser, dtype = (CLEAN, torch.float32) if prediction == "sample" else (DENOISER, torch.float64)
    wanted = generate(calibration.attach(denoiser, name), sampler.solver, grid, SHAPE, N, source, dtype=dtype)
    here = through_the_scheduler(scheduler, source, (2, 2, 1), dtype)
    torch.testing.assert_close(here, wanted, rtol=0, atol=1e-5)
    attached = calibration.attach(denoiser, "pixel" if name not in ("sn", "ocm") else "basis")
    other = generate(attached, sampler.solver, grid, SHAPE, N, source, dtype=dtype)
    assert float((wanted - other).abs().max()) > 1e-3, "the head answers with its table: nothing is tested"


@pytest.mark.parametrize("name", NAMES)
def test_a_covariance_of_the_state_is_not_kept(name: str, calibration: Calibration) -> None:
    """A recipe keeps covariances that are a level's; those that declare themselves a state's are asked every time."""
    assert calibration.model(name).declares.per_sample  # type: ignore[attr-defined]
    scheduler = ReverseVarianceScheduler(**FIELDS, variance=name, head="range", calibration=calibration)
    scheduler.set_timesteps(STEPS)
    recipe = scheduler._made_recipe()
    assert not recipe.by_level
    k, t = 2, scheduler.timesteps[2]
    found = []
    for draw_ in range(2):
        x = Independent(8).normal(range(3), SHAPE, draw=draw_)
        posterior = scheduler._reader.read(x, k, network(x, t.expand(3)))
        assert recipe.noise(k, x) is None
        covariance = recipe.covariance(k, x, posterior)
        assert covariance is not None
        found.append(covariance.diagonal())
    assert float((found[0] - found[1]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["npr", "lowrank", "convert"])
def test_in_evaluation_as_in_generate(name: str, calibration: Calibration) -> None:
    """`draw` by the sampler's name, and `resolve` of another sampler with `covariance`."""
    grid = make_grid("trailing", SCHEDULE, STEPS)
    wanted = generate(calibration.attach(DENOISER, name), ReverseKernel(1.0), grid, SHAPE, N, clip=CLIP)
    drawn = draw(DENOISER, Cell(f"ddpm-{name}", STEPS), N, SHAPE, calibration=calibration)
    assert torch.equal(drawn.samples, wanted)
    assert drawn.nfe == STEPS
    sampler, attached = resolve("ddim", DENOISER, calibration, covariance=name, eta=1.0)
    assert torch.equal(generate(attached, sampler.solver, grid, SHAPE, N, clip=CLIP), wanted)


def test_saved_and_read_again(calibration: Calibration, tmp_path: Path) -> None:
    scheduler = ReverseVarianceScheduler(**FIELDS, variance="lowrank", head="range", calibration=calibration)
    scheduler.save_pretrained(tmp_path)
    again: Any = ReverseVarianceScheduler.from_pretrained(tmp_path)
    a, b = (through_the_scheduler(s, Independent(7), (N,), torch.float64) for s in (scheduler, again))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # numbers on disk are float32


def test_every_covariance_has_its_samplers() -> None:
    assert set(COVARIANCES) == {"analytic", *get_args(Structure), *HEADS, Converted.name}
    with pytest.raises(UserError, match=r"sampler is 'ddpm-npt'; allowed: .*ddpm-npr, .*ddpm-convert, .*ddim-lowrank"):
        resolve("ddpm-npt", DENOISER)


def test_a_model_runs_the_heads_that_it_has(plain: Calibration, calibration: Calibration) -> None:
    def names(c: Calibration | None, denoiser: NetworkDenoiser = DENOISER) -> set[str]:
        return set(default_samplers(Model(None, denoiser, c, SHAPE)))

    one = replace(plain, heads={"npr": calibration.heads["npr"]})
    assert names(one) - names(plain) == {"ddpm-npr", "ddim-npr"}
    assert names(calibration) - names(plain) == {f"{family}-{n}" for family in ("ddpm", "ddim") for n in NAMES}
    assert not {n for n in names(plain) | names(None) if n.split("-")[-1] in NAMES}
    assert names(calibration) - names(calibration, HEADLESS) == {"ddpm-learned", "ddpm-convert", "ddim-convert"}
    for name in names(calibration):
        if name != "twin-flow":  # its grid rests on paths, which are not measured here
            check_cell(Cell(name, 3), DENOISER, calibration)


HELD = "calibrated here: analytic, isotropic, pixel, basis"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("npr", f"covariance is 'npr'; {HELD}.*; train it with `lowvar calibrate --head npr`"),
        ("convert", f"covariance is 'convert'; {HELD}.*by `lowvar calibrate --head convert`"),
        ("channel", f"covariance is 'channel'; {HELD}"),
    ],
)
def test_what_is_not_held_is_said_at_once(name: str, said: str, plain: Calibration) -> None:
    """By `resolve`, and by a scheduler when it is made, not at its first step; without a calibration, that it needs
    one.
    """
    fields: dict[str, Any] = {**FIELDS, **sampler_fields(f"ddpm-{name}"), "head": "range"}
    with pytest.raises(UserError, match=said):
        resolve(f"ddpm-{name}", DENOISER, plain)
    with pytest.raises(UserError, match=said):
        resolve("ddim", DENOISER, plain, covariance=name)
    with pytest.raises(UserError, match=said):
        ReverseVarianceScheduler(**fields, calibration=plain)
    with pytest.raises(UserError, match=f"variance '{name}' needs a calibration"):
        ReverseVarianceScheduler(**fields)
    with pytest.raises(UserError, match=f"ddpm-{name} needs a calibrated model"):
        resolve(f"ddpm-{name}", DENOISER)


def test_convert_needs_the_networks_head(calibration: Calibration) -> None:
    with pytest.raises(UserError, match="this one has none"):
        resolve("ddpm-convert", HEADLESS, calibration)
    with pytest.raises(UserError, match="set head to range"):
        ReverseVarianceScheduler(**FIELDS, variance="convert", calibration=calibration)
    scheduler = ReverseVarianceScheduler(**FIELDS, variance="convert", head="range", calibration=calibration)
    scheduler.set_timesteps(STEPS)
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(UserError, match="'convert' need the network's 2 channels"):
        scheduler.step(x, scheduler.timesteps[0], x)
