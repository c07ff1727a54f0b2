r"""The linear-Gaussian reverse chain: the exact law of the output, without a sample.

A Gaussian target has a posterior mean that is affine in x_t and a posterior covariance that does not depend on it.
Every solver of this package then moves (state, noise) by an affine map, and a Gaussian start stays Gaussian:

    mean_s = a mean_t + kappa (m + G (mean_t - alpha_t m)),
    cov_s  = M cov_t M^T + lambda^2 I + kappa^2 C,   M = a I + kappa G,   G = alpha_t S (alpha_t^2 S + sigma_t^2 I)^-1.

`kernel_chain` is this recursion, written from the formulas and sharing no code with the kernels. `affine_law` is the
same law for *any* solver (multistep ones included), by running it: noise is an argument, so pushing unit vectors in
place of the start's and each step's noise through the chain gives the columns of the map
x_K = b + F_0 z_0 + sum_k F_k z_k, hence mean b and covariance sum F F^T, to rounding.

The last step. With s = 0 the exact reverse transition has covariance kappa^2 C = C. `last="mean"` leaves it out on
purpose (the output is x0_hat, of covariance S - C), so the output has the target's law for `last="decoder"`, or at the
last level t > 0 of a grid that stops there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.denoiser import Denoiser
from lowvar.process.kernel import Gaussian
from lowvar.process.schedule import Schedule
from lowvar.process.solver import Solver
from lowvar.testing.gaussian import GaussianTarget

__all__ = ["Moments", "affine_law", "kernel_chain"]


@dataclass(frozen=True)
class Moments:
    """Mean (*event_shape) and dense covariance (d, d), float64."""

    mean: Tensor
    covariance: Tensor

    def distance(self, other: Moments) -> float:
        """Largest absolute difference of an entry of mean or covariance.

        Example:
            >>> one = Moments(torch.zeros(2), torch.eye(2))
            >>> one.distance(Moments(torch.zeros(2), 3 * torch.eye(2)))
            2.0
        """
        mean = float((self.mean - other.mean).abs().max())
        return max(mean, float((self.covariance - other.covariance).abs().max()))

    @classmethod
    def of(cls, law: Gaussian) -> Moments:
        """The moments of a Gaussian of batch size 1."""
        return cls(law.mean[0], law.covariance.dense()[0])


def kernel_chain(
    target: GaussianTarget,
    schedule: Schedule,
    grid: Tensor,
    eta: float,
    *,
    covariance: Callable[[Tensor], Tensor] | None = None,
    last: str = "decoder",
) -> list[Moments]:
    """Laws of the chain of the first-order kernel at all levels of a grid, started from the exact marginal.

    Args:
        target: the Gaussian.
        schedule: any schedule.
        grid: decreasing times (K + 1,).
        eta: stochasticity.
        covariance: from the exact C (d, d) to the one the kernel is given; default C itself.
        last: "decoder" keeps the noise of a step to s = 0, "mean" leaves it out.

    Returns:
        K + 1 moments, the first those of the start.

    Example:
        >>> from lowvar.process.grid import trailing
        >>> from lowvar.process.schedule import Flow
        >>> from lowvar.testing.gaussian import anisotropic_gaussian
        >>> target, schedule = anisotropic_gaussian((3,)), Flow()
        >>> laws = kernel_chain(target, schedule, trailing(schedule, 4), eta=0.5)
        >>> laws[-1].distance(Moments(target.mean, target.covariance)) < 1e-10
        True
    """
    levels = schedule.at(grid)
    S, m = target.covariance, target.mean.flatten()
    eye = torch.eye(len(m), dtype=torch.float64)
    alpha, sigma = levels.alpha[0], levels.sigma[0]
    mean, cov = alpha * m, alpha**2 * S + sigma**2 * eye
    laws = [Moments(mean.reshape(target.event_shape), cov)]
    for k in range(len(levels) - 1):
        alpha_t, sigma_t, alpha_s, sigma_s = levels.alpha[k], levels.sigma[k], levels.alpha[k + 1], levels.sigma[k + 1]
        ratio = (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2  # snr_t / snr_s
        lambda2 = eta**2 * sigma_s**2 * (1 - ratio)
        a = torch.sqrt(sigma_s**2 - lambda2) / sigma_t
        kappa = alpha_s - alpha_t * a
        total = alpha_t**2 * S + sigma_t**2 * eye
        G = alpha_t * torch.linalg.solve(total, S)
        C = sigma_t**2 * torch.linalg.solve(total, S)
        M = a * eye + kappa * G
        mean = a * mean + kappa * (m + G @ (mean - alpha_t * m))
        cov = M @ cov @ M.mT
        if float(sigma_s) > 0 or last == "decoder":
            cov = cov + lambda2 * eye + kappa**2 * (C if covariance is None else covariance(C))
        laws.append(Moments(mean.reshape(target.event_shape), cov))
    return laws


def affine_law(denoiser: Denoiser, solver: Solver, grid: Tensor, start: Gaussian) -> Moments:
    """The exact law of a solver's output where denoiser and solver are affine in the state, by pushing unit vectors.

    Costs one batch of 2 + d + K d states through the grid.

    Args:
        denoiser: with a mean affine in x and a covariance that does not depend on x.
        solver: any solver; where it is stochastic every step gets noise, the last included (its policy decides).
        grid: decreasing times (K + 1,).
        start: law of the state at the first time, batch size 1, float64.

    Raises:
        ValueError: if the chain is not affine (superposition fails to 1e-8).

    Example:
        >>> from lowvar.process import CosineVP, MultistepSolver
        >>> from lowvar.testing.gaussian import anisotropic_gaussian
        >>> target, schedule = anisotropic_gaussian((3,)), CosineVP()
        >>> grid = torch.tensor([0.9, 0.1], dtype=torch.float64)
        >>> solver, start = MultistepSolver(target.twin), target.marginal(schedule.at(0.9))
        >>> law = affine_law(target.denoiser(schedule), solver, grid, start)
        >>> law.distance(Moments.of(target.marginal(schedule.at(0.1)))) < 1e-10
        True
    """
    levels = denoiser.schedule.at(grid)
    at = solver.evaluations(levels)
    shape, d, steps = start.mean.shape[1:], start.covariance.d, len(at)
    eye = torch.eye(d, dtype=torch.float64).reshape(d, *shape)
    zero = torch.zeros((2 + d + steps * d, *shape), dtype=torch.float64)
    unit = zero.clone()
    unit[1 : 1 + d], unit[-1] = eye, 1.0
    plan, state = solver.prepare(levels), solver.start(start.mean + start.covariance.sqrt_matvec(unit))
    for k in range(steps):
        z = None
        if solver.stochastic:
            z = zero.clone()
            z[1 + (k + 1) * d : 1 + (k + 2) * d], z[-1] = eye, 1.0
        state, _ = solver.step(plan, k, state, denoiser(state.x, at[k]), z)
    base, columns = state.x[0], (state.x[1:] - state.x[0]).flatten(1)
    excess = float((columns[-1] - columns[:-1].sum(0)).abs().max())
    if not excess <= 1e-8 * (1 + float(columns.abs().max())):
        raise ValueError(
            f"the chain is not affine: superposition fails by {excess:.3g}; use an exact Gaussian denoiser"
        )
    return Moments(base, columns[:-1].mT @ columns[:-1])
