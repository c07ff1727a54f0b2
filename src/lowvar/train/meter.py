r"""The loss meter: an average over images, times and noise from few evaluations, with an interval that can be believed.

Wanted is the loss of N given images over all times and noise, and that of all images such as these,

    L = 1/N sum_i L_i,   L_i = int_0^1 E_eps l(x_i, u, eps) du;      E L_i  over the population of images.

**Times.** A density q(u), constant on K bins, takes more evaluations where the loss varies more; an evaluation counts
l / q. Of v = Q(u) every image has one value in each half of [0, 1], in each of two *independent* replicates h = 0, 1:

    v = (s + (pi_hs(i) + U_his) / N) / 2,      s = 0, 1,  pi_hs permutations,  U uniform,

so that each half is stratified finely over all images, an image's times are spread, and 4 N evaluations are made.

**Control variates.** F (p,) are functions of (x, u, eps) with known expectation given the image and the bin, E_ib
(`linear_loss`, powers of the time, the constant). With coefficients beta_b for bin b, any that do not come from image
i itself (they are regressed on nine tenths of the images),

    y_ih = 1/2 sum_s (l - beta . F) / q + 1/K sum_b beta_b . E_ib            has expectation L_i.

**Intervals.** Given the images, y_i0 and y_i1 are independent and have equal means, so

    L_hat = 1/N sum_i (y_i0 + y_i1) / 2,      se^2 = 1/(4 N^2) sum_i (y_i0 - y_i1)^2                (these images)
                                              se^2 + cov_i(y_i0, y_i1) / N                     (all such images)

The strata make neighbours' errors negatively correlated, which se does not count: it errs on the safe side. What is
tested is coverage of both targets.

Everything here is arithmetic on a table of evaluations; `validation` evaluates networks with it. Sources: Owen 2013,
"Monte Carlo theory, methods and examples", ch. 8 to 10 (strata, allocation, regression); Kingma et al. 2021, App. I.1
(low-discrepancy times).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.train.piecewise import piecewise_times
from lowvar.train.timesteps import UniformTimes, floored

__all__ = ["Design", "Estimate", "Measured", "allocation", "make_design", "measure"]

_FOLDS = 10
_FLOOR = 0.3
_RIDGE = 0.5
_POWERS = 4
SWEEPS = 4  # two replicates x two halves


@functools.cache
def quantile(df: int) -> float:
    """The 97.5% quantile of Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, df))


@dataclass(frozen=True)
class Design:
    """Which image is evaluated at which time.

    Attributes:
        n: number of images.
        u: times as uniform numbers in [0, 1), (4 n,) float64, sweep by sweep: replicate 0 (both halves), replicate 1.
        q: density at each time, (4 n,) float64.
        bin: bin of each time, (4 n,) int64.
        density: q by bin, (K,) float64, mean 1.
    """

    n: int
    u: Tensor
    q: Tensor
    bin: Tensor
    density: Tensor

    def __len__(self) -> int:
        """Number of evaluations."""
        return len(self.u)

    @property
    def image(self) -> Tensor:
        """Image of each evaluation, (4 n,) int64."""
        return torch.arange(self.n).repeat(SWEEPS)


def allocation(spread: Tensor, floor: float = _FLOOR) -> Tensor:
    """The density proportional to standard deviations by bin (Neyman 1934), mixed with a share of uniform.

    Args:
        spread: (K,), >= 0; where all are 0 or one is not finite the density is uniform.
        floor: share of the uniform density, in (0, 1].

    Example:
        >>> allocation(torch.tensor([3.0, 1.0]), floor=0.5).tolist()
        [1.25, 0.75]
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor is {floor}; give a share in (0, 1]: without it a bin could be left out")
    spread = spread.double()
    total = float(spread.sum())
    if not math.isfinite(total) or total <= 0:
        return torch.ones_like(spread)
    return len(spread) * floored(spread, floor)


def make_design(n: int, density: Tensor, noise: NoiseSource) -> Design:
    """The design for n images; permutations and jitter are the uniform numbers of `noise`, draws 1 to 8.

    Example:
        >>> from lowvar.process import Independent
        >>> design = make_design(48, torch.ones(8), Independent(0))
        >>> torch.bincount(design.bin).tolist() == [24] * 8
        True
    """
    density = density.double()
    sweeps = []
    for sweep in range(SWEEPS):
        key = noise.uniform(range(n), (), draw=1 + sweep, dtype=torch.float64)
        jitter = noise.uniform(range(n), (), draw=1 + SWEEPS + sweep, dtype=torch.float64)
        sweeps.append((sweep % 2 + (torch.argsort(torch.argsort(key)) + jitter) / n) / 2)
    drawn = piecewise_times(density / density.sum(), UniformTimes(None), torch.cat(sweeps))
    return Design(n, drawn.t, 1 / drawn.weight, drawn.bin, density / density.mean())


@dataclass(frozen=True)
class Estimate:
    """A loss with two standard errors.

    Attributes:
        value: the estimate.
        se: standard error given the images.
        population_se: standard error as an estimate for all such images.
        df: degrees of freedom of both.
    """

    value: float
    se: float
    population_se: float
    df: int

    @property
    def interval(self) -> tuple[float, float]:
        """95%, for these images."""
        return self._within(self.se)

    @property
    def population(self) -> tuple[float, float]:
        """95%, for all such images."""
        return self._within(self.population_se)

    def _within(self, se: float) -> tuple[float, float]:
        reach = quantile(self.df) * se
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Measured:
    """What a table of evaluations says.

    Attributes:
        total: over all times.
        bins: (K, 3): loss, standard error given the images, and number of evaluations, by bin of the time; the mean of
            the losses is the total.
        residual: spread (K,) of what the control variates leave over, for the allocation of a later design.
    """

    total: Estimate
    bins: Tensor
    residual: Tensor


def _with_time(design: Design, F: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Adds the constant and centred powers of the time within the bin."""
    K = len(design.density)
    r = 2 * (design.u * K - design.bin) - 1
    own = torch.stack([torch.ones_like(r), r, r**2 - 1 / 3, r**3], 1)
    known = torch.zeros(*expected.shape[:2], _POWERS, dtype=torch.float64)
    known[..., 0] = 1
    return torch.cat([own, F], 1), torch.cat([known, expected], 2)


def _coefficients(design: Design, F: Tensor, values: Tensor) -> Tensor:
    """Beta (K, folds, p) of a bin on the images outside a fold: least squares with a little ridge; column 0 is 1."""
    K, p = len(design.density), F.shape[1]
    cell = design.bin * _FOLDS + design.image % _FOLDS

    def others(x: Tensor) -> Tensor:
        """Sums over a bin's evaluations outside each fold, (K, folds, ...)."""
        sums = torch.zeros(K * _FOLDS, *x.shape[1:], dtype=torch.float64).index_add_(0, cell, x)
        sums = sums.reshape(K, _FOLDS, *x.shape[1:])
        return sums.sum(1, keepdim=True) - sums

    count = others(torch.ones(len(F), dtype=torch.float64)).clamp_min(1)
    power = torch.zeros(K, p, dtype=torch.float64).index_add_(0, design.bin, F**2)
    unit = (power / torch.bincount(design.bin, minlength=K).clamp_min(1)[:, None]).sqrt().clamp_min(1e-150)
    A = (F / unit[design.bin])[:, 1:]
    centre, mean = others(A) / count[..., None], others(values) / count
    gram = others(A[:, :, None] * A[:, None, :]) / count[..., None, None] - centre[..., :, None] * centre[..., None, :]
    cross = others(A * values[:, None]) / count[..., None] - centre * mean[..., None]
    var = torch.diagonal(gram, dim1=-2, dim2=-1)
    used = (var > 1e-9) & (count > 2 * p)[..., None]  # no variation, or too few to regress: the constant alone
    both = used[..., :, None] & used[..., None, :]
    share = torch.full((p - 1,), _RIDGE, dtype=torch.float64)
    share[: _POWERS - 1] = 1e-9  # a loss that is a cubic of the time has no variance left
    ridge = torch.where(used, share * var / count[..., None].sqrt(), 1.0)
    slope = torch.linalg.solve(torch.where(both, gram, 0.0) + torch.diag_embed(ridge), torch.where(used, cross, 0.0))
    return torch.cat([(mean - (slope * centre).sum(-1))[..., None], slope / unit[:, None, 1:]], -1)


def measure(design: Design, values: Tensor, features: Tensor, expected: Tensor) -> Measured:
    """The loss, from one evaluation a row of the design.

    Args:
        design: N images, 4 N evaluations, K bins.
        values: losses, (4 N,).
        features: control variates, (4 N, p); p may be 0.
        expected: their expectation given image and bin, (N, K, p).

    Raises:
        ValueError: if shapes do not fit or there are fewer than two images.

    Example:
        >>> from lowvar.process import Independent
        >>> design = make_design(50, torch.ones(8), Independent(0))
        >>> found = measure(design, 2 * design.u, torch.zeros(200, 0), torch.zeros(50, 8, 0))
        >>> round(found.total.value, 6), found.total.se < 1e-4
        (1.0, True)
    """
    n, K = design.n, len(design.density)
    if n < 2 or values.shape != (len(design),) or features.shape[0] != len(design) or expected.shape[:2] != (n, K):
        raise ValueError(
            f"{n} images, {tuple(values.shape)} values, {tuple(features.shape)} features, {tuple(expected.shape)} "
            "expectations; need at least 2 images, 4 values an image and one expectation an image, bin and feature"
        )
    values = values.double()
    F, E = _with_time(design, features.double(), expected.double())
    beta = _coefficients(design, F, values)
    e = values - (F * beta[design.bin, design.image % _FOLDS]).sum(1)
    known = torch.einsum("ikp,kip->ik", E, beta[:, torch.arange(n) % _FOLDS])
    part = e / design.q
    y = part.reshape(2, 2, n).mean(1) + known.mean(1)  # (replicate, image)
    se2 = float(((y[0] - y[1]) ** 2).sum()) / (4 * n**2)
    centred = y - y.mean(1, keepdim=True)
    among = max(0.0, float((centred[0] * centred[1]).sum()) / (n - 1))
    total = Estimate(float(y.mean()), math.sqrt(se2), math.sqrt(se2 + among / n), n - 1)
    rows, residual = [], []
    for b in range(K):
        inside = design.bin == b
        count = int(inside.sum())
        spread = float(e[inside].std()) if count > 1 else math.nan
        loss = float(known[:, b].mean() + part[inside].sum() * (K / len(design)))
        rows.append([loss, spread / math.sqrt(count) if count > 1 else math.nan, count])
        residual.append(spread)
    return Measured(total, torch.tensor(rows, dtype=torch.float64), torch.tensor(residual, dtype=torch.float64))
