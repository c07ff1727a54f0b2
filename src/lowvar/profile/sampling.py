r"""The profile of a reverse process within a budget of time: error curve, covariance, variances of steps, grids.

In this order, each with its share of the time and a least size below which it has no interval:

    calibration   the error curve and tables (`lowvar.calibrate`), unless the model has them
    structure     what families of covariances catch of C(x_t), at 8 noise levels (`lowvar.profile.structure`)
    variances     the sampler's own, one measured number a level, and the table in the twin's basis, on the sampler's
                  grid (`lowvar.profile.reverse`)
    grids         path KL by number of steps, predicted from the calibration (`lowvar.process.cost`)

What does not fit is left out, with a note of what it would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate import Calibration, calibrate
from lowvar.calibrate.grids import calibrated_grid, cost_curve
from lowvar.calibrate.measurement import default_logsnr
from lowvar.calibrate.path import LEVELS, PATHS, SHARED
from lowvar.data import Data, Images
from lowvar.errors import UserError
from lowvar.metrics.intervals import MIN_BLOCKS, Interval
from lowvar.process.denoiser import NetworkDenoiser, expand
from lowvar.process.grid import trailing
from lowvar.process.kernel import ReverseKernel
from lowvar.process.noise import Independent
from lowvar.profile.reverse import ReverseVariance, StepRows, VarianceCheck, checked, lost, step_rows
from lowvar.profile.structure import Structure, StructureBlocks, structure_blocks

__all__ = ["Predicted", "ReverseProfile", "profile_reverse", "seconds_per_evaluation"]

KNOTS, LEVEL_COUNT, _SIZE, _RANK = 25, 8, 16, 2
_MOST_IMAGES, _MOST_STATES, _MOST_CHECKED, _LEAST = 1024, 512, 512, 32
_TWIN_IMAGES = 20_000
PREDICTED_STEPS = (3, 5, 10, 20, 50)
NUMBER = "one number a level"


@dataclass(frozen=True)
class Predicted:
    """Path KL of steps, predicted.

    Attributes:
        grid: name of the grid.
        variance: of the steps.
        steps: K.
        bits: above continuous time, a dimension.
    """

    grid: str
    variance: str
    steps: int
    bits: float


@dataclass(frozen=True, eq=False)
class ReverseProfile:
    """What was found.

    Attributes:
        calibration: the model's own, or the one that was made.
        structures: by noise level; () where there was no time.
        own: name of the sampler's own variance among `checks`, or None for a sampler without noise.
        checks: variances by name; {} where there was no time.
        paid: bits that the own variance costs more than one number a level.
        saved: bits that the table in the twin's basis costs less than that number.
        predicted: path KL by grid and steps.
        notes: what was left out, and why.
        seconds: that it took.
    """

    calibration: Calibration
    structures: tuple[Structure, ...]
    own: str | None
    checks: dict[str, VarianceCheck]
    paid: Interval | None
    saved: Interval | None
    predicted: tuple[Predicted, ...]
    notes: tuple[str, ...]
    seconds: float


@torch.no_grad()
def seconds_per_evaluation(denoiser: NetworkDenoiser, x0: Tensor) -> float:
    """Seconds of a network evaluation of one image in a batch, the second of two.

    Args:
        denoiser: the network.
        x0: images (b, *event_shape), on its device.
    """
    level = denoiser.schedule.at(torch.tensor(0.5, dtype=torch.float64)).to(x0.device)
    x = expand(level.alpha, x0) * x0
    begun = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        float(denoiser(x, level).mean.sum())
    return (time.perf_counter() - begun) / len(x0)


def profile_reverse(
    denoiser: NetworkDenoiser,
    data: Data,
    *,
    own: ReverseVariance | None = None,
    grid: Tensor | None = None,
    calibration: Calibration | None = None,
    steps: int = 10,
    seconds: float = 60.0,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    structure: bool = True,
    progress: Callable[[float], Any] | None = None,
) -> ReverseProfile:
    """Profiles the reverse process of a network.

    Args:
        denoiser: the network, with the clipping it is sampled with.
        data: its splits.
        own: the variance of the sampler in use, or None where it adds no noise.
        grid: its grid, (K + 1,) (default: trailing).
        calibration: of the model, or None.
        steps: K, for the default grid.
        seconds: budget.
        seed: of all draws.
        batch_size, device: of the network's evaluations.
        structure: whether more than the calibration is wanted.
        progress: called with the part of the work done, in [0, 1].

    Raises:
        UserError: for fewer than 32 images in the calibration or test split.
    """
    for name, split in (("calibration", data.calibration), ("test", data.test)):
        if len(split) < _LEAST:
            raise UserError(
                f"the {name} split has {len(split)} images; the profile of the reverse process needs {_LEAST}: give "
                "more data, or leave that part out"
            )
    begun = time.perf_counter()
    told = progress or (lambda part: None)
    first = data.test.images(torch.arange(min(batch_size, len(data.test)))).to(device)
    each = seconds_per_evaluation(denoiser, first)
    notes: list[str] = []
    if calibration is None:
        calibration = _calibrated(denoiser, data, each, seconds / 2, seed, batch_size, device, notes)
    told(0.4)
    if not structure:
        return ReverseProfile(calibration, (), None, {}, None, None, (), tuple(notes), time.perf_counter() - begun)
    structures = _structures(denoiser, data.test, calibration, seconds / 4, seed, device, notes)
    told(0.7)
    points = trailing(denoiser.schedule, steps) if grid is None else grid
    if len(points) < 3:
        notes.append("the variances of 1 step to clean data are not checked: give 2 steps or more")
        checks, rows = {}, {}
    else:
        checks, rows = _checks(
            denoiser, data.test, calibration, own, points, each, seconds / 4, seed, batch_size, device
        )
    told(1.0)
    return ReverseProfile(
        calibration,
        structures,
        None if own is None else own.name,
        checks,
        lost(rows[own.name], rows[NUMBER]) if own is not None and rows else None,
        lost(rows[NUMBER], rows["basis"]) if rows else None,
        predicted_costs(denoiser, calibration, own),
        tuple(notes),
        time.perf_counter() - begun,
    )


def _batches(images: Images, n: int, batch_size: int, device: torch.device | str) -> Iterator[Tensor]:
    for batch in images.batches(batch_size, torch.arange(min(n, len(images)))):
        yield batch.to(device)


def _calibrated(
    denoiser: NetworkDenoiser,
    data: Data,
    each: float,
    seconds: float,
    seed: int,
    batch_size: int,
    device: torch.device | str,
    notes: list[str],
) -> Calibration:
    """A calibration of the size that the time allows."""
    n = int(min(max(seconds / 2 / (KNOTS * each), _LEAST), _MOST_IMAGES, len(data.calibration)))
    cost = (PATHS * LEVELS + min(n, SHARED) * LEVELS // 2) * each
    paths = PATHS if cost <= seconds / 2 else 0
    if not paths:
        notes.append(f"samplers on path statistics are not measured: these take {cost:.0f} seconds")
    return calibrate(
        denoiser,
        lambda: _batches(data.calibration, n, batch_size, device),
        twin_batches=lambda: _batches(data.train, _TWIN_IMAGES, 1024, "cpu"),
        logsnr=default_logsnr(denoiser.schedule, KNOTS),
        replicates=1,
        noise=Independent(seed + 11),
        bound=denoiser.clip,
        components=(),
        paths=paths,
        levels=data.levels,
    )


def _structures(
    denoiser: NetworkDenoiser,
    images: Images,
    calibration: Calibration,
    seconds: float,
    seed: int,
    device: torch.device | str,
    notes: list[str],
) -> tuple[Structure, ...]:
    """Rounds until the time is over; none where the least number takes more than three times it."""
    t_min = max(denoiser.schedule.t_min, 1e-5)
    t = t_min + (1 - t_min) * (torch.arange(LEVEL_COUNT, dtype=torch.float64) + 0.5) / LEVEL_COUNT
    levels = denoiser.schedule.at(t)
    begun = time.perf_counter()
    rounds: list[tuple[StructureBlocks, ...]] = []
    needed = -(-MIN_BLOCKS // _SIZE)
    stream = structure_blocks(
        denoiser,
        images,
        levels,
        calibration.twin.basis,
        Independent(seed + 12),
        rank=_RANK,
        size=_SIZE,
        device=device,
    )
    for made in stream:
        rounds.append(made)
        spent = time.perf_counter() - begun
        one = spent / len(rounds)
        if len(rounds) < needed and one * needed > 3 * seconds:
            notes.append(f"the structure of the covariance is not measured: it takes {one * needed:.0f} seconds")
            return ()
        if len(rounds) >= needed and (spent + one > seconds or len(rounds) * _SIZE >= _MOST_STATES):
            break
    return tuple(StructureBlocks.joined([r[k] for r in rounds]).shares() for k in range(LEVEL_COUNT))


def _checks(
    denoiser: NetworkDenoiser,
    images: Images,
    calibration: Calibration,
    own: ReverseVariance | None,
    grid: Tensor,
    each: float,
    seconds: float,
    seed: int,
    batch_size: int,
    device: torch.device | str,
) -> tuple[dict[str, VarianceCheck], dict[str, list[StepRows]]]:
    eta = 1.0 if own is None else own.kernel.eta
    made = [ReverseVariance(NUMBER, ReverseKernel(eta), calibration.model("isotropic"))]
    made += [ReverseVariance("basis", ReverseKernel(eta), calibration.model("basis"))]
    made += [] if own is None else [own]
    n = int(min(max(seconds / (2 * (len(grid) - 2) * each), _LEAST), _MOST_CHECKED, len(images)))
    rows: dict[str, list[StepRows]] = {v.name: [] for v in made}
    for part in step_rows(denoiser, made, grid, _batches(images, n, batch_size, device), Independent(seed + 13)):
        for name, found in part.items():
            rows[name].append(found)
    return checked(denoiser, grid, rows), rows


def predicted_costs(
    denoiser: NetworkDenoiser, calibration: Calibration, own: ReverseVariance | None, steps: Sequence[int] | None = None
) -> tuple[Predicted, ...]:
    """Path KL of the usual grid and of the one made for the covariance table, by number of steps, in bits.

    Args:
        denoiser: the network.
        calibration: of it.
        own: the sampler's variance; `small` is predicted as such, others as the best number a level.
        steps: numbers K.
    """
    schedule, levels = denoiser.schedule, calibration.levels
    structure = "small" if own is not None and own.kernel.variance == "small" else "isotropic"
    bit = torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    usual = cost_curve(calibration, schedule, structure, levels)
    found = []
    for k in PREDICTED_STEPS if steps is None else steps:
        words = structure if structure == "small" else NUMBER
        grid = trailing(schedule, k)
        found.append(Predicted("trailing", words, k, usual.grid_kl(schedule, grid) / usual.d / bit))
        plan = calibrated_grid("variance-matched:basis", calibration, schedule, k, levels=levels)
        found.append(Predicted("variance-matched:basis", "basis", k, plan.path_kl / bit))
    return tuple(found)
