"""The exact targets against brute force: quadrature, finite differences, Bayes' rule on a grid."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from lowvar.process.noise import Antithetic, Independent
from lowvar.process.schedule import VE, CosineVP, Flow, Level, Schedule
from lowvar.testing import (
    GaussianTarget,
    MixtureTarget,
    Moments,
    anisotropic_gaussian,
    mixture2,
    mixture8,
    mixture64,
    random_mixture,
    rotation,
)

SCHEDULES: list[Schedule] = [CosineVP(), VE(), Flow()]
TARGETS = {"2": mixture2(), "8": mixture8(), "64": mixture64()}


def draw(k: int, *shape: int) -> Tensor:
    return Independent(k).normal(range(shape[0]), shape[1:], dtype=torch.float64)


def bayes_on_a_grid(target: MixtureTarget, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Mean and covariance of p(x_0 | x_t) for one state of a two-dimensional target, by summing over a fine grid."""
    axis = torch.linspace(-6, 6, 481, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)
    prior = MixtureSameFamily(Categorical(target.weights), MultivariateNormal(target.means, target.covariances))
    log_weight = prior.log_prob(x0) - ((x - level.alpha * x0) ** 2).sum(-1) / (2 * level.sigma**2)
    w = torch.softmax(log_weight, 0)
    mean = w @ x0
    return mean, ((x0 - mean).mT * w) @ (x0 - mean)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
@pytest.mark.parametrize("logsnr", [2.0, -1.0])
def test_mixture_posterior_is_bayes_rule(schedule: Schedule, logsnr: float) -> None:
    target, level = mixture2(), schedule.level(logsnr)
    for x in target.noisy(range(2), level):
        mean, covariance = bayes_on_a_grid(target, x, level)
        posterior = target.posterior(x[None], level, "dense")
        torch.testing.assert_close(posterior.mean[0], mean, rtol=0, atol=1e-6)
        assert posterior.covariance is not None
        torch.testing.assert_close(posterior.covariance.dense()[0], covariance, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
def test_tweedie_links_density_mean_and_covariance(target: MixtureTarget, schedule: Schedule) -> None:
    """x0_hat = (x + sigma^2 grad log p) / alpha and C = (sigma^2 / alpha) d x0_hat / d x, by autograd."""
    level = schedule.at(0.4)
    x = target.noisy(range(2), level).requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(x, level).sum(), x)
    mean = target.posterior(x, level, None).mean
    torch.testing.assert_close(mean, (x + level.sigma**2 * score) / level.alpha, rtol=1e-8, atol=1e-8)
    exact = target.posterior(x.detach(), level, "dense").covariance
    assert exact is not None
    matrix = exact.dense()
    for j in range(min(target.d, 4)):
        (row,) = torch.autograd.grad(mean[:, j].sum(), x, retain_graph=True)
        torch.testing.assert_close(level.sigma**2 / level.alpha * row, matrix[:, j], rtol=0, atol=1e-8)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_forms_of_the_covariance_are_parts_of_the_dense_one(target: MixtureTarget) -> None:
    level = CosineVP().at(0.5)
    x = target.noisy(range(3), level)
    forms = {kind: target.posterior(x, level, kind).covariance for kind in ("dense", "diagonal", "isotropic")}
    pca = target.posterior(x, level, "pca-diagonal").covariance
    dense, diagonal_form = forms["dense"], forms["diagonal"]
    assert dense is not None
    assert diagonal_form is not None
    assert pca is not None
    B = target.twin.basis.matrix()
    diagonal = torch.diagonal(dense.dense(), dim1=-2, dim2=-1)
    rotated = torch.diagonal(B.mT @ dense.dense() @ B, dim1=-2, dim2=-1)
    for form in forms.values():
        assert form is not None
        torch.testing.assert_close(form.trace(), dense.trace(), rtol=1e-10, atol=0)
    torch.testing.assert_close(diagonal_form.diagonal(), diagonal, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.diagonal(B.mT @ pca.dense() @ B, dim1=-2, dim2=-1), rotated, rtol=1e-9, atol=1e-12)


def test_levels_a_sample_are_the_single_ones() -> None:
    target, schedule = mixture8(), Flow()
    level = schedule.at(torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64))
    x = draw(0, 3, 8)
    for kind in ("dense", "diagonal", "pca-diagonal", "isotropic"):
        many = target.posterior(x, level, kind)
        for b in range(3):
            one = target.posterior(x[b : b + 1], level[b], kind)
            assert many.covariance is not None
            assert one.covariance is not None
            torch.testing.assert_close(many.mean[b : b + 1], one.mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(many.covariance.dense()[b : b + 1], one.covariance.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_pure_noise_leaves_the_prior(target: MixtureTarget) -> None:
    level = Flow().at(1.0)
    assert float(level.alpha) == 0
    posterior = target.posterior(draw(0, 2, target.d), level, "dense")
    torch.testing.assert_close(posterior.mean, target.mean.expand(2, -1), rtol=0, atol=1e-12)
    assert posterior.covariance is not None
    torch.testing.assert_close(posterior.covariance.dense(), target.covariance.expand(2, -1, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_moments_samples_and_scale(target: MixtureTarget) -> None:
    """Published targets: mean 0, E ||x||^2 = d; 20,000 samples have the moments (5 standard errors)."""
    assert float(target.mean.abs().max()) < 1e-12
    assert float(torch.trace(target.covariance)) == pytest.approx(target.d)
    n = 20_000
    x = target.sample(range(n), Independent(1))
    variance = torch.diagonal(target.covariance)
    assert bool((x.mean(0).abs() < 5 * (variance / n).sqrt()).all())
    assert float((torch.cov(x.mT) - target.covariance).abs().max()) < 5 * 3 * float(variance.max()) / math.sqrt(n)


def test_published_targets_stay_the_same() -> None:
    """Constants of this package: results refer to them."""
    values = [float(t.means.abs().sum() + t.covariances.abs().sum()) for t in TARGETS.values()]
    assert values == pytest.approx(PUBLISHED, rel=1e-9)


PUBLISHED = [7.79241138431, 70.9999072275, 1474.55634006]


def test_samples_follow_the_density() -> None:
    """Mean log density of samples against the integral of p log p on a grid."""
    target, level = mixture2(), CosineVP().at(0.2)
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    log_p = target.log_prob(torch.cartesian_prod(axis, axis), level)
    cell = float(axis[1] - axis[0]) ** 2
    assert float(log_p.exp().sum()) * cell == pytest.approx(1, abs=1e-6)
    entropy = -float((log_p.exp() * log_p).sum()) * cell
    value, error = target.entropy(level, n=20_000)
    assert abs(value - entropy) < 4 * error


def test_mmse_is_the_mean_posterior_variance() -> None:
    """E ||x_0 - x0_hat||^2 / d over the same samples, and below the twin's."""
    target = mixture8()
    for t in (0.3, 0.6):
        level = CosineVP().at(t)
        value, error = target.mmse(level, n=20_000)
        x0 = target.sample(range(20_000))
        mean = target.posterior(target.noisy(range(20_000), level), level, None).mean
        squares = ((mean - x0) ** 2).mean(1)
        assert abs(value - float(squares.mean())) < 4 * (error + float(squares.std()) / 20_000**0.5)
        assert value < float(target.twin.mmse(level))


def test_float32_is_stable_in_the_tails() -> None:
    target, level = mixture64(), CosineVP().at(0.02)
    x = 10 * draw(0, 4, 64)
    wide, narrow = target.posterior(x, level, "isotropic"), target.posterior(x.float(), level, "isotropic")
    assert torch.isfinite(narrow.mean).all()
    assert float((wide.mean - narrow.mean).abs().max()) < 1e-2 * float(wide.mean.abs().max())
    assert torch.isfinite(target.log_prob(x.float() * 100, level)).all()


def test_one_component_is_the_gaussian() -> None:
    gaussian = anisotropic_gaussian((1, 2, 2))
    mixture = MixtureTarget(torch.ones(1), gaussian.mean[None], gaussian.covariance[None])
    level = CosineVP().at(0.5)
    x = draw(0, 3, 1, 2, 2)
    one, two = gaussian.denoiser(CosineVP())(x, level), mixture.posterior(x, level, "dense")
    torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=1e-12)
    assert one.covariance is not None
    assert two.covariance is not None
    torch.testing.assert_close(one.covariance.dense(), two.covariance.dense()[:1], rtol=0, atol=1e-11)
    torch.testing.assert_close(gaussian.log_prob(x, level), mixture.log_prob(x, level), rtol=0, atol=1e-11)
    value, error = mixture.entropy(level, n=4096)
    assert abs(value - gaussian.entropy(level)) < 4 * error


def test_gaussian_closed_forms() -> None:
    """m + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha m), written with a linear solve; the twin's curves too."""
    target = anisotropic_gaussian((4,))
    S, m, eye = target.covariance, target.mean, torch.eye(4, dtype=torch.float64)
    for schedule in SCHEDULES:
        level = schedule.at(0.6)
        x = draw(0, 3, 4)
        total = level.alpha**2 * S + level.sigma**2 * eye
        mean = m + level.alpha * torch.linalg.solve(total, (x - level.alpha * m).mT).mT @ S
        posterior = target.denoiser(schedule, "dense")(x, level)
        torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-10)
        assert posterior.covariance is not None
        C = level.sigma**2 * torch.linalg.solve(total, S)
        torch.testing.assert_close(posterior.covariance.dense()[0], C, rtol=0, atol=1e-10)
        assert float(target.twin.mmse(level)) == pytest.approx(float(torch.trace(C)) / 4, rel=1e-10)
        noise_loss = float(torch.exp(level.logsnr)) * float(torch.trace(C)) / 4
        assert float(target.twin.noise_loss(level)) == pytest.approx(noise_loss, rel=1e-10)
        law = MultivariateNormal(level.alpha * m, total)
        torch.testing.assert_close(target.log_prob(x, level), law.log_prob(x), rtol=1e-10, atol=1e-10)
        assert target.entropy(level) == pytest.approx(float(law.entropy()))
        assert Moments.of(target.marginal(level)).distance(Moments(level.alpha * m, total)) < 1e-9


def test_twin_of_a_mixture_is_the_best_linear_denoiser() -> None:
    """E ||D_lin - x_0||^2 / d over the data equals the twin's mmse, though the data are no Gaussian."""
    target, level = mixture2(), CosineVP().at(0.4)
    n = 50_000
    x0 = target.sample(range(n))
    errors = ((target.twin.posterior(target.noisy(range(n), level), level).mean - x0) ** 2).mean(1)
    assert abs(float(errors.mean()) - float(target.twin.mmse(level))) < 4 * float(errors.std()) / n**0.5


def test_samples_take_any_noise_source() -> None:
    target = anisotropic_gaussian((3,))
    x = target.sample(range(4), Antithetic(Independent(0)))
    torch.testing.assert_close(x[0] + x[1], 2 * target.mean, rtol=0, atol=1e-12)
    assert torch.equal(mixture8().sample([5]), mixture8().sample(range(8))[5:6])
    assert mixture8().sample(range(2), dtype=torch.float32).dtype == torch.float32


def test_rotations_are_rotations() -> None:
    B = rotation(6, 2)
    torch.testing.assert_close(B.mT @ B, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.equal(B, rotation(6, 3))


def test_errors_name_what_is_wrong() -> None:
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        GaussianTarget(torch.zeros(2), -eye)
    with pytest.raises(ValueError, match="not symmetric"):
        GaussianTarget(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"needs \(3, 3\)"):
        GaussianTarget(torch.zeros(3), eye)
    with pytest.raises(ValueError, match="do not fit"):
        MixtureTarget(torch.ones(2), torch.zeros(2, 3), eye.expand(2, 2, 2))
    with pytest.raises(ValueError, match="positive"):
        MixtureTarget(torch.tensor([1.0, -1.0]), torch.zeros(2, 2), eye.expand(2, 2, 2))
    with pytest.raises(ValueError, match="pca-diagonal"):
        mixture2().denoiser(CosineVP(), "full")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'basis', 'dense'"):
        anisotropic_gaussian().denoiser(CosineVP(), "full")  # pyright: ignore[reportArgumentType]


def test_random_mixtures_are_fixed_by_their_seed() -> None:
    one, again, other = random_mixture(3, 4, 1), random_mixture(3, 4, 1), random_mixture(3, 4, 2)
    assert torch.equal(one.covariances, again.covariances)
    assert not torch.equal(one.means, other.means)


def test_import_needs_no_pytest() -> None:
    code = "import sys, lowvar.testing, lowvar.testing.laws; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
