"""Inverse problems through the sampler, against exact posteriors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.expect.conditioning import Measurement
from lowvar.expect.operators import Blur, LinearOperator, Masking, Matrix, Pooling, Whole
from lowvar.expect.posterior import ConditionedDenoiser, Reconstruction, posterior
from lowvar.process import CosineVP, Flow, Gaussian, Isotropic, JacobianCovariance, ReverseKernel, WithCovariance
from lowvar.process.grid import trailing
from lowvar.process.matrix import Dense
from lowvar.process.noise import Independent
from lowvar.testing import Moments, affine_law, anisotropic_gaussian, mixture8
from lowvar.testing.observed import observed

SHAPE = (1, 2, 4)
TARGET = anisotropic_gaussian(SHAPE, ratio=1000.0)
SCHEDULES = {"cosine": CosineVP(), "flow": Flow()}
OPERATORS: dict[str, LinearOperator] = {
    "denoising": Whole(SHAPE),
    "inpainting": Masking(torch.arange(8).reshape(SHAPE) % 3 > 0),
    "super-resolution": Pooling(SHAPE, 2),
    "deblurring": Blur(SHAPE, torch.tensor([[0.2, 0.5, 0.3]])),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Independent(seed).normal(range(shape[0]), shape[1:], dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("way", ["covariance", "network"])
def test_every_kernel_is_exact_on_gaussians(schedule, A: LinearOperator, eta: float, way) -> None:
    """The law of the chain given y is that of x_t given y at the end of any grid, 3 steps here; not sampled."""
    seen = Measurement(A, normal(*A.measured_shape, seed=5), 0.3)
    given = observed(TARGET, seen)
    denoiser = ConditionedDenoiser(TARGET.denoiser(schedule, "dense"), seen, way)
    grid = torch.tensor([0.98, 0.6, 0.3, 0.05], dtype=torch.float64)
    start, end = (Moments.of(given.marginal(schedule.at(t))) for t in (grid[0], grid[-1]))
    law = affine_law(
        denoiser, ReverseKernel(eta), grid, Gaussian(start.mean[None], Dense(start.covariance[None], SHAPE))
    )
    assert law.distance(end) < 1e-8


@pytest.mark.parametrize("form", ["basis", "jacobian"])
def test_conjugate_gradients_and_lanczos_give_the_same_law(form: str) -> None:
    schedule, A = SCHEDULES["cosine"], OPERATORS["deblurring"]
    seen = Measurement(A, normal(*A.measured_shape, seed=5), 0.3)
    given = observed(TARGET, seen)
    exact = TARGET.denoiser(schedule, "basis")
    denoiser = ConditionedDenoiser(exact if form == "basis" else JacobianCovariance(exact, steps=8), seen)
    x, level = normal(3, *SHAPE), schedule.at(0.4)
    got, want = denoiser(x, level), given.denoiser(schedule, "dense")(x, level)
    assert torch.allclose(got.mean, want.mean, atol=1e-6)
    assert got.covariance is not None
    assert want.covariance is not None
    assert torch.allclose(got.covariance.dense(), want.covariance.dense(), atol=1e-6)


def test_a_posterior_covariance_of_the_prior_is_noticed() -> None:
    """The bug put back: the kernel's noise is that of the prior, C, and not of the posterior."""
    schedule, A = SCHEDULES["cosine"], OPERATORS["inpainting"]
    seen = Measurement(A, normal(*A.measured_shape, seed=5), 0.3)
    given, exact = observed(TARGET, seen), TARGET.denoiser(schedule, "dense")
    wrong = WithCovariance(ConditionedDenoiser(exact, seen), lambda x, level, p: _covariance(exact, x, level))
    grid = torch.tensor([0.98, 0.6, 0.3, 0.05], dtype=torch.float64)
    start, end = (Moments.of(given.marginal(schedule.at(t))) for t in (grid[0], grid[-1]))
    law = affine_law(wrong, ReverseKernel(), grid, Gaussian(start.mean[None], Dense(start.covariance[None], SHAPE)))
    assert law.distance(end) > 1e-2


def _covariance(denoiser, x: Tensor, level):
    found = denoiser(x, level).covariance
    assert found is not None
    return found


def test_exact_posterior_of_a_mixture() -> None:
    """Bayes' rule on a lattice: p(x_0 | y) propto p(x_0) N(y; A x_0, N), for points x_0."""
    target = mixture8()
    A = Matrix(normal(3, 8))
    seen = Measurement(A, normal(3, seed=1), 0.5 + torch.arange(3) / 4)
    given = observed(target, seen)
    x, clean = normal(6, 8, seed=2), CosineVP().at(0.0)
    std = torch.as_tensor(seen.noise_std).double()
    likelihood = -0.5 * (((seen.y - A.forward(x)) / std) ** 2).sum(1)
    gap = given.log_prob(x, clean) - target.log_prob(x, clean) - likelihood
    assert torch.allclose(gap, gap[:1].expand(6), atol=1e-9)  # the evidence, the same everywhere


def errors(model: str, n: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of posterior mean and standard deviation (RMS against the exact ones) and coverage, a measurement each."""
    target, schedule = mixture8(), CosineVP()
    A, grid = Matrix(normal(4, 8, seed=3)), trailing(CosineVP(), 40)
    truth = target.sample(range(count), Independent(7))
    y = A.forward(truth) + 0.2 * normal(count, 4, seed=4)
    network = target.denoiser(schedule, "dense")
    if model != "exact":  # pseudoinverse guidance: the posterior variance of data of variance 1
        network = WithCovariance(network, lambda x, t, p: Isotropic(t.sigma**2 / (t.alpha**2 + t.sigma**2), (8,)))
    through = "covariance" if model in ("exact", "naive") else "network"
    rows = []
    for i in range(count):
        seen = Measurement(A, y[i], 0.2)
        exact = observed(target, seen)
        found = posterior(
            network, ReverseKernel(), grid, seen, n, Independent(100 + i), through=through, dtype=torch.float64
        )
        std = exact.covariance.diagonal().sqrt()
        mean = (found.mean - exact.mean).square().mean()
        rows.append(torch.stack([mean, (found.std - std).square().mean(), torch.tensor(found.coverage(truth[i]))]))
    mean, std, covered = torch.stack(rows).unbind(1)
    return mean.sqrt(), std.sqrt(), covered


@pytest.mark.slow
def test_posterior_of_a_mixture_is_near_the_exact_one() -> None:
    """24 measurements x 64 samples, paired: the exact covariance is nearer than one variance, and needs no gradient.

    Seen over 40 measurements: RMS error of the mean .098 (exact covariance), .115 (one variance through the network, as
    in pseudoinverse guidance), .204 (one variance without the network); coverage of the 95% intervals .956 +- .014.
    """
    means, stds, covered = zip(*(errors(model, 64, 24) for model in ("exact", "one variance", "naive")), strict=True)
    assert means[0].mean() < 0.13
    assert abs(float(covered[0].mean()) - 0.95) < 3 * float(covered[0].std()) / math.sqrt(24) + 0.02
    for other in (1, 2):
        gap = means[other] - means[0]
        assert float(gap.mean()) > 2 * float(gap.std()) / math.sqrt(24)
    assert float((stds[2] - stds[0]).mean()) > 0


def test_intervals_have_the_coverage_that_order_statistics_give() -> None:
    """Truth and samples exchangeable: the interval of n samples covers 95% for small n too, which quantiles do not."""
    for n in (39, 64, 200):
        draws = normal(4000, n + 1, seed=n)
        found = Reconstruction(draws[:, 1:].mT, 0)
        covered = found.coverage(draws[:, 0])
        assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))
    with pytest.raises(ValueError, match="38 samples have no 95% interval; draw at least 39"):
        Reconstruction(normal(38, 2), 0).interval()
    with pytest.raises(ValueError, match="level is 95"):
        Reconstruction(normal(38, 2), 0).interval(95)
    draws = normal(19, 2)  # 20 x (1 - 0.9) / 2 is 1, and below it in floating point
    assert torch.equal(torch.stack(Reconstruction(draws, 0).interval(0.9)), torch.stack([draws.amin(0), draws.amax(0)]))
    ends = torch.tensor([0.55, 19 - 0.55], dtype=torch.float64) / 19
    draws = normal(20, 3)
    wanted = torch.quantile(draws, ends, dim=0)
    assert torch.allclose(torch.stack(Reconstruction(draws, 0).interval(1 - 2 * 1.55 / 21)), wanted)
    with pytest.raises(ValueError, match=r"the truth has shape \(1,\); give one event, \(3,\)"):
        Reconstruction(normal(39, 3), 0).coverage(torch.zeros(1))


def test_mean_std_and_cost_of_a_reconstruction() -> None:
    schedule, A = SCHEDULES["cosine"], OPERATORS["inpainting"]
    seen = Measurement(A, A.forward(TARGET.sample([3]))[0], 0.1)
    given, exact = observed(TARGET, seen), TARGET.denoiser(schedule)
    found = posterior(exact, ReverseKernel(), trailing(schedule, 12), seen, n=400, dtype=torch.float64, batch_size=150)
    assert found.nfe == 400 * 12
    assert ((found.mean - given.mean).abs() < 4 * found.mean_se + 1e-3).all()
    std = given.covariance.diagonal().sqrt().reshape(SHAPE)
    assert (found.std / std - 1).abs().max() < 5 / math.sqrt(2 * 400)
    network = posterior(exact, ReverseKernel(), trailing(schedule, 12), seen, n=2, through="network")
    assert network.nfe == 2 * 12 * 3


def test_bad_input_is_refused() -> None:
    schedule, A = SCHEDULES["cosine"], OPERATORS["inpainting"]
    seen, exact = Measurement(A, normal(*A.measured_shape), 0.1), TARGET.denoiser(schedule)
    grid = trailing(schedule, 2)
    with pytest.raises(ValueError, match=r"through is 'prior'; allowed: covariance, network"):
        ConditionedDenoiser(exact, seen, "prior")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"states have shape \(2, 8\); the operator sees \(B, \(1, 2, 4\)\)"):
        ConditionedDenoiser(exact, seen)(torch.zeros(2, 8), schedule.at(0.5))
    with pytest.raises(ValueError, match=r"gives no covariance of x_0.*attach a calibrated one"):
        posterior(TARGET.denoiser(schedule, None), ReverseKernel(), grid, seen)
    with pytest.raises(ValueError, match="n is 1"):
        posterior(exact, ReverseKernel(), grid, seen, n=1)
    with pytest.raises(ValueError, match="the grid does not fall from noise to data"):
        posterior(exact, ReverseKernel(), grid.flip(0), seen)
    with pytest.raises(ValueError, match="clip is -1; give the data's bound"):
        posterior(exact, ReverseKernel(), grid, seen, clip=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        posterior(exact, ReverseKernel(), grid, seen, batch_size=0)
    several = Measurement(A, normal(3, *A.measured_shape), 0.1)
    with pytest.raises(ValueError, match="several measurements; call `posterior` for each"):
        posterior(exact, ReverseKernel(), grid, several)
