"""Reverse kernels keep the laws, reduce to the published formulas, and their KL divergences are the published costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lowvar.process.covariance import Covariance, Diagonal, Isotropic
from lowvar.process.discrete import DiscreteVP, schedule_from_diffusers
from lowvar.process.kernel import Gaussian, ReverseKernel, step_coefficients
from lowvar.process.noise import Independent
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import VE, CosineVP, Flow, LinearVP, Schedule
from lowvar.testing import mixture8
from lowvar.testing.laws.kernel import KernelLaws, check_coefficients, direct_step

SCHEDULES: dict[str, Schedule] = {
    "cosine": CosineVP(),
    "linear": LinearVP(),
    "table": schedule_from_diffusers({}),
    "zero terminal snr": schedule_from_diffusers({"rescale_betas_zero_snr": True}),
    "ve": VE(),
    "flow": Flow(),
    "flow shift 3": Flow(3.0),
}
KERNELS = [
    *(ReverseKernel(eta, "posterior", last) for eta in (0.0, 0.5, 1.0) for last in ("mean", "decoder")),
    ReverseKernel(1.0, "small"),
    ReverseKernel(0.5, "small"),
    ReverseKernel(1.0, "large"),
    ReverseKernel(1.0, "large", "decoder"),
    ReverseKernel(1.0, "learned"),
]
TARGET = mixture8()


class TestKernels(KernelLaws):
    @pytest.fixture(params=SCHEDULES.values(), ids=list(SCHEDULES))
    def schedule(self, request: pytest.FixtureRequest) -> Schedule:
        return request.param

    @pytest.fixture(params=KERNELS, ids=lambda k: f"{k.variance}-{k.eta}-{k.last}")
    def kernel(self, request: pytest.FixtureRequest) -> ReverseKernel:
        return request.param

    @pytest.fixture
    def x(self, schedule: Schedule) -> Tensor:
        return TARGET.noisy(range(3), schedule.at(0.6))

    @pytest.fixture
    def posterior(self, x: Tensor, schedule: Schedule) -> Posterior:
        exact = TARGET.posterior(x, schedule.at(0.6), "dense")
        fraction = Independent(3).uniform(range(3), (8,), dtype=torch.float64)
        return Posterior(exact.mean, exact.covariance, fraction)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_coefficients(schedule: Schedule, eta: float) -> None:
    times = [1.0, 0.9, 0.5, 0.1, 0.02, 0.0]
    for t, s in itertools.combinations(times, 2):
        a, b = schedule.at(t), schedule.at(s)
        check_coefficients(step_coefficients(a, b, eta, "decoder"), a, b, eta)


def test_coefficients_of_small_steps_do_not_cancel() -> None:
    """snr_s / snr_t - 1 = 1e-12: r, kappa and lambda keep their digits, where alpha_s - alpha_t a has lost them."""
    schedule = CosineVP()
    t, s = schedule.level(0.0), schedule.level(1e-12)
    c = step_coefficients(t, s, 1.0)
    torch.testing.assert_close(c.kappa, s.alpha * 1e-12, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(c.lambda2, s.sigma**2 * 1e-12, rtol=1e-6, atol=0.0)


def test_batched_levels_are_the_single_ones() -> None:
    schedule, kernel = Flow(), ReverseKernel(0.7)
    times_t, times_s = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.4, 0.2, 0.0])
    x = Independent(0).normal(range(3), (8,), dtype=torch.float64)
    t, s = schedule.at(times_t), schedule.at(times_s)
    posterior = TARGET.posterior(x, t, "dense")
    law = kernel(x, posterior, t, s)
    for b in range(3):
        one = kernel(x[b : b + 1], TARGET.posterior(x[b : b + 1], t[b], "dense"), t[b], s[b])
        torch.testing.assert_close(law.mean[b : b + 1], one.mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(law.covariance.dense()[b : b + 1], one.covariance.dense(), atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------- published special cases


def test_ddpm_and_ddim_as_published() -> None:
    """Ho et al. 2020, Eqs. 6-7; Song et al. 2020 (DDIM), Eqs. 12 and 16, from the alpha_bar table in float64."""
    schedule = schedule_from_diffusers({})
    assert isinstance(schedule, DiscreteVP)
    bar = schedule.alphas_cumprod
    x, x0 = (Independent(k).normal(range(2), (5,), dtype=torch.float64) for k in (0, 1))
    posterior = Posterior(x0)
    for n, m in ((999, 899), (500, 499), (500, 250), (20, 10)):
        t, s = schedule.at((n + 1) / 1000), schedule.at((m + 1) / 1000)
        bar_t, bar_s = bar[n], bar[m]
        beta = 1 - bar_t / bar_s
        mean = bar_s.sqrt() * beta / (1 - bar_t) * x0 + (1 - beta).sqrt() * (1 - bar_s) / (1 - bar_t) * x
        law = ReverseKernel(1.0, "small")(x, posterior, t, s)
        torch.testing.assert_close(law.mean, mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(law.covariance.trace()[0] / 5, (1 - bar_s) / (1 - bar_t) * beta, rtol=1e-9, atol=0)
        large = ReverseKernel(1.0, "large")(x, posterior, t, s)
        torch.testing.assert_close(large.covariance.trace()[0] / 5, beta, rtol=1e-9, atol=0)
        eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()
        for eta in (0.0, 0.4, 1.0):
            sigma = eta * ((1 - bar_s) / (1 - bar_t)).sqrt() * (1 - bar_t / bar_s).sqrt()
            ddim = bar_s.sqrt() * x0 + (1 - bar_s - sigma**2).sqrt() * eps
            law = ReverseKernel(eta, "small")(x, posterior, t, s)
            torch.testing.assert_close(law.mean, ddim, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(law.covariance.trace()[0] / 5, sigma**2, rtol=1e-9, atol=1e-15)


def test_learned_range_interpolates_logarithmically() -> None:
    schedule = schedule_from_diffusers({})
    t, s = schedule.at(0.5), schedule.at(0.4)
    c = direct_step(t, s, 1.0)
    for f, expected in ((0.0, c.lambda2), (1.0, c.beta), (0.5, (c.lambda2 * c.beta) ** 0.5)):
        posterior = Posterior(torch.zeros(1, 2, dtype=torch.float64), None, torch.full((1, 2), f, dtype=torch.float64))
        law = ReverseKernel(1.0, "learned")(torch.ones(1, 2, dtype=torch.float64), posterior, t, s)
        torch.testing.assert_close(law.covariance.diagonal(), torch.full((1, 2), expected, dtype=torch.float64))


def test_decoder_takes_beta_tilde_from_the_step_before() -> None:
    schedule = schedule_from_diffusers({})
    before, t, clean = schedule.at(torch.tensor([0.002, 0.001, 0.0]))
    x = torch.zeros(1, 3, dtype=torch.float64)
    law = ReverseKernel(1.0, "small", "decoder")(x, Posterior(x), t, clean, before)
    torch.testing.assert_close(float(law.covariance.trace()), 3 * direct_step(before, t, 1.0).lambda2)


def test_errors_name_what_is_allowed() -> None:
    schedule = CosineVP()
    x = torch.zeros(1, 2)
    t, s = schedule.at(0.5), schedule.at(0.4)
    with pytest.raises(ValueError, match="eta is 2"):
        ReverseKernel(2.0)
    with pytest.raises(ValueError, match="small, large, learned, posterior"):
        ReverseKernel(1.0, "huge")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="eta = 1"):
        ReverseKernel(0.0, "large")
    with pytest.raises(ValueError, match="calibrate"):
        ReverseKernel()(x, Posterior(x), t, s)
    with pytest.raises(ValueError, match="head='range'"):
        ReverseKernel(1.0, "learned")(x, Posterior(x), t, s)


# ------------------------------------------------------------------------------------------------------ costs of a step


def expected_kl(schedule: Schedule, noise: str, t_time: float, s_time: float) -> tuple[Tensor, Tensor, Tensor]:
    """(cost by KLs of kernels, C (B, d, d), dsnr): the mean over x_0 ~ N(x0_hat, C) by a cubature exact for squares."""
    t, s = schedule.at(t_time), schedule.at(s_time)
    x = TARGET.noisy(range(4), t)
    exact = TARGET.posterior(x, t, "dense")
    assert exact.covariance is not None
    C = exact.covariance.dense()
    shapes: dict[str, Covariance] = {
        "isotropic": Isotropic(exact.covariance.trace() / 8, (8,)),
        "diagonal": Diagonal(exact.covariance.diagonal()),
        "full": exact.covariance,
        "small": Isotropic(torch.zeros(1, dtype=torch.float64), (8,)),
    }
    p = ReverseKernel(1.0, "posterior")(x, Posterior(exact.mean, shapes[noise]), t, s)
    total = torch.zeros(4, dtype=torch.float64)
    for e in torch.eye(8, dtype=torch.float64):
        shift = 8**0.5 * exact.covariance.sqrt_matvec(e.expand(4, 8))
        for sign in (1, -1):
            q = ReverseKernel(1.0, "small")(x, Posterior(exact.mean + sign * shift), t, s)
            total += q.kl(p) / 16
    return total, C, torch.exp(s.logsnr) - torch.exp(t.logsnr)


@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow()], ids=lambda s: s.family)
@pytest.mark.parametrize("noise", ["small", "isotropic", "diagonal", "full"])
def test_cost_of_a_step_is_the_closed_form(schedule: Schedule, noise: str) -> None:
    for t, s in ((0.8, 0.5), (0.5, 0.4), (0.4, 0.05)):
        cost, C, dsnr = expected_kl(schedule, noise, t, s)
        trace = torch.diagonal(C, dim1=-2, dim2=-1).sum(-1)
        closed = {
            "small": dsnr * trace / 2,
            "isotropic": 4 * torch.log1p(dsnr * trace / 8),
            "diagonal": torch.log1p(dsnr * torch.diagonal(C, dim1=-2, dim2=-1)).sum(-1) / 2,
            "full": torch.linalg.slogdet(torch.eye(8, dtype=torch.float64) + dsnr * C)[1] / 2,
        }[noise]
        torch.testing.assert_close(cost, closed, rtol=1e-8, atol=1e-10)


def test_cost_shrinks_with_structure() -> None:
    costs = [float(expected_kl(CosineVP(), n, 0.5, 0.3)[0].mean()) for n in ("small", "isotropic", "diagonal", "full")]
    assert costs == sorted(costs, reverse=True)


def test_deterministic_gaussian_samples_its_mean() -> None:
    law = Gaussian(torch.ones(2, 3), Isotropic(0.0, (3,)))
    assert torch.equal(law.sample(torch.full((2, 3), 5.0)), law.mean)
