r"""Linear inverse problems through a sampler: the posterior of x_0 given y = A x_0 + n, without training.

Given x_t, x_0 has mean x0_hat and covariance C. Taken as Gaussian (moment matching), y given x_t is
N(A x0_hat, A C A^T + N), and with r = y - A x0_hat, S = A C A^T + N, Tweedie's formula for the law given y reads

    E[x_0 | x_t, y] = x0_hat + (sigma^2 / alpha) grad_x log p(y | x_t) = x0_hat + (sigma^2 / alpha) J^T A^T S^-1 r,
    Cov[x_0 | x_t, y] = C - C A^T S^-1 A C,                                          J = d x0_hat / d x_t.

`ConditionedDenoiser` is that: a denoiser for the posterior, which every kernel and solver of this package then samples.
Second-order Tweedie, C = (sigma^2 / alpha) J, turns the gradient into C A^T S^-1 r, so there are two ways to the mean:

    through="covariance"   C A^T S^-1 r with the C that is given: no gradient of the network, no evaluation more
    through="network"      the gradient itself with C in S only: 2 evaluations more, and what C does not know (that a
                           calibrated variance says nothing of how seen and hidden pixels belong together) the network
                           tells

Both are exact, and so is every kernel with its covariance in any number of steps, where p(x_0 | x_t) is Gaussian and C
exact. Elsewhere the posterior is approximate: p(x_0 | x_t) is not Gaussian while much noise is left. `posterior` draws
samples of it and keeps their mean with its error, their spread, and intervals whose coverage can be checked.

Known methods are choices of C: an isotropic C of variance sigma^2 / (sigma^2 + alpha^2) with through="network" is
pseudoinverse guidance (Song et al. 2023, Section 3), diag of the Jacobian's row sums is TMPD (Boys et al. 2023, Section
3), C by Jacobian products and conjugate gradients (`JacobianCovariance`) is MMPS (Rozet et al. 2024, Section 4). A
calibrated C costs no product with the Jacobian.

An interval from n samples. If the sampler is exact, the truth and the samples are exchangeable, and the truth lies
between the order statistics number i and j with probability (j - i) / (n + 1). The interval at level q interpolates
i and j = n + 1 - i so that this is q: it needs n >= (1 + q) / (1 - q) samples (39 for 95%).

Sources: J. Song, A. Vahdat, M. Mardani, J. Kautz, "Pseudoinverse-guided diffusion models for inverse problems", ICLR
2023; B. Boys, M. Girolami, J. Pidstrigach, S. Reich, A. Mosca, O. Akyildiz, "Tweedie moment projected diffusions for
inverse problems", TMLR 2024 (arXiv 2310.06721); F. Rozet, G. Andry, F. Lanusse, G. Louppe, "Learning diffusion priors
from observations by expectation maximization", NeurIPS 2024 (arXiv 2405.13712).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lowvar.expect.conditioning import Measurement, condition, solve
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.jacobian import transposed_product
from lowvar.process.kernel import ReverseKernel
from lowvar.process.noise import Independent, NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver
from lowvar.sample.trajectory import trajectory

__all__ = ["ConditionedDenoiser", "Reconstruction", "Through", "posterior"]

Through = Literal["covariance", "network"]


class ConditionedDenoiser(Denoiser):
    """A denoiser of the posterior given a measurement, by moment matching.

    Args:
        denoiser: of the prior, with a covariance: an exact one, a calibrated one (`WithCovariance`), a variance
            head's or `JacobianCovariance`.
        measurement: what was measured.
        through: the way to the mean (see the module).
        clip: bound b of the data: the mean is clipped to [-b, b] and the covariance limited; None leaves both.
        iterations: of conjugate gradients where S is not diagonal; None: until they have converged. With a
            `JacobianCovariance` an iteration evaluates the network; 1 to 5 are usual there (Rozet et al. 2024).
        steps: of Lanczos, for the root of a covariance that is known by products only.

    Attributes:
        nfe: that of the denoiser, 2 more through the network; products of an implicit covariance come on top.

    Raises:
        ValueError: for an unknown way.

    Example:
        >>> from lowvar.expect.operators import Masking
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis
        >>> twin, schedule = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2)), CosineVP()
        >>> seen = Measurement(Masking(torch.tensor([True, False])), torch.tensor([1.0]), 0.5)
        >>> given = ConditionedDenoiser(twin.denoiser(schedule), seen)
        >>> p = given(torch.zeros(1, 2), schedule.at(1.0))
        >>> [round(v, 3) for v in p.mean[0].tolist()], [round(v, 3) for v in p.covariance.diagonal()[0].tolist()]
        ([0.8, 0.0], [0.2, 1.0])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        through: Through = "covariance",
        clip: float | None = None,
        iterations: int | None = None,
        steps: int = 16,
    ) -> None:
        if through not in get_args(Through):
            raise ValueError(f"through is {through!r}; allowed: {', '.join(get_args(Through))}")
        self.denoiser, self.measurement, self.through, self.clip = denoiser, measurement, through, clip
        self.iterations, self.steps, self.schedule = iterations, steps, denoiser.schedule

    @property
    def nfe(self) -> int:  # type: ignore[override]
        """See the class."""
        return self.denoiser.nfe * (3 if self.through == "network" else 1)

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class.

        Raises:
            ValueError: if the denoiser gives no covariance, or events of another shape than the operator sees.
        """
        A = self.measurement.operator
        if x.shape[1:] != A.event_shape:
            raise ValueError(f"states have shape {tuple(x.shape)}; the operator sees (B, {tuple(A.event_shape)})")
        prior = self.denoiser(x, level)
        if prior.covariance is None:
            raise ValueError(
                "the denoiser gives no covariance of x_0, which weighs it against the measurement: attach a calibrated "
                "one (WithCovariance, Calibration.attach) or JacobianCovariance"
            )
        mean, covariance = condition(
            self.measurement, prior.mean, prior.covariance, iterations=self.iterations, steps=self.steps
        )
        if self.through == "network" and float(level.alpha.min()) > 0:
            r = self.measurement.residual(prior.mean)
            pulled = A.adjoint(solve(self.measurement, prior.covariance, r, iterations=self.iterations))
            scale = expand(level.sigma**2 / level.alpha, x)
            mean = prior.mean + scale * transposed_product(self.denoiser, x, level, pulled)
        found = Posterior(mean, covariance)
        return found if self.clip is None else found.clip(self.clip)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Samples of a posterior and what they say.

    Attributes:
        samples: (n, *event_shape), on the CPU.
        nfe: network evaluations spent; products that conditioning takes with an implicit covariance come on top.
    """

    samples: Tensor
    nfe: int

    @property
    def mean(self) -> Tensor:
        """Posterior mean, (*event_shape)."""
        return self.samples.mean(0)

    @property
    def mean_se(self) -> Tensor:
        """Standard error of the mean by the number of samples, (*event_shape)."""
        return self.std / math.sqrt(len(self.samples))

    @property
    def std(self) -> Tensor:
        """Posterior standard deviation, the uncertainty image, (*event_shape)."""
        return self.samples.std(0)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds (*event_shape) between which the truth lies with probability `level`, if the sampler is exact.

        Raises:
            ValueError: for a level outside (0, 1), or too few samples for it.
        """
        if not 0 < level < 1:
            raise ValueError(f"level is {level}; give a number between 0 and 1, for example 0.95")
        n = len(self.samples)
        i = (n + 1) * (1 - level) / 2  # number of the lower order statistic, from 1
        if i < 1 - 1e-9:
            least = math.ceil((1 + level) / (1 - level) - 1e-9)
            raise ValueError(f"{n} samples have no {100 * level:g}% interval; draw at least {least}")
        ordered = self.samples.sort(0).values  # torch.quantile ends at 2^24 numbers
        k = min(max(math.floor(i), 1), n // 2)
        part = max(i - k, 0.0)
        low = torch.lerp(ordered[k - 1], ordered[k], part)
        high = torch.lerp(ordered[n - k], ordered[n - k - 1], part)
        return low, high

    def coverage(self, truth: Tensor, level: float = 0.95) -> float:
        """Share of the entries of the truth, (*event_shape), that lie within their intervals.

        Raises:
            ValueError: for a truth of another shape, and as `interval`.
        """
        low, high = self.interval(level)
        if truth.shape != low.shape:
            raise ValueError(f"the truth has shape {tuple(truth.shape)}; give one event, {tuple(low.shape)}")
        truth = truth.to(low)
        return float(((truth >= low) & (truth <= high)).double().mean())


@torch.no_grad()
def posterior(
    denoiser: Denoiser,
    solver: Solver,
    grid: Tensor,
    measurement: Measurement,
    n: int = 64,
    noise: NoiseSource | None = None,
    *,
    through: Through = "covariance",
    iterations: int | None = None,
    steps: int = 16,
    clip: float | None = None,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Reconstruction:
    """Samples of the posterior of x_0 given one measurement.

    The last step of a kernel with variance "posterior" is drawn, x_0 ~ N(mean, C) given y: its mean alone, which
    samplers return elsewhere, lacks the spread that is wanted here. Other solvers end as they do.

    Args:
        denoiser: of the prior, with a covariance.
        solver, grid: any of this package, for example `ReverseKernel(eta=1.0)`.
        measurement: one measurement, `y` of shape (*measured_shape).
        n: number of samples; their interval at 95% needs 39.
        noise: source (default `Independent(0)`).
        through, iterations, steps, clip: see `ConditionedDenoiser`.
        batch_size, dtype, device, progress: as in `lowvar.sample.generate`.

    Raises:
        ValueError: for fewer than 2 samples, several measurements, a grid that does not fall or a clip that is not
            above 0, and as in `ConditionedDenoiser`.

    Example:
        >>> from lowvar.expect.operators import Masking
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis, ReverseKernel
        >>> from lowvar.process.grid import trailing
        >>> twin, schedule = GaussianTwin(torch.zeros(2), PixelBasis((2,)), torch.ones(2)), CosineVP()
        >>> seen = Measurement(Masking(torch.tensor([True, False])), torch.tensor([1.0]), 0.5)
        >>> found = posterior(twin.denoiser(schedule), ReverseKernel(), trailing(schedule, 8), seen, n=400)
        >>> round(found.mean[0].item(), 1), [round(v, 1) for v in found.std.tolist()], found.nfe
        (0.8, [0.4, 1.0], 0)
    """
    if n < 2:
        raise ValueError(f"n is {n}; a posterior needs at least 2 samples")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; give the data's bound, above 0, or None")
    if len(grid) < 2 or not bool((torch.as_tensor(grid).diff() < 0).all()):
        raise ValueError("the grid does not fall from noise to data; give decreasing times, at least 2")
    if measurement.y.shape != measurement.operator.measured_shape:
        raise ValueError(
            f"y has shape {tuple(measurement.y.shape)}: several measurements; call `posterior` for each, or sample a "
            "`ConditionedDenoiser`, which takes one a sample"
        )
    noise = Independent(0) if noise is None else noise
    given = ConditionedDenoiser(denoiser, measurement, through, clip, iterations, steps)
    drawn = False
    if isinstance(solver, ReverseKernel) and solver.variance == "posterior":
        solver, drawn = replace(solver, last="decoder"), True
    shape = tuple(measurement.operator.event_shape)
    prior, first = given.schedule.at(1.0), given.schedule.at(grid[0])
    parts = []
    for index in torch.arange(n).split(batch_size):
        x = solver.initial(noise.normal(index, shape, draw=0, dtype=dtype, device=device), prior, first)
        k = 0
        for state, info in trajectory(given, solver, grid, x, noise, index):
            x, k = state.x, k + 1
            if drawn and k == len(grid) - 1 and float(given.schedule.at(grid[-1]).sigma) == 0:
                x = info.law.sample(noise.normal(index, shape, draw=k, dtype=dtype, device=device))
            if progress is not None:
                progress(len(index))
        parts.append((x if clip is None else x.clamp(-clip, clip)).cpu())
    return Reconstruction(torch.cat(parts), n * given.nfe * solver.nfe(len(grid) - 1))
