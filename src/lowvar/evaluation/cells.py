"""One entry of a table of scores: a sampler, a number of steps and a grid, checked, resolved and drawn.

Samplers are those of `lowvar.sample.SAMPLERS`, and `diffusers:NAME` for those of `lowvar.evaluation.PEERS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvar.calibrate import Calibration, MarginalDeficit, marginal_deficit
from lowvar.calibrate.grids import FAMILIES, calibrated_grid, is_calibrated
from lowvar.errors import UserError
from lowvar.evaluation.peers import Spacing, make_peer, peer_named, run_peer
from lowvar.process.denoiser import Denoiser, NetworkDenoiser
from lowvar.process.discrete import DiscreteVP
from lowvar.process.grid import GRIDS, make_grid
from lowvar.process.head import COVARIANCE_HEADS
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Schedule
from lowvar.process.solver import Solver
from lowvar.sample import SAMPLERS, NamedSampler, generate, named_sampler

__all__ = ["Cell", "Drawn", "check_cell", "check_steps", "deficit_of", "draw", "resolve", "sampling_grid", "teaching"]

_PREFIX = "diffusers:"


@dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
        sampler: a name of `SAMPLERS`, or `diffusers:NAME`.
        steps: number of reverse steps.
        grid: name of the step grid, a peer's spacing, or None for
            the default.
    """

    sampler: str
    steps: int
    grid: str | None = None

    @property
    def is_peer(self) -> bool:
        """Whether a diffusers scheduler runs it."""
        return self.sampler.startswith(_PREFIX)

    @property
    def evaluations(self) -> int:
        """Network evaluations a sample."""
        if self.is_peer:
            return peer_named(self.sampler).evaluations(self.steps)
        return SAMPLERS[self.sampler].solver.nfe(self.steps) if self.sampler in SAMPLERS else self.steps

    @property
    def title(self) -> str:
        """`sampler@steps`, as grids.npz names it."""
        return f"{self.sampler}@{self.steps}"

    @property
    def label(self) -> str:
        """`sampler@steps`, with the grid where one was asked for."""
        return self.title + (f"@{self.grid}" if self.grid else "")


@dataclass(frozen=True)
class Drawn:
    """Samples of a cell (n, *shape) clipped to the data's range, on the CPU, and what they cost."""

    cell: Cell
    samples: Tensor
    grid: str
    nfe: int
    seconds: float


@contextmanager
def teaching() -> Iterator[None]:
    """What the lower floors refuse with a `ValueError` is the user's input here: the same sentence as a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def check_steps(steps: int, schedule: Schedule) -> int:
    """The number of steps, if the schedule has as many.

    Raises:
        UserError: naming the allowed range.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> check_steps(10, CosineVP())
        10
    """
    most = schedule.steps if isinstance(schedule, DiscreteVP) else 1000
    if not 1 <= steps <= most:
        raise UserError(f"steps is {steps}; give a whole number from 1 to {most}, the steps of this model's schedule")
    return steps


def sampling_grid(name: str, schedule: Schedule, steps: int, calibration: Calibration | None = None) -> Tensor:
    """The step grid of a name, (steps + 1,) times: of `GRIDS`, or one that a calibration makes.

    Raises:
        UserError: for a number of steps the schedule does not have, an unknown name, or a calibrated grid without
            a calibration.
    """
    check_steps(steps, schedule)
    if name == "path" or is_calibrated(name):
        if calibration is None:
            raise UserError(f"grid {name!r} needs a calibrated model: run `lowvar calibrate`, or choose another grid")
        if name == "path":
            return calibration.path_grid(schedule, steps)
        return calibrated_grid(name, calibration, schedule, steps, levels=calibration.levels).grid
    if name not in GRIDS:
        raise UserError(f"grid is {name!r}; allowed: {', '.join((*GRIDS, *FAMILIES, 'path'))}")
    with teaching():
        return make_grid(name, schedule, steps)


def resolve(
    name: str,
    denoiser: NetworkDenoiser,
    calibration: Calibration | None = None,
    *,
    covariance: str | None = None,
    eta: float | None = None,
    tau: float | None = None,
) -> tuple[NamedSampler, Denoiser]:
    """A sampler of this package by name, with the calibrated covariance and twin it needs attached.

    Args:
        name: a key of `SAMPLERS`.
        denoiser: the network.
        calibration: what was calibrated for it, or None.
        covariance: another covariance than the sampler's own, for ddpm-* and ddim-*: small, large, learned, or the
            name of one that the calibration holds (`lowvar.sample.COVARIANCES`).
        eta, tau: other stochasticity than the sampler's own: eta for ddpm-* and ddim-*, tau for adams-* and twin-*.

    Raises:
        UserError: if the name is unknown, a setting does not belong to the sampler or is out of range, the sampler
            needs a calibration, a covariance of it or a variance head that is not there, or the calibration is of
            another schedule.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler is {name!r}; allowed: {', '.join(SAMPLERS)}")
    with teaching():
        c = calibration
        sampler = named_sampler(name) if c is None else named_sampler(name, c.twin, c.mixture, c.paths)
        solver = sampler.solver
        if isinstance(solver, ReverseKernel):
            if tau is not None:
                raise UserError(f"--tau belongs to adams-* and twin-* samplers, and {name} takes --eta")
            if covariance is not None:
                fixed = covariance in ("small", "large")
                variance = covariance if fixed or covariance == "learned" else "posterior"
                solver = ReverseKernel(solver.eta if eta is None else eta, variance)  # type: ignore[arg-type]
                sampler = replace(sampler, covariance=None if fixed else covariance)
            elif eta is not None:
                solver = replace(solver, eta=eta)
        elif isinstance(solver, MultistepSolver):
            if eta is not None or covariance is not None:
                raise UserError(f"--eta and --covariance belong to ddpm-* and ddim-* samplers, and {name} takes --tau")
            solver = solver if tau is None else replace(solver, tau=tau)
        elif eta is not None or tau is not None or covariance is not None:
            raise UserError(f"sampler {name} is as published: it takes no --eta, --tau or --covariance")
    sampler = replace(sampler, solver=solver)
    if sampler.covariance == "learned":
        if denoiser.head is None:
            raise UserError(f"sampler {name} needs a network with a variance head, and this one has none")
        if denoiser.head in COVARIANCE_HEADS and isinstance(sampler.solver, ReverseKernel):  # it says what C is
            sampler = replace(sampler, solver=replace(sampler.solver, variance="posterior"))
        return sampler, denoiser
    if sampler.covariance is None:
        if calibration is not None:
            calibration.require(denoiser.schedule)
        return sampler, denoiser
    if calibration is None:
        raise UserError(
            f"sampler {name} needs a calibrated model: run `lowvar calibrate --model MODEL --data DATA` first"
        )
    attached = calibration.attach(denoiser, sampler.covariance)
    if sampler.covariance == "convert" and denoiser.head != "range":
        raise UserError("covariance convert needs a network with a learned-range head, and this one has none")
    return sampler, attached


def draw(
    denoiser: NetworkDenoiser,
    cell: Cell,
    n: int,
    shape: Sequence[int],
    *,
    calibration: Calibration | None = None,
    noise: NoiseSource | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Drawn:
    """Samples 0 .. n - 1 of a cell.

    Args:
        denoiser: the network.
        cell: sampler, steps and grid.
        n: number of samples.
        shape: event shape.
        calibration: what was calibrated for the network, if the sampler needs it.
        noise: source (default `Independent(0)`); draw 0 starts every sampler alike.
        batch_size: samples a batch; it does not change their noise.
        device: where the network is.
        progress: called with the number of samples after each network evaluation.

    Raises:
        UserError: as in `resolve`, `sampling_grid` and `make_peer`.
    """
    noise = Independent(0) if noise is None else noise
    check_steps(cell.steps, denoiser.schedule)
    begun = time.perf_counter()
    if cell.is_peer:
        peer = peer_named(cell.sampler)
        spacing: Spacing = cell.grid or "trailing"  # type: ignore[assignment]  (checked by make_peer)
        parts, nfe = [], 0
        for index in torch.arange(n).split(batch_size):
            x, nfe = run_peer(
                peer, denoiser, cell.steps, index, shape, noise, spacing=spacing, device=device, progress=progress
            )
            parts.append((x if denoiser.clip is None else x.clamp(-denoiser.clip, denoiser.clip)).cpu())
        return Drawn(cell, torch.cat(parts), spacing, nfe * denoiser.nfe, time.perf_counter() - begun)
    sampler, attached = resolve(cell.sampler, denoiser, calibration)
    name = cell.grid or sampler.grid
    grid = sampling_grid(name, denoiser.schedule, cell.steps, calibration)
    solver = sampler.solver
    if sampler.noise:
        assert calibration is not None, "named_sampler refuses a sampler that needs a twin and has none"
        deficit = deficit_of(attached, solver, grid, calibration, batch_size=batch_size, device=device)
        solver = deficit.attach(solver)
    samples = generate(
        attached,
        solver,
        grid,
        shape,
        n,
        noise,
        batch_size=batch_size,
        clip=denoiser.clip,
        device=device,
        progress=progress,
    )
    return Drawn(cell, samples, name, solver.nfe(cell.steps) * denoiser.nfe, time.perf_counter() - begun)


def deficit_of(
    denoiser: Denoiser,
    solver: Solver,
    grid: Tensor,
    calibration: Calibration,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> MarginalDeficit:
    """What the solver's marginals lack on a grid: as the calibration keeps it, else measured (2,048 chains).

    Args:
        denoiser: what the solver runs on, as `resolve` returns it.
        solver, grid: the solver and its times.
        calibration: holds the twin, and what was measured before.
        batch_size, device: of the network's evaluations.
    """
    kept = calibration.deficit(solver, denoiser.schedule.at(grid).logsnr)
    if kept is not None:
        return kept
    return marginal_deficit(denoiser, solver, grid, calibration.twin, batch_size=batch_size, device=device)


def check_cell(cell: Cell, denoiser: NetworkDenoiser, calibration: Calibration | None) -> None:
    """Raises UserError unless the cell can be run on the network."""
    check_steps(cell.steps, denoiser.schedule)
    if cell.is_peer:
        make_peer(peer_named(cell.sampler), denoiser, cell.grid or "trailing")  # type: ignore[arg-type]
        return
    sampler, _ = resolve(cell.sampler, denoiser, calibration)
    sampling_grid(cell.grid or sampler.grid, denoiser.schedule, cell.steps, calibration)
