r"""What a reverse step costs: the Kullback-Leibler divergence of the ancestral kernel, in nats.

For a step t -> s with dsnr = snr_s - snr_t, exact posterior mean and the best noise of each class, the expectation over
x_0 given x_t of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) is

    small       dsnr tr C / 2                               (C := 0)
    isotropic   (d / 2) log(1 + dsnr tr C / d)
    diagonal    (1/2) sum_i log(1 + dsnr C_ii)              (in any orthonormal basis)
    full        (1/2) log det(I + dsnr C)

since kappa^2 / lambda^2 = dsnr there. `posterior_costs` is these four for given C(x_t).

Tables. A calibrated table has one variance v_i(logsnr) an entry, E (x_0 - x0_hat)_i^2, for all x_t of a level. With
S = lambda^2 + kappa^2 v the expected KL is (1/2) sum_i log(1 + dsnr v_i) *exactly*, also around the mean of an
imperfect network: the mean's own error is part of v. Likewise dsnr sum_i v_i / 2 for `small`. So a table predicts the
terms of the variational bound on every grid, without a further evaluation; `CostCurve` does.

Path KL. In continuous time the terms become (1/2) int M d snr, M = sum_i v_i (Guo, Shamai & Verdu 2005; Kingma et al.
2021), which no grid can save. A path's excess over it is its *path KL*: locally (1/4) dsnr^2 R a step, with

    R = -dM/dsnr - sum_i v_i^2        for a table: E ||C - diag v||_F^2, as d E C / d snr = -E C^2
    R = -dM/dsnr                      for `small`: E ||C||_F^2

The first needs no second moment of C: it is E ||C||_F^2 - sum_i (E C_ii)^2, i.e. what lies off the diagonal plus what
the diagonal varies from one x_t to another. A head that knows C_ii(x_t) saves the second part, which the table alone
does not tell; R is an upper bound for it.

The last step decodes: D(t) = -E log p(x_0 | x_t), `last`, so that a path that is last evaluated at t costs its KL terms
plus D(t). Data with L grey levels are decided once their standard deviation is well below the levels' distance, and
D(t) + (1/2) int^t M d snr has its minimum there: that is where a grid should end. Path KL is counted from that minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance
from lowvar.process.schedule import Schedule

__all__ = ["CostCurve", "Noise", "decoder_nats", "monotone", "posterior_costs"]

Noise = Literal["small", "isotropic", "diagonal", "full"]
_FLOOR = 1e-20


def posterior_costs(covariance: Covariance, dsnr: Tensor, noise: Noise) -> Tensor:
    """Cost in nats of steps dsnr (m,) from states with exact posterior covariances, by the module's table; (B, m).

    Args:
        covariance: C(x_t), batch size B.
        dsnr: snr_s - snr_t > 0, (m,).
        noise: class of the kernel's noise; `diagonal` is the diagonal in the covariance's own coordinates: the event's
            entries (rotate a dense C for another basis).

    Raises:
        ValueError: if the class is unknown.

    Example:
        >>> from lowvar.process.covariance import Diagonal
        >>> C, step = Diagonal(torch.tensor([[3.0, 1.0]], dtype=torch.float64)), torch.tensor([1.0])
        >>> [round(float(posterior_costs(C, step, noise)), 4) for noise in ("small", "isotropic", "diagonal")]
        [2.0, 1.0986, 1.0397]
    """
    dsnr = dsnr.double()
    if noise == "small":
        return covariance.trace().double()[:, None] * dsnr / 2
    if noise == "isotropic":
        return covariance.d / 2 * torch.log1p(covariance.trace().double()[:, None] / covariance.d * dsnr)
    if noise == "diagonal":
        variance = covariance.diagonal().double().flatten(1)
    elif noise == "full":
        variance = torch.linalg.eigvalsh(covariance.dense().double()).clamp_min(0)
    else:
        raise ValueError(f"noise is {noise!r}; allowed: {', '.join(get_args(Noise))}")
    return torch.stack([torch.log1p(variance * step).sum(1) / 2 for step in dsnr], 1)


def decoder_nats(variance: Tensor, levels: int | None) -> Tensor:
    """-E log p of the last step, entry by entry, where the residual is N(0, v) and the decoder has the variance v.

    Exact for a density, whatever the residual's law. For L levels the Gaussian residual is an approximation and the
    outer bins are taken as closed, which errs upwards for data at the ends of the range.

    Args:
        variance: v, any shape; of an entry in [-1, 1].
        levels: L grey levels, or None for a density.

    Example:
        >>> decoder_nats(torch.tensor([1e-6, 1.0], dtype=torch.float64), 17)[0] < 1e-12  # decided
        tensor(True)
    """
    v = variance.double().clamp_min(_FLOOR)
    if levels is None:
        return 0.5 * (torch.log(2 * math.pi * v) + 1)
    if levels < 2:
        raise ValueError(f"levels is {levels}; data have at least 2 grey levels")
    a = (1 / (levels - 1) / v.sqrt())[..., None]  # half a bin in standard deviations
    z = torch.linspace(0, 8, 65, dtype=torch.float64)  # the integrand is even; equal weights converge geometrically
    weight = torch.exp(-(z**2) / 2)
    weight[0] /= 2
    high, low = torch.special.log_ndtr(a - z), torch.special.log_ndtr(-a - z)
    log_p = high + torch.log((-torch.expm1(low - high)).clamp_min(torch.finfo(torch.float64).tiny))
    return -(log_p * weight).sum(-1) / weight.sum()


def monotone(variance: Tensor, bound: Tensor | None = None) -> Tensor:
    """A measured table (L, ...) as an exact posterior's could be: at most `bound` and never increasing with snr.

    E C_ii of the exact posterior is at most the best linear denoiser's and falls with snr; where a network does worse,
    its excess is an error of its own that no step can mend.
    """
    limited = variance.double() if bound is None else torch.minimum(variance.double(), bound.double())
    return torch.cummin(limited, 0).values


@dataclass(frozen=True, eq=False)
class CostCurve:
    """Costs of steps from a calibrated table, in float64, as functions of logsnr (see the module).

    Between knots log v is linear in logsnr, above the last v falls like 1 / snr, below the first it stays: as
    `lowvar.calibrate.CovarianceTable` reads it.

    Attributes:
        logsnr: increasing knots, (L,), at least 2.
        variance: v >= 0, (L, m); every entry stands for d / m dimensions.
        d: dimensions.
        noise: `table` for a kernel with these variances, `small` for C := 0.
        last: D at the knots in nats, (L,); linear between them, constant beyond. None: paths are counted up to their
            last evaluation.
        third: T = E ||kappa_3||^2 at the knots, (L,), for grids of the full covariance only (`lowvar.process.probe`).

    Raises:
        ValueError: if shapes do not fit, knots do not increase or a variance is negative or not finite.

    Example:
        >>> l = torch.linspace(-8, 8, 33, dtype=torch.float64)
        >>> curve = CostCurve(l, torch.sigmoid(-l)[:, None], d=2)  # N(0, I): a table is the exact covariance
        >>> round(float(curve.path_kl(torch.linspace(-8, 8, 5))), 1)
        0.0
        >>> round(float(CostCurve(l, torch.sigmoid(-l)[:, None], 2, "small").path_kl(torch.linspace(-8, 8, 5))), 0)
        72.0
    """

    logsnr: Tensor
    variance: Tensor
    d: int
    noise: Literal["small", "table"] = "table"
    last: Tensor | None = None
    third: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks the curve."""
        object.__setattr__(self, "logsnr", self.logsnr.double())
        object.__setattr__(self, "variance", self.variance.double())
        knots = len(self.logsnr)
        if knots < 2 or bool((self.logsnr.diff() <= 0).any()):
            raise ValueError("a cost curve needs at least two knots with increasing logsnr")
        if self.variance.ndim != 2 or len(self.variance) != knots or self.d % self.variance.shape[1]:
            raise ValueError(
                f"variances {tuple(self.variance.shape)} do not fit {knots} knots and {self.d} dimensions: give (L, m) "
                "with m a divisor of d"
            )
        if not bool((torch.isfinite(self.variance) & (self.variance >= 0)).all()):
            raise ValueError("variances must be finite and not negative")
        if self.noise not in ("small", "table"):
            raise ValueError(f"noise is {self.noise!r}; allowed: small, table")
        for name, value in (("last", self.last), ("third", self.third)):
            if value is not None and value.shape != self.logsnr.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the knots {tuple(self.logsnr.shape)}")

    def ending_with(self, variance: Tensor, levels: int | None) -> CostCurve:
        """The curve with the last step's cost for decoder variances (L, d) or (L, m), by `decoder_nats`."""
        per_entry = decoder_nats(variance.flatten(1), levels)
        return replace(self, last=per_entry.mean(1) * self.d)

    @cached_property
    def _log(self) -> Tensor:
        return torch.log(self.variance.clamp_min(_FLOOR))

    def _place(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """Left knot and position within the interval, in [0, 1]."""
        i = torch.searchsorted(self.logsnr, logsnr.contiguous()).clamp(1, len(self.logsnr) - 1) - 1
        return i, ((logsnr - self.logsnr[i]) / (self.logsnr[i + 1] - self.logsnr[i])).clamp(0, 1)

    def variance_at(self, logsnr: Tensor) -> Tensor:
        """v at logsnr of any shape, (..., m)."""
        logsnr = logsnr.double()
        i, w = self._place(logsnr)
        decay = (logsnr - self.logsnr[-1]).clamp_min(0)[..., None]
        return torch.exp(torch.lerp(self._log[i], self._log[i + 1], w[..., None]) - decay)

    def step(self, t: Tensor, s: Tensor) -> Tensor:
        """Nats of steps between finite logsnr values t < s of one shape, (...)."""
        t, s = t.double(), s.double()
        dsnr = (torch.exp(t) * torch.expm1(s - t))[..., None]
        v = self.variance_at(t)
        rows = dsnr * v if self.noise == "small" else torch.log1p(dsnr * v)
        return rows.mean(-1) * self.d / 2

    def matrix(self, logsnr: Tensor) -> Tensor:
        """Nats of the step from any of N increasing logsnr values to any later one, (N, N); inf elsewhere."""
        logsnr = logsnr.double()
        v, N = self.variance_at(logsnr), len(logsnr)
        dsnr = torch.exp(logsnr)[:, None] * torch.expm1(logsnr[None] - logsnr[:, None])
        dsnr = torch.where(dsnr > 0, dsnr, torch.zeros_like(dsnr))
        if self.noise == "small":
            cost = dsnr * v.mean(1)[:, None] * self.d / 2
        else:
            width = max(1, 2**22 // N**2)
            parts = [torch.log1p(dsnr[..., None] * block[:, None]).sum(-1) for block in v.split(width, 1)]
            cost = torch.stack(parts).sum(0) * (self.d / v.shape[1] / 2)
        later = torch.ones(N, N, dtype=torch.bool).triu(1)
        return torch.where(later, cost, math.inf)

    @cached_property
    def _knot_information(self) -> Tensor:
        return _cumulative(_interval(self._log + self.logsnr[:, None], self.logsnr))

    def information(self, logsnr: Tensor) -> Tensor:
        """(1/2) int_0^snr M d snr in nats at logsnr of any shape: the cost of getting there in continuous time."""
        logsnr = logsnr.double()
        inside = logsnr.clamp(self.logsnr[0], self.logsnr[-1])
        i, w = self._place(inside)
        start = self._log[i] + self.logsnr[i][..., None]  # log(v snr), linear in logsnr within the interval
        end = self._log[i + 1] + self.logsnr[i + 1][..., None]
        here = torch.lerp(start, end, w[..., None])
        part = _log_mean(start, here) * (inside - self.logsnr[i])[..., None]
        total = self._knot_information[i] + part
        edge = torch.exp(self._log[0] + self.logsnr[0])  # v stays below the first knot
        below = edge * torch.exp((logsnr - self.logsnr[0]).clamp_max(0))[..., None]
        beyond = torch.exp(self._log[-1] + self.logsnr[-1]) * (logsnr - self.logsnr[-1]).clamp_min(0)[..., None]
        return (total + below + beyond).mean(-1) * self.d / 2

    def ending(self, logsnr: Tensor) -> Tensor:
        """D in nats at logsnr of any shape.

        Raises:
            ValueError: if the curve has no `last`.
        """
        if self.last is None:
            raise ValueError("this cost curve does not know what the last step costs: see CostCurve.ending_with")
        i, w = self._place(logsnr.double())
        last = self.last.double()
        return torch.lerp(last[i], last[i + 1], w)

    def path_kl(self, logsnr: Tensor) -> Tensor:
        """Excess in nats of a chain evaluated at increasing logsnr (K,) over continuous time, ().

        With `last` it includes the last step and is counted from the best possible end, without it the chain is
        counted up to its last evaluation.
        """
        logsnr = logsnr.double()
        spent = self.step(logsnr[:-1], logsnr[1:]).sum()
        if self.last is None:
            return spent - (self.information(logsnr[-1]) - self.information(logsnr[0]))
        return spent + self.ending(logsnr[-1]) + self.information(logsnr[0]) - self.continuous

    @cached_property
    def continuous(self) -> Tensor:
        """min over the end t of (1/2) int_0^t M d snr + D(t), nats, (): what a chain in continuous time costs."""
        low, high = self.logsnr[0], self.logsnr[-1]
        fine = torch.lerp(low, high, torch.linspace(0, 1, 4097, dtype=torch.float64))
        return (self.information(fine) + self.ending(fine)).min()

    def grid_kl(self, schedule: Schedule, grid: Tensor) -> float:
        """`path_kl` of a grid (K + 1,) that ends at t = 0, nats; a start without signal counts as logsnr = -12."""
        return float(self.path_kl(schedule.logsnr(grid[:-1]).clamp_min(-12.0)))


def _log_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of exp over the interval [a, b]: (e^b - e^a) / (b - a)."""
    gap = b - a
    small = gap.abs() < 1e-6
    return torch.exp(a) * torch.where(small, 1 + gap / 2, torch.expm1(gap) / torch.where(small, 1.0, gap))


def _interval(log_rate: Tensor, knots: Tensor) -> Tensor:
    return _log_mean(log_rate[:-1], log_rate[1:]) * knots.diff()[:, None]


def _cumulative(parts: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(0)])
