r"""Laws of a reverse kernel, against formulas written directly in float64.

    lambda = eta sigma_s sqrt(1 - snr_t / snr_s)
    mean   = alpha_s x0_hat + sqrt(sigma_s^2 - lambda^2) (x_t - alpha_t x0_hat) / sigma_t = a x_t + kappa x0_hat
    noise  = lambda^2 I + kappa^2 C (posterior), lambda^2 I (small), beta I (large),
             exp(f log beta + (1 - f) log beta_tilde) (learned)

and, for the Gaussian N(mean, noise) that a kernel returns, log density and KL divergence as `torch.distributions` has
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from lowvar.process.kernel import Gaussian, ReverseKernel
from lowvar.process.noise import Independent
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule

__all__ = [
    "DirectStep",
    "KernelLaws",
    "check_clean_step",
    "check_coefficients",
    "check_kl",
    "check_log_prob",
    "check_mean",
    "check_noise",
    "check_plan",
    "check_sample",
    "direct_step",
]


@dataclass(frozen=True)
class DirectStep:
    """The numbers of a step as textbooks write them, floats."""

    a: float
    kappa: float
    lambda2: float
    beta: float


def direct_step(t: Level, s: Level, eta: float) -> DirectStep:
    """A step t -> s at scalar levels; no care for cancellation, so not for snr_t close to snr_s.

    Example:
        >>> from lowvar.process.schedule import Flow
        >>> step = direct_step(Flow().at(1.0), Flow().at(0.0), 1.0)
        >>> step.a, step.kappa
        (0.0, 1.0)
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (float(v) for v in (t.alpha, t.sigma, s.alpha, s.sigma))
    r = 1 - (alpha_t * sigma_s / (sigma_t * alpha_s)) ** 2
    lambda2 = eta**2 * sigma_s**2 * r
    a = max(sigma_s**2 - lambda2, 0.0) ** 0.5 / sigma_t
    return DirectStep(a, alpha_s - alpha_t * a, lambda2, sigma_t**2 * r)


def _close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def check_coefficients(coefficients: object, t: Level, s: Level, eta: float) -> None:
    """`a`, `kappa`, `lambda2`, `beta` of an object against the direct formulas."""
    direct = direct_step(t, s, eta)
    for name, expected in vars(direct).items():
        actual = torch.as_tensor(getattr(coefficients, name), dtype=torch.float64)
        _close(actual, torch.tensor(expected, dtype=torch.float64), name)


def expected_noise(kernel: ReverseKernel, posterior: Posterior, t: Level, s: Level) -> Tensor:
    """Dense covariance (B or 1, d, d) of the step's noise for s > 0, by the direct formulas."""
    c = direct_step(t, s, kernel.eta)
    d = posterior.mean[0].numel()
    eye = torch.eye(d, dtype=posterior.mean.dtype)[None]
    if kernel.variance == "small":
        return c.lambda2 * eye
    if kernel.variance == "large":
        return c.beta * eye
    if kernel.variance == "learned":
        assert posterior.fraction is not None
        f = posterior.fraction.flatten(1)
        return torch.diag_embed(c.beta**f * c.lambda2 ** (1 - f))
    assert posterior.covariance is not None
    return c.lambda2 * eye + c.kappa**2 * posterior.covariance.dense()


def check_mean(kernel: ReverseKernel, x: Tensor, posterior: Posterior, t: Level, s: Level) -> None:
    """The mean in both forms: a x + kappa x0, and alpha_s x0 + sqrt(sigma_s^2 - lambda^2) eps."""
    c, x0 = direct_step(t, s, kernel.eta), posterior.mean
    mean = kernel(x, posterior, t, s).mean
    eps = (x - float(t.alpha) * x0) / float(t.sigma)
    _close(mean, c.a * x + c.kappa * x0, "a x + kappa x0")
    deterministic = max(float(s.sigma) ** 2 - c.lambda2, 0.0) ** 0.5
    _close(mean, float(s.alpha) * x0 + deterministic * eps, "alpha_s x0 + sqrt(sigma_s^2 - lambda^2) eps")


def check_noise(kernel: ReverseKernel, x: Tensor, posterior: Posterior, t: Level, s: Level) -> None:
    """The covariance of the noise."""
    dense = kernel(x, posterior, t, s).covariance.dense()
    expected = expected_noise(kernel, posterior, t, s)
    _close(dense, expected.expand_as(dense), "noise")


def check_sample(kernel: ReverseKernel, x: Tensor, posterior: Posterior, t: Level, s: Level) -> None:
    """A sample is mean + R z with R R^T the noise; R from unit vectors, so exactly."""
    law = kernel(x, posterior, t, s)
    columns = []
    for e in torch.eye(law.covariance.d, dtype=x.dtype):
        z = e.reshape(1, *x.shape[1:]).expand_as(x)
        columns.append((law.sample(z) - law.mean).flatten(1))
    R = torch.stack(columns, -1)
    _close(R @ R.mT, expected_noise(kernel, posterior, t, s).expand(len(x), -1, -1), "root of the noise")


def _normal(law: Gaussian) -> MultivariateNormal:
    flat = law.mean.flatten(1)
    return MultivariateNormal(flat, law.covariance.dense().to(flat).expand(len(flat), -1, -1))


def check_log_prob(law: Gaussian) -> None:
    """Log density against `MultivariateNormal` (the covariance must be regular)."""
    x = law.mean + Independent(4).normal(range(len(law.mean)), law.mean.shape[1:], dtype=law.mean.dtype)
    _close(law.log_prob(x), _normal(law).log_prob(x.flatten(1)), "log_prob", 1e-8)


def check_kl(law: Gaussian, other: Gaussian) -> None:
    """KL divergences against `torch.distributions`, and 0 against itself."""
    _close(law.kl(other), kl_divergence(_normal(law), _normal(other)), "kl", 1e-8)
    own = law.kl(law)
    _close(own, torch.zeros_like(own), "kl to itself", 1e-8)


def check_clean_step(kernel: ReverseKernel, x: Tensor, posterior: Posterior, t: Level, clean: Level) -> None:
    """The step to s = 0 has mean x0_hat; with `last="mean"` a sample is x0_hat, bit for bit, whatever the noise."""
    law = kernel(x, posterior, t, clean)
    _close(law.mean, posterior.mean, "mean of the last step", 1e-12)
    z = Independent(5).normal(range(len(x)), x.shape[1:], dtype=x.dtype)
    if kernel.last == "mean":
        if not torch.equal(law.sample(z), law.mean):
            raise AssertionError("noise on the final image: the last step of last='mean' must add none")
    elif not bool((law.covariance.diagonal() > 0).all()):
        raise AssertionError("last='decoder' must leave a density")


def check_plan(kernel: ReverseKernel, x: Tensor, posterior: Posterior, levels: Level) -> None:
    """Steps by a prepared plan equal the kernel's own calls at every step of a grid."""
    plan = kernel.prepare(levels)
    z = Independent(6).normal(range(len(x)), x.shape[1:], dtype=x.dtype)
    for k in range(len(levels) - 1):
        state, info = kernel.step(plan, k, kernel.start(x), posterior, z)
        law = kernel(x, posterior, levels[k], levels[k + 1], levels[k - 1] if k else None)
        _close(info.law.mean, law.mean, f"mean of step {k}")
        _close(info.law.covariance.dense(), law.covariance.dense(), f"noise of step {k}")
        _close(state.x, law.sample(z), f"sample of step {k}")


class KernelLaws:
    """Inherit, and supply `kernel`, `schedule`, `x` (float64) and `posterior` with what the kernel reads."""

    times: tuple[tuple[float, float], ...] = ((0.95, 0.7), (0.6, 0.35), (0.3, 0.02))

    def _pairs(self, schedule: Schedule) -> list[tuple[Level, Level]]:
        return [(schedule.at(t), schedule.at(s)) for t, s in self.times]

    def test_mean(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_mean`."""
        for t, s in self._pairs(schedule):
            check_mean(kernel, x, posterior, t, s)

    def test_noise(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_noise`."""
        for t, s in self._pairs(schedule):
            check_noise(kernel, x, posterior, t, s)

    def test_sample(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_sample`."""
        for t, s in self._pairs(schedule):
            check_sample(kernel, x, posterior, t, s)

    def test_log_prob(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_log_prob`; a kernel without noise has no density."""
        for t, s in self._pairs(schedule):
            if kernel.stochastic:
                check_log_prob(kernel(x, posterior, t, s))

    def test_kl(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_kl`."""
        for t, s in self._pairs(schedule):
            if kernel.stochastic:
                law = kernel(x, posterior, t, s)
                check_kl(law, Gaussian(law.mean + 0.3, law.covariance.affine(0.05, 1.3)))

    def test_clean_step(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_clean_step`."""
        check_clean_step(kernel, x, posterior, schedule.at(0.3), schedule.at(0.0))

    def test_plan(self, kernel: ReverseKernel, schedule: Schedule, x: Tensor, posterior: Posterior) -> None:
        """See `check_plan`."""
        check_plan(kernel, x, posterior, schedule.at(torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)))
