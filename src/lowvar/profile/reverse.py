r"""What the reverse variance of a sampler is worth, step by step: is it right, and what does it cost?

For a step t -> s of a grid, with q(x_s | x_t, x_0) = N(a x_t + kappa x_0, lambda^2 I) and the sampler's kernel
N(a x_t + kappa x0_hat, S), the error of the step is r = x_s - a x_t - kappa x0_hat, and

    ratio   (1/d) E r^T S^-1 r  =  (1/d) E [lambda^2 tr S^-1 + kappa^2 (x_0 - x0_hat)^T S^-1 (x_0 - x0_hat)]

is 1 where S is the variance that the network's own steps need, above 1 where it is too small, below 1 where it is too
large. The mean over the noise of x_s is taken in closed form. Of a head that says C = Cov[x_0 | x_t] the *posterior*
ratio (1/d) E (x_0 - x0_hat)^T C^-1 (x_0 - x0_hat) stands beside it: small steps hide C behind lambda^2, this does not.

    cost    E KL(q(x_s | x_t, x_0) || p(x_s | x_t)), bits a dimension (`lowvar.sample.likelihood`)

is the step's part of the variational bound. Variances that are compared share states and the network's evaluation, so
that differences of costs have paired intervals; S = lambda^2 I + kappa^2 mmse I, the best isotropic one, is what a
wrong number loses against. Steps to clean data have no density and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.metrics.intervals import Interval, jackknife
from lowvar.process.covariance import Covariance, Isotropic
from lowvar.process.denoiser import CovarianceModel, Denoiser, expand
from lowvar.process.kernel import ReverseKernel, step_coefficients
from lowvar.process.noise import NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.sample.likelihood import kl_bits

__all__ = ["ReverseVariance", "StepRows", "VarianceCheck", "checked", "lost", "step_rows"]

_BLOCKS = 32  # of the jackknife, at most


@dataclass(frozen=True, eq=False)
class ReverseVariance:
    """A variance of reverse steps.

    Attributes:
        name: what reports call it.
        kernel: the kernel, eta > 0.
        covariance: C of a `posterior` variance, or None where the network's posterior has it or none is needed.
    """

    name: str
    kernel: ReverseKernel
    covariance: CovarianceModel | None = None

    def __post_init__(self) -> None:
        """Refuses steps without noise."""
        if self.kernel.eta == 0:
            raise ValueError("eta is 0: steps without noise have no variance to check; give eta in (0, 1]")


@dataclass(frozen=True, eq=False)
class StepRows:
    """What images say of a variance.

    Attributes:
        ratio: (n, K - 1).
        bits: likewise.
        posterior: the posterior ratio, likewise; NaN where no C is promised.
    """

    ratio: Tensor
    bits: Tensor
    posterior: Tensor


@dataclass(frozen=True)
class VarianceCheck:
    """A variance, checked.

    Attributes:
        name: the variance's.
        logsnr: of the states that steps begin at, decreasing noise.
        ratio: by step.
        bits: by step.
        posterior: by step, or () where no C is promised.
        total: bits a dimension of all steps.
        n: images.
    """

    name: str
    logsnr: tuple[float, ...]
    ratio: tuple[Interval, ...]
    bits: tuple[Interval, ...]
    posterior: tuple[Interval, ...]
    total: Interval
    n: int


def _quadratic(C: Covariance, v: Tensor) -> Tensor:
    return C.inverse_quadratic(v).double().expand(len(v))


@torch.no_grad()
def step_rows(
    denoiser: Denoiser,
    variances: Sequence[ReverseVariance],
    grid: Tensor,
    batches: Iterable[Tensor],
    noise: NoiseSource,
) -> Iterator[dict[str, StepRows]]:
    """Rows of every variance, batch by batch; one evaluation a step and image, whatever is compared.

    Args:
        denoiser: the network.
        variances: what is compared.
        grid: decreasing times (K + 1,).
        batches: held-out data (b, *event_shape).
        noise: source; image i of the pass has number i, step k draw k.

    Yields:
        {name: rows}.

    Raises:
        ValueError: if the grid has no step that ends above t = 0.
    """
    points = denoiser.schedule.at(grid)
    steps = [k for k in range(len(grid) - 1) if float(points[k + 1].sigma) > 0]
    if not steps:
        raise ValueError(f"a grid of {len(grid) - 1} steps to clean data has no step to check; give at least 2 steps")
    first = 0
    for x0 in batches:
        index = torch.arange(first, first + len(x0))
        first += len(x0)
        found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {v.name: [] for v in variances}
        for k in steps:
            t, s = points[k].to(x0.device), points[k + 1].to(x0.device)
            eps = noise.normal(index, x0.shape[1:], draw=k, dtype=x0.dtype, device=x0.device)
            x = expand(t.alpha, x0) * x0 + expand(t.sigma, x0) * eps
            own = denoiser(x, t)
            for v in variances:
                posterior = own if v.covariance is None else Posterior(own.mean, v.covariance(x, t, own), own.fraction)
                S = v.kernel(x, posterior, t, s).covariance
                c = step_coefficients(t, s, v.kernel.eta)
                gap = x0 - own.mean
                unit = Isotropic(torch.ones((), dtype=x0.dtype, device=x0.device), x0.shape[1:])
                traces = float(c.lambda2) * S.inverse_trace(unit).double().expand(len(x0))
                ratio = (traces + float(c.kappa) ** 2 * _quadratic(S, gap)) / S.d
                bits = kl_bits(x0, posterior, S, c.kappa, c.lambda2).double().expand(len(x0))
                promised = posterior.covariance if v.kernel.variance == "posterior" else None
                share = torch.full_like(ratio, torch.nan) if promised is None else _quadratic(promised, gap) / S.d
                found[v.name].append((ratio.cpu(), bits.cpu(), share.cpu()))
        yield {
            n: StepRows(*(torch.stack(column, 1) for column in zip(*rows, strict=True))) for n, rows in found.items()
        }


def _mean(values: Tensor) -> Interval:
    return jackknife(values, max(16, min(_BLOCKS, len(values) // 2))).interval()


def checked(denoiser: Denoiser, grid: Tensor, rows: Mapping[str, Sequence[StepRows]]) -> dict[str, VarianceCheck]:
    """The variances with intervals over images.

    Args:
        denoiser, grid: as of `step_rows`.
        rows: of every batch, by name; at least 32 images.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis
        >>> from lowvar.process.grid import trailing
        >>> schedule = CosineVP()
        >>> twin = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.tensor([1.0, 1.0]))
        >>> denoiser, grid = twin.denoiser(schedule), trailing(schedule, 4)
        >>> exact, small = (ReverseVariance(v, ReverseKernel(1.0, v)) for v in ("posterior", "small"))
        >>> x0 = twin.sample(Independent(0).normal(range(512), (2,)))
        >>> (rows,) = step_rows(denoiser, [exact, small], grid, [x0], Independent(1))
        >>> found = checked(denoiser, grid, {name: [r] for name, r in rows.items()})
        >>> found["posterior"].ratio[1].low < 1 < found["posterior"].ratio[1].high, found["small"].ratio[1].low > 1.2
        (True, True)
    """
    points = denoiser.schedule.at(grid)
    logsnr = tuple(float(points[k].logsnr) for k in range(len(grid) - 1) if float(points[k + 1].sigma) > 0)
    found = {}
    for name, parts in rows.items():
        ratio, bits, share = (torch.cat([getattr(p, a) for p in parts]) for a in ("ratio", "bits", "posterior"))
        known = bool(torch.isfinite(share).all())
        found[name] = VarianceCheck(
            name,
            logsnr,
            tuple(_mean(ratio[:, k]) for k in range(len(logsnr))),
            tuple(_mean(bits[:, k]) for k in range(len(logsnr))),
            tuple(_mean(share[:, k]) for k in range(len(logsnr))) if known else (),
            _mean(bits.sum(1)),
            len(ratio),
        )
    return found


def lost(own: Sequence[StepRows], best: Sequence[StepRows]) -> Interval:
    """Bits a dimension that one variance costs more than another on the same states, with its paired interval."""
    return _mean(torch.cat([(a.bits - b.bits).sum(1) for a, b in zip(own, best, strict=True)]))
