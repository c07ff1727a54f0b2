r"""The marginal deficit: the covariance that a solver loses on a grid, step by step, and the noise that restores it.

The forward process fixes the moments of every marginal, whatever the data's law: with the data's mean m and covariance
B diag(c) B^T (the Gaussian twin), x_s has mean alpha_s m and, along direction i, variance alpha_s^2 c_i + sigma_s^2. A
solver run from its usual start has sample mean m_i' and variance v_i' there, each with a standard error. After step k

    deficit_i = alpha_s^2 c_i + sigma_s^2 - v_i',      added_i = shrink(deficit_i) / g_i^2   if deficit_i > 0, else 0,
    shift_i   = shrink(m_i' - (B^T alpha_s m)_i) / g_i,
    shrink(d) = d max(0, 1 - (se / d)^2),

so that nothing is ever removed, and what does not stand out of its sampling error is not added: an estimate d of D with
standard error se has E d^2 = D^2 + se^2, and shrink keeps the share D^2 / E d^2 (the nonnegative garrote). se is
sqrt((m_4 - v'^2) / n) for the variance, with the sample's fourth moment, and sqrt(v' / n) for the mean. The noise of
one step is in place when the next is measured. The step to s = 0 gets none: it returns a posterior mean.

A corrector redoes the step once the posterior at its end is known, and fills part of what the prediction lacks; so m'
and v' are those of the corrected state where one follows, of the state itself elsewhere. The noise enters at the
prediction and reaches the corrected state g times as large,

    g = 1 + b dx0_hat/dx  along i, b the weight of the new posterior in the correction      (1 without a corrector),

with the twin's derivative, the Wiener gain alpha_s c / (alpha_s^2 c + sigma_s^2). Weight and gain are positive, so that
g >= 1, but for a solver that has another twin within it; there g counts as at least 1, so that never more than the
deficit is added.

On a Gaussian the states from which steps are made have the exact marginal covariance wherever the solver lost some. On
other data it is restored in the basis, to first order behind a corrector, and nothing else is. It costs n evaluations a
step, 2 n with a corrector, once per solver and grid, and no data beyond the twin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.basis import Basis
from lowvar.process.denoiser import Denoiser
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State
from lowvar.process.twin import GaussianTwin
from lowvar.process.with_noise import WithNoise

__all__ = ["TENSORS", "MarginalDeficit", "describe", "marginal_deficit", "shrink"]

TENSORS = ("variance", "shift", "measured")
"""What a deficit holds by step and direction."""


def shrink(value: Tensor, se: Tensor) -> Tensor:
    """value max(0, 1 - (se / value)^2).

    Example:
        >>> shrink(torch.tensor([2.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist()
        [1.5, -1.5, 0.0, 0.0]
    """
    share = (1 - (se / torch.where(value == 0, torch.ones_like(value), value)) ** 2).clamp_min(0)
    return value * share


def describe(solver: Solver) -> str:
    """A solver's class and numbers, `DPMSolverPP(weights='midpoint', eta=0.0, covariance=False)`; objects by class."""
    values = []
    for f in fields(solver):  # type: ignore[arg-type]  (solvers are dataclasses)
        value = getattr(solver, f.name)
        plain = isinstance(value, str | int | float | tuple | None)
        values.append(f"{f.name}={value!r}" if plain else f"{f.name}={type(value).__name__}")
    return f"{type(solver).__name__}({', '.join(values)})"


@dataclass(frozen=True, eq=False)
class MarginalDeficit:
    """What a solver's marginals lack on a grid, in the twin's basis.

    Attributes:
        solver: what was measured, as `describe` writes it.
        logsnr: of the grid, (K + 1,) float64.
        basis: B.
        variance: to be added after each step, (K, *event_shape) float64, >= 0; 0 where s = 0.
        shift: of the mean after each step, same shape; 0 where s = 0.
        measured: variance of the chain before the addition (of the corrected state where one follows), same shape.
        n: starts.
    """

    solver: str
    logsnr: Tensor
    basis: Basis
    variance: Tensor
    shift: Tensor
    measured: Tensor
    n: int

    def is_of(self, solver: Solver | str, logsnr: Tensor) -> bool:
        """Whether it was measured for this solver (or what `describe` writes of it) on these levels, (K + 1,)."""
        same = self.solver == (solver if isinstance(solver, str) else describe(solver))
        return same and len(logsnr) == len(self.logsnr) and torch.allclose(self.logsnr, logsnr, rtol=1e-5, atol=1e-5)

    def attach(self, solver: Solver, *, centre: bool = False) -> WithNoise:
        """The solver with this noise.

        Args:
            solver: the one that was measured.
            centre: also take the shift of the mean away; measured with `centre` only.

        Raises:
            UserError: if the solver is another one.
        """
        if describe(solver) != self.solver:
            raise UserError(f"this noise was calibrated for {self.solver}, not for {describe(solver)}: calibrate again")
        return WithNoise(solver, self.basis, self.logsnr, self.variance, self.shift if centre else None)

    def to_json(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON-ready fields, and the tensors (float32); the basis is the twin's and stored with it.

        Infinite levels (clean data, pure noise) are the strings "inf" and "-inf".
        """
        levels = [v if abs(v) < float("inf") else str(v) for v in self.logsnr.tolist()]
        tensors = {name: getattr(self, name).float().contiguous() for name in TENSORS}
        return {"solver": self.solver, "logsnr": levels, "basis": self.basis.name, "n": self.n}, tensors

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], basis: Basis) -> MarginalDeficit:
        """What `to_json` wrote, with the twin's basis.

        Raises:
            UserError: if a part is missing or the basis is another one.
        """
        try:
            if fields["basis"] != basis.name:
                raise UserError(f"the deficit was measured in basis {fields['basis']!r}, the twin's is {basis.name!r}")
            logsnr = torch.tensor([float(v) for v in fields["logsnr"]], dtype=torch.float64)
            parts = [tensors[name].double() for name in TENSORS]
            return cls(fields["solver"], logsnr, basis, *parts, n=int(fields["n"]))
        except KeyError as error:
            raise UserError(f"the deficit is incomplete ({error}): calibrate the noise again") from error


def marginal_deficit(
    denoiser: Denoiser,
    solver: Solver,
    grid: Tensor,
    twin: GaussianTwin,
    *,
    n: int = 2048,
    noise: NoiseSource | None = None,
    centre: bool = False,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MarginalDeficit:
    """Runs n chains side by side, measures what each step's marginal lacks and adds it before the next.

    Args:
        denoiser, solver, grid: as in `lowvar.sample.generate`; a solver of one evaluation a step.
        twin: gives the true moments and the basis.
        n: chains, at least 2.
        noise: source of starts and noise (default `Independent(2**40)`: not the samples' own).
        centre: take the mean's shift away as well.
        batch_size: chains a network call.
        dtype, device: of the states.

    Raises:
        ValueError: if n is below 2, or as `WithNoise` does.

    Example:
        >>> from lowvar.process import CosineVP, PixelBasis, ReverseKernel
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 0.1]))
        >>> schedule, solver = CosineVP(), ReverseKernel(0.0, "small")
        >>> grid = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
        >>> deficit = marginal_deficit(twin.denoiser(schedule), solver, grid, twin, n=256)
        >>> bool(deficit.variance[0, 0] > 0.3)  # DDIM loses kappa^2 C
        True
    """
    if n < 2:
        raise ValueError(f"n is {n}; a variance needs at least 2 chains")
    source = Independent(2**40) if noise is None else noise
    levels, basis, shape = denoiser.schedule.at(grid), twin.basis, tuple(twin.mean.shape)
    steps = len(levels) - 1
    zero = torch.zeros((steps, *shape), dtype=torch.float64)
    variance, shift, measured = zero.clone(), zero.clone(), zero.clone()
    chain = WithNoise(solver, basis, levels.logsnr, zero)
    plan = chain.prepare(levels)
    parts = torch.arange(n).split(batch_size)
    # the start of `lowvar.sample.initial_state`, which stands on this floor
    std = float(torch.sqrt(levels.alpha[0] ** 2 + levels.sigma[0] ** 2))
    states = [chain.start(std * source.normal(i, shape, draw=0, dtype=dtype, device=device)) for i in parts]
    for k in range(steps):
        clean = float(levels.sigma[k + 1]) == 0
        for j, index in enumerate(parts):
            z = source.normal(index, shape, draw=2 * k + 1, dtype=dtype, device=device) if not clean else None
            with torch.no_grad():
                states[j], _ = chain.step(plan, k, states[j], denoiser(states[j].x, levels[k]), z)
        level, reached, gain = levels[k + 1], [state.x for state in states], torch.ones_like(zero[0])
        if chain.corrects(plan, k + 1):
            with torch.no_grad():
                reached = [chain.corrected(plan, k + 1, s, denoiser(s.x, level)) for s in states]
            gain = _gain(chain, plan, k + 1, states[0], twin, level)
        mean, second, fourth = _moments([twin.rotate(x.double().cpu(), level) for x in reached])
        measured[k] = second
        if clean:
            continue
        shift[k] = shrink(mean, torch.sqrt(second / n)) / gain
        lacking = twin.marginal_variance(level, zero) - second
        se = torch.sqrt((fourth - second**2).clamp_min(0) / n)
        variance[k] = shrink(lacking.clamp_min(0), se) / gain**2
        for j, index in enumerate(parts):
            z = source.normal(index, shape, draw=2 * k + 2, dtype=dtype, device=device)
            x = states[j].x + basis.inverse(variance[k].sqrt().to(z) * basis.forward(z))
            x = x - basis.inverse(shift[k : k + 1].to(x)) if centre else x
            states[j] = State(x, states[j].memory)
    return MarginalDeficit(describe(solver), levels.logsnr, basis, variance, shift, measured, n)


def _gain(solver: Solver, plan: Any, k: int, state: State, twin: GaussianTwin, level: Level) -> Tensor:
    """g along the directions, (*event_shape) float64, >= 1: a unit pushed through the corrector, which is affine."""
    unit = twin.basis.inverse(torch.ones_like(state.x))
    ends = [
        solver.corrected(plan, k, State(x, state.memory), twin.posterior(x, level)) for x in (state.x, state.x + unit)
    ]
    return twin.basis.forward(ends[1] - ends[0])[0].double().cpu().clamp_min(1)


def _moments(batches: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, and second and fourth central moments over the events of all batches."""
    n = sum(len(b) for b in batches)
    mean = torch.stack([b.sum(0) for b in batches]).sum(0) / n
    second = torch.stack([((b - mean) ** 2).sum(0) for b in batches]).sum(0) / (n - 1)
    fourth = torch.stack([((b - mean) ** 4).sum(0) for b in batches]).sum(0) / n
    return mean, second, fourth
