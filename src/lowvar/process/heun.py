r"""Heun's method with churn: the stochastic sampler of EDM (Karras, Aittala, Aila & Laine 2022, Algorithms 1 and 2).

In y = x / alpha and s = sigma / alpha the probability-flow ODE is dy/ds = eps_hat = (x - alpha x0_hat) / sigma. A step
s_t -> s_s is the trapezoidal rule with an Euler prediction:

    y'  = y + (s_s - s_t) eps_hat(y, s_t),
    y_s = y + (s_s - s_t) (eps_hat(y, s_t) + eps_hat(y', s_s)) / 2,

two evaluations, and one in the last step, to s = 0, which is Euler's and returns x0_hat: 2 K - 1 in all. The prediction
is DDIM, so that in x, for any schedule,  x_s = x' + alpha_s (s_s - s_t) (eps_hat' - eps_hat) / 2.

Churn raises the noise before a step: s_hat = (1 + gamma) s, y + S_noise sqrt(s_hat^2 - s^2) z, with gamma =
min(S_churn / K, sqrt(2) - 1) for s in [S_min, S_max]. Here the state that a step returns is already the one at s_hat:
the noise is added at the end of the step before. The first step has none: the process starts at its noisiest level,
which also limits s_hat.

A start from pure noise (alpha_t = 0) has s = inf; the first step then keeps Euler's value, which is finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.covariance import Isotropic
from lowvar.process.kernel import Gaussian, step_coefficients
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule
from lowvar.process.solver import Solver, State, StepInfo

__all__ = ["Heun", "HeunStep"]

_FIELDS = ("t", "logsnr", "alpha", "sigma")


@dataclass(frozen=True)
class HeunStep:
    """One step's numbers: (alpha, sigma) where it begins and ends, Euler's factors, what follows the correction.

    Attributes:
        alpha_t, sigma_t: of the level evaluated first (s_hat).
        alpha_s, sigma_s: of the level evaluated second.
        a, kappa: Euler's factors of x and x0_hat.
        half: alpha_s (s_s - s_t) / 2, the factor of eps_hat' - eps_hat; 0 in a first step from pure noise.
        scale: factor of x_s that turns it into the mean at the next s_hat.
        std: of the noise added there.
    """

    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    a: float
    kappa: float
    half: float
    scale: float
    std: float


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method, deterministic (`churn=0`) or with churn; 2 K - 1 evaluations for K steps.

    Args:
        churn: S_churn >= 0, the total; a step's gamma is limited to sqrt(2) - 1.
        s_min, s_max: sigma / alpha between which there is churn.
        s_noise: factor of the noise added.
        schedule: needed with churn, whose levels lie between the grid's.

    Raises:
        ValueError: if a number is negative, or churn comes without a schedule.

    Example:
        >>> from lowvar.process.schedule import VE
        >>> levels = VE().at(torch.tensor([1.0, 0.5, 0.0]))
        >>> [round(v, 3) for v in Heun().evaluations(levels).sigma.tolist()]
        [80.0, 0.625, 0.625]
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        """Checks the signs."""
        if self.churn < 0 or self.s_min < 0 or self.s_noise < 0:
            raise ValueError(f"churn, s_min and s_noise must not be negative, got {self}")
        if self.churn and self.schedule is None:
            raise ValueError("churn needs the schedule that its levels are taken from: Heun(churn, schedule=schedule)")

    @property
    def order(self) -> int:
        """2; Euler's last step to s = 0 is not counted."""
        return 2

    @property
    def stochastic(self) -> bool:
        """Whether there is churn."""
        return self.churn > 0

    def _raised(self, levels: Level) -> Level:
        """The levels s_hat at which steps begin: (K,)."""
        begin = levels[:-1]
        if self.schedule is None:
            return begin
        s = torch.exp(-begin.logsnr / 2)
        gamma = min(self.churn / len(begin), math.sqrt(2) - 1)
        churned = (s >= self.s_min) & (s <= self.s_max)
        churned[0] = False
        raised = self.schedule.level(torch.maximum(begin.logsnr - 2 * math.log1p(gamma), self.schedule.logsnr(1.0)))
        return Level(*(torch.where(churned, getattr(raised, f), getattr(begin, f)) for f in _FIELDS))

    def evaluations(self, levels: Level) -> Level:
        """Two a step, s_hat_k and s_{k+1}; the last step has one where it ends at s = 0."""
        begin, end = self._raised(levels), levels[1:]
        both = [torch.stack([getattr(begin, f), getattr(end, f)], 1).flatten() for f in _FIELDS]
        every = Level(*both)
        return every[:-1] if float(levels.sigma[-1]) == 0 else every

    def prepare(self, levels: Level) -> list[HeunStep]:
        """See the base class."""
        begin, end = self._raised(levels), levels[1:]
        c = step_coefficients(begin, end, 0.0)
        ratio_t, ratio_s = torch.exp(-begin.logsnr / 2), torch.exp(-end.logsnr / 2)
        half = torch.where(begin.alpha > 0, end.alpha * (ratio_s - ratio_t) / 2, 0.0)
        following = torch.cat([ratio_t[1:], ratio_s[-1:]])
        next_alpha = torch.cat([begin.alpha[1:], end.alpha[-1:]])
        std = self.s_noise * next_alpha * torch.sqrt((following**2 - ratio_s**2).clamp_min(0))
        columns = (begin.alpha, begin.sigma, end.alpha, end.sigma, c.a, c.kappa, half, next_alpha / end.alpha, std)
        return [HeunStep(*row) for row in zip(*(v.tolist() for v in columns), strict=True)]

    def start(self, x: Tensor) -> State:
        """See the base class."""
        return State(x)

    def step(
        self, plan: list[HeunStep], k: int, state: State, posterior: Posterior, z: Tensor | None
    ) -> tuple[State, StepInfo]:
        """Evaluation k: Euler's prediction for even k, the correction and the next step's churn for odd k."""
        step, x, x0 = plan[k // 2], state.x, posterior.mean
        if k % 2 == 0:
            mean = step.a * x + step.kappa * x0
            memory = (x - step.alpha_t * x0) / step.sigma_t
            return State(mean, memory), StepInfo(k, posterior, Gaussian(mean, _noise(0.0, x)))
        slope = (x - step.alpha_s * x0) / step.sigma_s
        mean = step.scale * (x + step.half * (slope - state.memory))
        law = Gaussian(mean, _noise(step.std**2, x))
        return State(mean if z is None else law.sample(z)), StepInfo(k, posterior, law)


def _noise(variance: float, x: Tensor) -> Isotropic:
    return Isotropic(torch.full((1,), variance, dtype=x.dtype, device=x.device), x.shape[1:])
