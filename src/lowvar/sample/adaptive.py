r"""Steps chosen sample by sample: one more evaluation a step says how long it may be.

A step dsnr from x_t costs (1/4) dsnr^2 R(x_t) more than continuous time, R(x_t) = ||C(x_t) - V||_F^2 with V the
covariance of the kernel's noise (`lowvar.process.probe`). A grid made for the data set spreads steps by R_ref, the
average of R at a level. Here every sample has a position u on that grid, 0 at its first time and K - 1 at its last
evaluation, with logsnr linear between knots, and moves by

    u <- u + clip(sqrt(R_ref(u) / R_hat(x_t)), 1 / rho, rho),

R_hat one probe's estimate. The clip keeps a wild estimate from costing more than it can save. A position within half a
shortest step of K - 1 is moved there, so that every sample ends with the same last step.

Samples arrive at different times and finish after different numbers of steps: rows of a batch have a level each, and a
place that falls free is taken by the next sample. Noise belongs to (sample, step), so the batch size does not matter.

Cost: a step is 2 evaluations (the mean and its derivative along z), the last 1. A grid of K steps costs K, so that
adaptive steps must save half of them to break even; `benchmarks/grids.py` measures whether they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.cost import CostCurve
from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import ReverseKernel
from lowvar.process.matched import knot_rate
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.probe import squared_deviation
from lowvar.process.schedule import Level, Schedule

__all__ = ["Adaptive", "StepControl", "adaptive_generate"]

_PROBE = 1 << 20  # probes take draws from here, so that a step's noise is that of `generate`


@dataclass(frozen=True, eq=False)
class StepControl:
    """Where on a grid a sample goes next.

    Attributes:
        schedule: of the grid.
        grid: decreasing times (K + 1,), the last 0, K >= 2.
        reference: R_ref > 0 at the evaluations, (K,).
        rho: largest factor by which a step is lengthened or shortened, >= 1.

    Raises:
        ValueError: if shapes do not fit or a number is out of range.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> grid = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0])
        >>> control = StepControl(CosineVP(), grid, torch.ones(4), rho=1.5)
        >>> control.advance(torch.zeros(3), torch.tensor([100.0, 1.0, 0.0])).tolist()  # steep, as expected, flat
        [0.6666666666666666, 1.0, 1.5]
    """

    schedule: Schedule
    grid: Tensor
    reference: Tensor
    rho: float = 1.5

    def __post_init__(self) -> None:
        """Checks the parts."""
        if len(self.grid) < 3 or float(self.grid[-1]) != 0:
            raise ValueError("adaptive steps need a grid of at least two steps that ends at t = 0")
        if self.reference.shape != (len(self.grid) - 1,) or not bool((self.reference > 0).all()):
            raise ValueError("the reference needs one positive number an evaluation of the grid")
        if not self.rho >= 1:
            raise ValueError(f"rho is {self.rho}; give a number from 1 (no adaptation), for example 1.5")

    @classmethod
    def of(cls, cost: CostCurve, schedule: Schedule, grid: Tensor, rho: float = 1.5) -> StepControl:
        """With R_ref from a calibrated curve: E R(x_t) of the curve's own noise."""
        logsnr = schedule.logsnr(grid[:-1]).clamp_min(-12.0)
        return cls(schedule, grid, (knot_rate(cost, cost.noise, logsnr) * torch.exp(-logsnr)) ** 2, rho)

    @property
    def last(self) -> int:
        """K - 1, the position of the last evaluation."""
        return len(self.grid) - 2

    def _between(self, values: Tensor, u: Tensor) -> Tensor:
        i = u.floor().long().clamp(0, self.last - 1)
        return torch.lerp(values[i], values[i + 1], u.double() - i)

    def level(self, u: Tensor) -> Level:
        """The levels at positions u in [0, K - 1], (B,)."""
        knots = self.schedule.logsnr(self.grid[:-1])
        times = self.schedule.time(self._between(knots.clamp_min(-12.0), u))
        on_knot = u == u.round()
        return self.schedule.at(torch.where(on_knot, self.grid.double()[u.round().long()], times))

    def advance(self, u: Tensor, R: Tensor) -> Tensor:
        """The next positions, (B,) float64, for estimates R >= 0 at positions u; NaN, no estimate, keeps the grid's."""
        reference = torch.exp(self._between(torch.log(self.reference.double()), u))
        ratio = torch.sqrt(reference / R.double().clamp_min(1e-300)).nan_to_num(1.0, posinf=torch.inf)
        after = u + ratio.clamp(1 / self.rho, self.rho)
        return torch.where(after > self.last - 0.5 / self.rho, float(self.last), after)


@dataclass(frozen=True)
class Adaptive:
    """Samples and what each cost.

    Attributes:
        samples: (n, *shape), on the CPU.
        steps: reverse steps, (n,).
        nfe: network evaluations, (n,): 2 a step, 1 for the last.
    """

    samples: Tensor
    steps: Tensor
    nfe: Tensor


@dataclass
class _Rows:
    """The samples under way: number, position, step and state of each."""

    index: Tensor
    u: Tensor
    k: Tensor
    x: Tensor

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(self.index[rows], self.u[rows], self.k[rows], self.x[rows])

    def plus(self, other: _Rows) -> _Rows:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Rows(*(torch.cat(pair) for pair in pairs))


def _noise(source: NoiseSource, rows: _Rows, offset: int) -> Tensor:
    """Normal numbers of the rows' samples at draw number k + offset."""
    z = torch.empty_like(rows.x)
    for k in rows.k.unique().tolist():
        at = rows.k == k
        z[at] = source.normal(rows.index[at], z.shape[1:], draw=k + offset, dtype=z.dtype, device=z.device)
    return z


@torch.no_grad()
def adaptive_generate(
    denoiser: Denoiser,
    kernel: ReverseKernel,
    control: StepControl,
    shape: Sequence[int],
    n: int,
    noise: NoiseSource | None = None,
    *,
    first: int = 0,
    batch_size: int = 256,
    clip: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Adaptive:
    """Samples first .. first + n - 1 with steps of their own.

    Args:
        denoiser: any denoiser; `WithCovariance` for a kernel with `variance="posterior"`.
        kernel: `small` or `posterior`; R is that of eta = 1.
        control: where to step.
        shape: event shape.
        n: number of samples.
        noise: a source with one stream a sample (default `Independent(0)`); step k takes draw k + 1, as in `generate`.
        first: number of the first sample.
        batch_size: rows under way at once; it does not change their noise.
        clip: final clip to [-clip, clip], or None.
        dtype, device: of the states.
        progress: called with the number of samples that have finished, whenever some have.

    Raises:
        ValueError: for a kernel of another variance.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> from lowvar.process.grid import uniform
        >>> twin, schedule = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 4.0])), CosineVP()
        >>> control = StepControl(schedule, uniform(schedule, 5), torch.ones(5))
        >>> made = adaptive_generate(twin.denoiser(schedule), ReverseKernel(1.0, "small"), control, (2,), 3)
        >>> made.samples.shape, bool((made.nfe == 2 * made.steps - 1).all())
        (torch.Size([3, 2]), True)
    """
    if kernel.variance not in ("small", "posterior"):
        raise ValueError(f"variance is {kernel.variance!r}; adaptive steps know R of small and posterior")
    noise = Independent(0) if noise is None else noise
    like = torch.zeros((), dtype=dtype, device=device)
    start = control.schedule.at(control.grid[0])
    samples = torch.empty(n, *shape, dtype=dtype)
    steps = torch.zeros(n, dtype=torch.int64)
    waiting, under_way = first, _fresh(noise, torch.arange(0), shape, start, like)
    while waiting < first + n or len(under_way.index):
        free = min(batch_size - len(under_way.index), first + n - waiting)
        if free > 0:
            numbers = torch.arange(waiting, waiting + free)
            under_way = under_way.plus(_fresh(noise, numbers, shape, start, like))
            waiting += free
        done = under_way.u >= control.last
        if bool(done.all()) or int(done.sum()) >= batch_size / 2:  # the last evaluation in batches, too
            ended = under_way.take(done.nonzero()[:, 0])
            x = denoiser(ended.x, control.level(ended.u)).mean
            x = x if clip is None else x.clamp(-clip, clip)
            samples[ended.index - first] = x.cpu()
            steps[ended.index - first] = ended.k + 1
            under_way = under_way.take((~done).nonzero()[:, 0])
            if progress is not None:
                progress(len(ended.index))
            continue
        moving, resting = under_way.take((~done).nonzero()[:, 0]), under_way.take(done.nonzero()[:, 0])
        under_way = _move(denoiser, kernel, control, noise, moving).plus(resting)
    return Adaptive(samples, steps, 2 * steps - 1)


def _fresh(noise: NoiseSource, index: Tensor, shape: Sequence[int], start: Level, like: Tensor) -> _Rows:
    if len(index):
        z = noise.normal(index, shape, draw=0, dtype=like.dtype, device=like.device)
        x = ReverseKernel().initial(z, start, start)
    else:
        x = like.new_empty(0, *shape)
    zeros = torch.zeros(len(index))
    return _Rows(index, zeros.double(), zeros.long(), x)


def _move(denoiser: Denoiser, kernel: ReverseKernel, control: StepControl, noise: NoiseSource, rows: _Rows) -> _Rows:
    """One step of every row."""
    t = control.level(rows.u)
    posterior, R = squared_deviation(denoiser, rows.x, t, _noise(noise, rows, _PROBE))
    after = control.advance(rows.u, R.cpu())
    law = kernel(rows.x, Posterior(posterior.mean, posterior.covariance), t, control.level(after))
    return _Rows(rows.index, after, rows.k + 1, law.sample(_noise(noise, rows, 1)))
