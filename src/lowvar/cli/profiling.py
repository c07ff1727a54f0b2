"""The parts of a profile that sample: the sampler in use, scores against evaluations, statistics, a reward's gradient.

Each takes seconds to spend and says in a note what did not fit them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowvar.cli.models import Model, scheduler_of
from lowvar.errors import UserError
from lowvar.evaluation import Cell, chain_of, evaluate, recommend
from lowvar.metrics import Scorer, Statistic
from lowvar.pipelines import denoiser_of
from lowvar.process.denoiser import Denoiser
from lowvar.process.grid import GRIDS, trailing
from lowvar.process.head import COVARIANCE_HEADS
from lowvar.process.kernel import ReverseKernel
from lowvar.process.noise import Independent
from lowvar.profile import ReverseVariance, RewardProfile, StatisticProfile, profile_reward, profile_statistic
from lowvar.profile.sampling import seconds_per_evaluation
from lowvar.reward import Floor, NamedReward, Policy, RewardProblem
from lowvar.sample import SAMPLERS
from lowvar.schedulers import ReverseVarianceScheduler

if TYPE_CHECKING:
    from lowvar.calibrate import Calibration
    from lowvar.data import Data

__all__ = ["InUse", "Scores", "in_use", "reward_part", "scores_part", "statistics_part"]

_LEAST, _MOST = 64, 1024  # samples a cell
_BLOCKS = 16
_RUNS, _GROUP = 32, 8  # runs of a batch and of a group of it
_FEATURES = 15.0  # seconds: below, no features are learned for the Frechet distance
_FLOOR = 0.05  # standard deviation of the last step, as `lowvar.reward` says it


@dataclass(frozen=True, eq=False)
class InUse:
    """What the model's scheduler does in `steps` steps.

    Attributes:
        scheduler: as ours.
        words: what it is called.
        cell: sampler and grid by name, or None where they have none.
        variance: of its noise, or of the network's own head; None where it adds none and there is none.
        grid: of its times where it is a kernel with noise; None otherwise.
    """

    scheduler: ReverseVarianceScheduler
    words: str
    cell: Cell | None
    variance: ReverseVariance | None
    grid: Tensor | None


def in_use(model: Model, steps: int) -> InUse:
    """The sampler in use.

    Args:
        model: the model.
        steps: reverse steps.
    """
    made = scheduler_of(model)
    made.set_timesteps(steps)
    solver, covariance = made.parts
    c: Mapping[str, Any] = made.config
    name = _name(c)
    grid = c["grid"] if isinstance(c["grid"], str) else c["timestep_spacing"] if c["grid"] is None else None
    grid = grid if grid in GRIDS or grid == "path" else None
    cell = None if name not in SAMPLERS else Cell(name, steps, grid or SAMPLERS[name].grid)
    if isinstance(solver, ReverseKernel) and solver.eta > 0:
        words = f"the scheduler's ({c['variance']})"
        return InUse(made, name or words, cell, ReverseVariance(words, solver, covariance), made.times)
    if model.denoiser.head in COVARIANCE_HEADS:
        head = ReverseVariance(f"the network's head ({model.denoiser.head})", ReverseKernel(1.0))
        return InUse(made, name or "the scheduler", cell, head, None)
    return InUse(made, name or "the scheduler", cell, None, None)


def _name(c: Mapping[str, Any]) -> str:
    """The name in `SAMPLERS` of a scheduler's fields, or an empty one."""
    if c["sampler"] == "kernel":
        if c["eta"] == 1:
            return f"ddpm-{c['variance']}"
        return "" if c["eta"] else "ddim" if c["variance"] == "small" else f"ddim-{c['variance']}"
    if c["sampler"] in ("multistep", "twin"):
        family = {"multistep": "adams", "twin": "twin"}[c["sampler"]]
        return f"{family}-ode" if c["tau"] == 0 else f"{family}-sde" if c["tau"] == 0.5 else ""
    return str(c["sampler"])


# --------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scores:
    """Quality against evaluations.

    Attributes:
        rows, floor: as of `lowvar evaluate`.
        current, recommended: sampler, grid and steps; None where nothing was scored.
        metric: that decides.
        n: samples a row.
        about: lines on the samplers.
        notes: what was left out.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    floor: dict[str, float] = field(default_factory=dict)
    current: dict[str, Any] | None = None
    recommended: dict[str, Any] | None = None
    metric: str = ""
    n: int = 0
    about: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def scores_part(
    model: Model,
    data: Data,
    calibration: Calibration,
    used: InUse,
    *,
    steps: int,
    seconds: float,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> Scores:
    """Scores of the sampler in use and of others at steps / 2, steps and 2 steps, as many as the time allows.

    Args:
        model: the model.
        data: held-out images to score against.
        calibration: for the samplers that need one.
        used: the sampler in use.
        steps: K.
        seconds: budget.
        seed, batch_size, device: of the samples.
    """
    if len(data.test) < 2 * _BLOCKS:
        return Scores(notes=(f"no scores: the test split has {len(data.test)} images, and they need {2 * _BLOCKS}",))
    first = data.test.images(torch.arange(min(batch_size, len(data.test)))).to(device)
    each = seconds_per_evaluation(model.denoiser, first)
    begun = time.perf_counter()
    pictures = len(data.shape) == 3 and model.bound is not None and seconds >= _FEATURES
    metrics = ("frechet", "energy") if pictures else ("energy",)
    scorer = Scorer(data, metrics=metrics, blocks=_BLOCKS)
    left = max(seconds - (time.perf_counter() - begun), seconds / 3)  # features may have to be learned first
    current = used.cell or Cell("ddim", steps)
    others = ["twin-flow"] if calibration.paths is not None else []
    others += ["unipc-basis", "ddpm-basis", "adams-ode"]
    cells = [current, *(Cell(name, steps) for name in others if name != current.sampler)]
    more = [replace(cell, steps=k) for k in (max(2, steps // 2), 2 * steps) for cell in cells]
    for extent in (cells + more, cells + more[: len(cells)], cells[:3], cells[:2]):
        n = int(left / (each * sum(cell.evaluations for cell in extent)))
        if n >= 2 * _LEAST or len(extent) == 2:
            cells = extent
            break
    if n < _LEAST / 3:
        needed = _LEAST * each * sum(cell.evaluations for cell in cells)
        return Scores(notes=(f"no scores: {_LEAST} samples of two samplers take {needed:.0f} seconds",))
    n = max(min(n, _MOST) // 2 * 2, _LEAST)
    found = evaluate(
        model.denoiser,
        data,
        list(dict.fromkeys(cells)),
        calibration=calibration,
        n=n,
        noise=Independent(seed + 21),
        scorer=scorer,
        batch_size=batch_size,
        device=device,
        keep=0,
    )
    at = {"sampler": current.sampler, "grid": current.grid or SAMPLERS[current.sampler].grid, "steps": steps}
    scored = [r for r in found.rows if r["steps"] <= steps and r["steps"]]
    has = any(all(r[k] == at[k] for k in at) for r in scored)
    best = recommend(scored, metrics[0])
    names = {cell.sampler for cell in cells}
    about = {name: SAMPLERS[name].about for name in names}
    return Scores(found.rows, found.floor, at if has else None, best, metrics[0], n, about, tuple(found.notes))


# ------------------------------------------------------------------------------------------------ statistics and reward


def statistics_part(
    model: Model,
    calibration: Calibration,
    used: InUse,
    statistics: Sequence[Statistic],
    *,
    steps: int,
    seconds: float,
    seed: int,
    batch_size: int,
    device: torch.device,
) -> tuple[list[StatisticProfile], list[str]]:
    """Designs for every statistic of the sampler in use, and notes.

    Args:
        model: the model.
        calibration: whose twins may be control variates.
        used: the sampler in use.
        statistics: what is asked for.
        steps, seed, batch_size, device: of the samples.
        seconds: budget of all.
    """
    chain = chain_of(model.denoiser, used.scheduler, steps, model.shape, clip=model.bound, device=device)
    if chain.twin is None:
        with_twin = replace(chain, twin=calibration.twin)
        try:
            _ = with_twin.shadow
            chain = with_twin
        except ValueError:  # no Gaussian chain beside this one
            pass
    found, notes = [], []
    for statistic in statistics:
        one = profile_statistic(
            chain,
            statistic,
            statistic.name,
            seconds=seconds / len(statistics),
            seed=seed + 31,
            batch_size=batch_size,
        )
        if not isinstance(one, StatisticProfile):
            notes.append(f"no designs for {statistic.name}: the least number of samples takes {one:.0f} seconds")
        else:
            found.append(one)
    return found, notes


def reward_part(
    model: Model,
    used: InUse,
    reward: NamedReward,
    *,
    steps: int,
    seconds: float,
    memory: float,
    seed: int,
    device: torch.device,
) -> tuple[RewardProfile | None, list[str]]:
    """Estimators of the reward's gradient on the sampler in use, or on the ancestral one where that adds no noise.

    Args:
        model: the model, its parameters with gradients.
        used: the sampler in use.
        reward: what is tuned for; a model with classes is tuned for all of them, a class a group, as by `lowvar tune`.
        steps: reverse steps.
        seconds: budget.
        memory: bytes for gradients.
        seed, device: of the runs.
    """
    kernel, grid = ReverseKernel(1.0, "small"), trailing(model.denoiser.schedule, steps)
    if used.grid is not None and used.variance is not None and used.variance.covariance is None:
        kernel, grid = used.variance.kernel, used.grid
    certain = float(grid[-1]) == 0 and kernel.last != "decoder"
    network: Any = model.denoiser.network
    network.requires_grad_(True)
    classes = len(model.classes or ())

    def of_classes(labels: Tensor) -> Denoiser:
        return denoiser_of(model.pipeline, class_labels=labels)

    def labels_of(index: Tensor) -> Tensor:
        return (index // _GROUP % classes).to(device)

    denoiser = of_classes if classes else model.denoiser
    policy = Policy(denoiser, kernel, grid, Floor(_FLOOR) if certain else None)
    problem = RewardProblem(
        policy,
        reward,
        [p for p in network.parameters() if p.requires_grad],
        model.shape,
        prompts=labels_of if classes else None,
        num_generations=_GROUP,
        device=device,
        columns=(lambda index: {"label": labels_of(index)}) if classes else None,
    )
    try:
        found = profile_reward(problem, reward.name, seconds=seconds, n=_RUNS, seed=seed + 41, memory=memory)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        return None, [f"no estimators for reward {reward.name}: {error}"]
    if not isinstance(found, RewardProfile):
        took = f"a few small batches of each take {found:.0f} seconds; give more --minutes"
        return None, [f"no estimators for reward {reward.name}: {took}"]
    return found, []
