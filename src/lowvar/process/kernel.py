r"""Reverse kernels: every step t -> s (s < t) is one Gaussian.

With eps_hat = (x_t - alpha_t x0_hat) / sigma_t and lambda in [0, sigma_s], the exact reverse transition of a process
whose posterior has mean x0_hat and covariance C is

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - lambda^2) eps_hat + noise,    Cov(noise) = lambda^2 I + kappa^2 C
        = a x_t + kappa x0_hat + noise,
    a = (sigma_s / sigma_t) sqrt(1 - eta^2 r),   kappa = alpha_s - alpha_t a,   lambda = eta sigma_s sqrt(r),
    r = 1 - snr_t / snr_s = -expm1(-2 h),        h = l_s - l_t.

eta = 1 is ancestral sampling (DDPM), eta = 0 is DDIM; on Gaussian data any eta is exact in any number of steps. The
choices of variance that others make are special cases (Cov(noise) for eta = 1):

    small       beta_tilde I = lambda^2 I                            (C := 0; Ho et al. 2020)
    large       beta I, beta = sigma_t^2 r                           (Ho et al. 2020)
    learned     exp(f log beta + (1 - f) log beta_tilde)             (Nichol & Dhariwal 2021)
    posterior   lambda^2 I + kappa^2 C                               (any covariance, any eta)

The last step has s = 0: sigma_s = 0, lambda = 0, kappa = 1, mean = x0_hat. Its policy is explicit: `last="mean"` adds
no noise (sampling); `last="decoder"` keeps a density for likelihoods: kappa^2 C, or beta_tilde of the step before for
`small`, for `large` and as the lower end of `learned` (as Ho et al. and improved-diffusion do).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance, Diagonal, Isotropic
from lowvar.process.denoiser import expand
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver, State, StepInfo

__all__ = ["Gaussian", "LastStep", "ReverseKernel", "StepCoefficients", "Variance", "step_coefficients"]

Variance = Literal["small", "large", "learned", "posterior"]
LastStep = Literal["mean", "decoder"]


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance) over events (B, *event_shape): what one reverse step is.

    Example:
        >>> p = Gaussian(torch.zeros(1, 2), Isotropic(1.0, (2,)))
        >>> q = Gaussian(torch.ones(1, 2), Isotropic(1.0, (2,)))
        >>> p.kl(q).tolist()
        [1.0]
    """

    mean: Tensor
    covariance: Covariance

    def sample(self, z: Tensor) -> Tensor:
        """mean + C^(1/2) z for standard normal z of the mean's shape."""
        return self.mean + self.covariance.sqrt_matvec(z)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats, (B,). A singular covariance (a deterministic step) has none: -inf or nan."""
        quadratic = self.covariance.inverse_quadratic(x - self.mean)
        return -0.5 * (quadratic + self.covariance.logdet() + self.covariance.d * math.log(2 * math.pi))

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) in nats, (B,)."""
        quadratic = other.covariance.inverse_quadratic(self.mean - other.mean)
        trace = other.covariance.inverse_trace(self.covariance)
        return 0.5 * (trace - self.covariance.d + quadratic + other.covariance.logdet() - self.covariance.logdet())


@dataclass(frozen=True)
class StepCoefficients:
    """The numbers of a step t -> s; floats, or float64 tensors of the levels' shape.

    Attributes:
        a: factor of x_t in the mean.
        kappa: factor of x0_hat in the mean.
        lambda2: variance of the injected noise, lambda^2.
        kappa2: factor of C in the noise: kappa^2, or 0 where the policy of the last step adds no noise.
        small: beta_tilde = lambda^2, replaced at s = 0 by the policy of the last step.
        large: beta = sigma_t^2 r, likewise.
        beta: sigma_t^2 r, the upper end of a learned variance, at every step.
    """

    a: Any
    kappa: Any
    lambda2: Any
    kappa2: Any
    small: Any
    large: Any
    beta: Any


def step_coefficients(
    t: Level, s: Level, eta: float = 1.0, last: LastStep = "mean", before: Level | None = None
) -> StepCoefficients:
    """Coefficients of the step t -> s at stochasticity eta in [0, 1], float64; shapes of the levels broadcast.

    Args:
        t, s: levels; s is less noisy.
        eta: stochasticity.
        last: policy where s is clean data (see the module).
        before: the level before t; `last="decoder"` takes beta_tilde from it where s is clean.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> schedule = CosineVP()
        >>> c = step_coefficients(schedule.at(0.5), schedule.at(0.0))
        >>> float(c.a), float(c.kappa), float(c.lambda2)
        (0.0, 1.0, 0.0)
    """
    two_h = s.logsnr - t.logsnr
    r = -torch.expm1(-two_h)
    root = torch.sqrt(r * (1 - eta**2) + torch.exp(-two_h))  # sqrt(1 - eta^2 r)
    log_root = torch.where(r < 0.5, torch.log1p(-(eta**2) * r) / 2, torch.log(root))  # small steps keep their digits
    a = s.sigma / t.sigma * root
    near = -s.alpha * torch.expm1(log_root - two_h / 2)
    kappa = torch.where(torch.isinf(two_h), s.alpha - t.alpha * a, near)
    lambda2, beta, kappa2 = eta**2 * s.sigma**2 * r, t.sigma**2 * r, kappa**2
    clean = s.sigma == 0
    if last == "mean":
        zero = torch.zeros_like(beta)
        return StepCoefficients(
            a, kappa, lambda2, torch.where(clean, zero, kappa2), lambda2, torch.where(clean, zero, beta), beta
        )
    floor = beta if before is None else step_coefficients(before, t, eta).lambda2
    small, large = torch.where(clean, floor, lambda2), torch.where(clean, floor, beta)
    return StepCoefficients(a, kappa, lambda2, kappa2, small, large, beta)


@dataclass(frozen=True)
class ReverseKernel(Solver):
    """The first-order reverse kernel N(a x_t + kappa x0_hat, lambda^2 I + kappa^2 C) and its usual special cases.

    Args:
        eta: stochasticity in [0, 1]; `large` and `learned` are defined for 1 only.
        variance: the noise's covariance (see the module).
        last: policy of the step to s = 0.

    Raises:
        ValueError: if eta or variance are out of range, or a posterior lacks what the variance needs.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> schedule = CosineVP()
        >>> kernel = ReverseKernel(eta=1.0, variance="small")
        >>> step = kernel(torch.zeros(1, 4), Posterior(torch.ones(1, 4)), schedule.at(0.5), schedule.at(0.4))
        >>> step.mean.shape, step.covariance.trace().shape
        (torch.Size([1, 4]), torch.Size([1]))
    """

    eta: float = 1.0
    variance: Variance = "posterior"
    last: LastStep = "mean"

    def __post_init__(self) -> None:
        """Checks the choices."""
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; allowed: 0 (DDIM) to 1 (ancestral)")
        if self.variance not in ("small", "large", "learned", "posterior"):
            raise ValueError(f"variance is {self.variance!r}; allowed: small, large, learned, posterior")
        if self.variance in ("large", "learned") and self.eta != 1:
            raise ValueError(f"variance {self.variance!r} is defined for eta = 1, got eta = {self.eta}")

    @property
    def order(self) -> int:
        """Order of convergence of the mean."""
        return 1

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return self.eta > 0 or self.variance == "posterior"

    def __call__(self, x: Tensor, posterior: Posterior, t: Level, s: Level, before: Level | None = None) -> Gaussian:
        """The law of x_s given x_t.

        Args:
            x: states x_t, (B, *event_shape).
            posterior: the denoiser's answer at x_t.
            t, s: levels, scalar or (B,), s less noisy than t.
            before: the level the chain was at before t; used by `last="decoder"` at s = 0 only.
        """
        return self._law(x, posterior, step_coefficients(t, s, self.eta, self.last, before))

    def _law(self, x: Tensor, posterior: Posterior, c: StepCoefficients) -> Gaussian:
        return Gaussian(_times(c.a, x) + _times(c.kappa, posterior.mean), self._noise(x, posterior, c))

    def _noise(self, x: Tensor, posterior: Posterior, c: StepCoefficients) -> Covariance:
        if self.variance == "small":
            return Isotropic(_number(c.small, x.device).to(x.dtype), x.shape[1:])
        if self.variance == "large":
            return Isotropic(_number(c.large, x.device).to(x.dtype), x.shape[1:])
        if self.variance == "learned":
            if posterior.fraction is None:
                raise ValueError("variance 'learned' needs a network with a learned-range head (head='range')")
            small, beta = _number(c.small, x.device), _number(c.beta, x.device)
            f = posterior.fraction
            log_variance = f * expand(torch.log(beta), f) + (1 - f) * expand(torch.log(small), f)
            return Diagonal(torch.where(expand(small, f) > 0, torch.exp(log_variance), torch.zeros_like(f)))
        if posterior.covariance is None:
            raise ValueError(
                "variance 'posterior' needs a covariance: calibrate one, or choose small, large or learned"
            )
        return posterior.covariance.affine(c.lambda2, c.kappa2)

    def prepare(self, levels: Level) -> list[StepCoefficients]:
        """Coefficients of all steps of a grid, as floats."""
        before = levels[torch.arange(len(levels) - 1).sub(1).clamp_min(0)] if len(levels) > 2 else None
        c = step_coefficients(levels[:-1], levels[1:], self.eta, self.last, before)
        return [StepCoefficients(*row) for row in zip(*(v.tolist() for v in vars(c).values()), strict=True)]

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return State(x)

    def step(
        self, plan: list[StepCoefficients], k: int, state: State, posterior: Posterior, z: Tensor | None
    ) -> tuple[State, StepInfo]:
        """See the base class."""
        law = self._law(state.x, posterior, plan[k])
        return State(law.mean if z is None else law.sample(z)), StepInfo(k, posterior, law)


def _number(value: Any, device: torch.device) -> Tensor:
    """A coefficient in float64 on a device; a plain number is made there, not copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.full((), value, dtype=torch.float64, device=device)


def _times(value: Any, x: Tensor) -> Tensor:
    return (expand(value, x) if isinstance(value, Tensor) else value) * x
