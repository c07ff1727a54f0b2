"""Each distance against exact truths, peers and its own brute force."""

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from lowvar.metrics import (
    energy_distance,
    frechet_distance,
    frechet_metric,
    kernel_distance,
    kernel_metric,
    mean_error,
    sliced_wasserstein,
    sliced_wasserstein_squared,
    spectrum_error,
)
from lowvar.metrics.energy import energy_statistic
from lowvar.metrics.frechet import FrechetStatistic, frechet_from_moments
from lowvar.metrics.intervals import Replicates, block_bounds
from lowvar.metrics.kernel import kernel_statistic
from lowvar.metrics.moments import MomentStatistic
from lowvar.metrics.wasserstein import SlicedStatistic, directions
from lowvar.process.noise import Independent


def normal(n: int, *shape: int, seed: int = 0) -> Tensor:
    return Independent(seed).normal(range(n), shape, dtype=torch.float64)


def mean_distance(mu: float, s2: float) -> float:
    """E|Z| for Z ~ N(mu, s2): the folded normal mean."""
    s = math.sqrt(s2)
    return s * math.sqrt(2 / math.pi) * math.exp(-(mu**2) / (2 * s2)) + mu * math.erf(mu / math.sqrt(2 * s2))


@pytest.mark.parametrize(("mu", "sigma"), [(0.0, 2.0), (1.5, 1.0), (-0.7, 0.4)])
def test_energy_of_one_dimensional_gaussians_is_the_closed_form(mu: float, sigma: float):
    # quantiles at (i - 1/2) / n instead of draws: an error of order 1/n, which is known, remains
    n = 4000
    q = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = math.sqrt(2) * torch.erfinv(2 * q - 1)
    truth = 2 * mean_distance(mu, 1 + sigma**2) - mean_distance(0, 2) - mean_distance(0, 2 * sigma**2)
    found = energy_distance((mu + sigma * z)[:, None], z[:, None])
    u_statistic = (mean_distance(0, 2) + mean_distance(0, 2 * sigma**2)) / (n - 1)
    assert found + u_statistic == pytest.approx(truth, abs=1e-3)


def test_energy_and_kernel_are_unbiased_by_enumeration():
    # every split of 6 points into 3 and 3: the mean of a U-statistic over exchangeable splits is 0
    points = normal(6, 2, seed=4)
    for distance in (energy_distance, kernel_distance):
        values = []
        for chosen in itertools.combinations(range(6), 3):
            rest = [i for i in range(6) if i not in chosen]
            values.append(distance(points[list(chosen)], points[rest]))
        assert sum(values) / len(values) == pytest.approx(0, abs=1e-12)
        assert max(values) > 0.1


def test_energy_of_two_point_sets_is_its_definition():
    x, y = normal(7, 2, 3, seed=1), normal(5, 2, 3, seed=2) + 1
    a, b = x.flatten(1), y.flatten(1)
    truth = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).sum() / 42 - torch.cdist(b, b).sum() / 20
    assert energy_distance(x, y) == pytest.approx(truth.item(), abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_chunks_do_not_change_the_result(chunk: int):
    x, y = normal(65, 4, seed=1), normal(33, 4, seed=2) + 0.3
    assert energy_distance(x, y, chunk=chunk) == pytest.approx(energy_distance(x, y), abs=1e-12)
    assert kernel_distance(x, y, chunk=chunk) == pytest.approx(kernel_distance(x, y), abs=1e-12)
    a, b = energy_statistic(y, chunk=chunk).replicates(x, 16), energy_statistic(y).replicates(x, 16)
    assert torch.allclose(a.leave_out, b.leave_out, atol=1e-12, rtol=0)


def gaussian_moments(d: int, seed: int) -> tuple[Tensor, Tensor]:
    a = normal(d, d, seed=seed)
    return normal(1, d, seed=seed + 1)[0], a @ a.mT + 0.1 * torch.eye(d, dtype=torch.float64)


def with_moments(n: int, mean: Tensor, cov: Tensor, seed: int) -> Tensor:
    """n points whose sample mean and covariance are exactly the given ones."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(z.mT)), z.mT, upper=False).mT
    return mean + white @ torch.linalg.cholesky(cov).mT


def test_frechet_of_commuting_gaussians_is_the_closed_form():
    q = torch.linalg.qr(normal(5, 5, seed=3)).Q
    a, b = torch.tensor([3.0, 2, 1, 0.5, 0.01]).double(), torch.tensor([0.1, 4, 1, 2, 0.3]).double()
    mu = normal(1, 5, seed=4)[0]
    truth = mu.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    x = with_moments(40, mu, (q * a) @ q.mT, 5)
    y = with_moments(30, 0 * mu, (q * b) @ q.mT, 6)
    assert frechet_distance(x, y) == pytest.approx(truth.item(), rel=1e-10)


def test_frechet_equals_scipys_matrix_square_root_and_is_batched():
    from scipy.linalg import sqrtm

    (m1, s1), (m2, s2), (m3, s3) = (gaussian_moments(6, seed) for seed in (10, 20, 30))
    for m, s in ((m1, s1), (m3, s3)):
        truth = (m - m2).square().sum() + (s + s2).trace() - 2 * torch.as_tensor(sqrtm((s @ s2).numpy())).real.trace()
        assert frechet_from_moments(m, s, m2, s2).item() == pytest.approx(truth.item(), rel=1e-8)
    both = frechet_from_moments(torch.stack([m1, m3]), torch.stack([s1, s3]), m2, s2)
    assert both[1].item() == pytest.approx(frechet_from_moments(m3, s3, m2, s2).item(), rel=1e-12)


def test_frechet_of_equal_and_of_singular_moments():
    m, s = gaussian_moments(4, 1)
    assert abs(frechet_from_moments(m, s, m, s).item()) < 1e-10
    x = normal(3, 8)  # fewer points than dimensions
    assert abs(frechet_distance(x, x)) < 1e-6


class Flat(nn.Module):
    num_features = 12

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_parity_with_torchmetrics():
    x, y = normal(80, 3, 2, 2, seed=1) * 1.3 + 0.2, normal(80, 3, 2, 2, seed=2)
    metric = frechet_metric(Flat())
    metric.update(y[:30], real=True)
    metric.update(y[30:], real=True)
    metric.update(x, real=False)
    assert frechet_distance(x.flatten(1), y.flatten(1)) == pytest.approx(metric.compute().item(), abs=1e-10)
    with warnings.catch_warnings():  # it warns that it keeps the features
        warnings.simplefilter("ignore")
        kernel = kernel_metric(Flat(), subset_size=80, subsets=1)
    kernel.update(y, real=True)
    kernel.update(x, real=False)
    assert kernel_distance(x.flatten(1), y.flatten(1)) == pytest.approx(kernel.compute()[0].item(), abs=1e-10)


def test_sliced_wasserstein_of_shifted_gaussians_is_the_closed_form():
    d, shift = 6, torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0], dtype=torch.float64)
    x = normal(50, d)
    u = directions(d, 300, seed=9)
    truth = (shift @ u).square().mean().item()  # a shift couples point to point
    assert sliced_wasserstein_squared(x + shift, x, projections=300, seed=9) == pytest.approx(truth, rel=1e-12)
    assert truth == pytest.approx(shift.square().sum().item() / d, rel=0.2)
    assert sliced_wasserstein(x + shift, x, projections=300, seed=9) == pytest.approx(math.sqrt(truth), rel=1e-12)


def test_sliced_wasserstein_of_scaled_points_and_of_repeated_points():
    x = normal(40, 3)
    u = directions(3)
    truth = ((x @ u).square() * 0.25).mean().item()
    assert sliced_wasserstein_squared(1.5 * x, x) == pytest.approx(truth, rel=1e-12)
    assert sliced_wasserstein_squared(x.repeat(3, 1), x) == pytest.approx(0, abs=1e-20)
    y = normal(56, 3, seed=8)
    common = math.lcm(40, 56)
    repeated = sliced_wasserstein(x.repeat_interleave(common // 40, 0), y.repeat_interleave(common // 56, 0))
    assert sliced_wasserstein(x, y) == pytest.approx(repeated, rel=1e-12)


def test_directions_are_units_and_a_prefix_does_not_depend_on_the_count():
    u = directions(5, 200, seed=3)
    assert torch.allclose(u.norm(dim=0), torch.ones(200, dtype=torch.float64))
    assert torch.equal(u[:, :20], directions(5, 20, seed=3))
    assert not torch.equal(u, directions(5, 200, seed=4))


def test_moment_errors_are_their_definitions():
    mean, cov = gaussian_moments(4, 3)
    y = with_moments(50, mean, cov, 1)
    values, vectors = torch.linalg.eigh(cov)
    wanted = values * torch.tensor([2.0, 1.0, 0.5, 1.1])
    x = with_moments(64, mean + 0.3, (vectors * wanted) @ vectors.mT, 2)
    total = values.sum().item()
    assert mean_error(x, y) == pytest.approx(math.sqrt(4 * 0.09 / total), rel=1e-10)
    assert spectrum_error(x, y) == pytest.approx((wanted - values).abs().sum().item() / total, rel=1e-10)
    rotated = with_moments(64, mean, (vectors.flip(1) * values) @ vectors.flip(1).mT, 2)
    assert spectrum_error(rotated, y) > 0.5  # the same spectrum in other directions is an error


def test_large_images_are_pooled_before_the_eigenvalue_problem():
    y = normal(40, 3, 32, 32)
    assert MomentStatistic.against(y).mean.numel() == 768


STATISTICS = {
    "energy": (energy_statistic, energy_distance),
    "kernel": (kernel_statistic, kernel_distance),
    "frechet": (FrechetStatistic.against, frechet_distance),
    "sliced": (SlicedStatistic.against, sliced_wasserstein),
}


def check_against_recomputation(found: Replicates, x: Tensor, brute, blocks: int) -> None:
    bounds = block_bounds(len(x), blocks).tolist()
    truth = [brute(torch.cat([x[:a], x[b:]])) for a, b in itertools.pairwise(bounds)]
    assert found.value == pytest.approx(brute(x), abs=1e-10)
    assert torch.allclose(found.leave_out, torch.tensor(truth, dtype=torch.float64), atol=1e-10, rtol=0)
    assert found.sizes.sum() == len(x)


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize(("n", "blocks"), [(99, 16), (64, 32)])
def test_leave_one_block_out_equals_recomputation(name: str, n: int, blocks: int):
    make, brute = STATISTICS[name]
    x, y = normal(n, 5, seed=1) * 0.7 + 0.2, normal(41, 5, seed=2)
    check_against_recomputation(make(y).replicates(x, blocks), x, lambda v: brute(v, y), blocks)


def test_leave_one_block_out_moments_equal_recomputation():
    x, y = normal(99, 5, seed=1) * 0.7 + 0.2, normal(41, 5, seed=2)
    first, second = MomentStatistic.against(y).replicates(x, 16)
    check_against_recomputation(first, x, lambda v: mean_error(v, y), 16)
    check_against_recomputation(second, x, lambda v: spectrum_error(v, y), 16)


@pytest.mark.parametrize(
    "distance", [energy_distance, kernel_distance, frechet_distance, sliced_wasserstein, mean_error, spectrum_error]
)
def test_bad_samples_are_refused(distance):
    good, bad = normal(10, 3), normal(10, 3)
    bad[4, 1] = torch.nan
    with pytest.raises(ValueError, match="1 of 10 samples are not finite"):
        distance(bad, good)
    with pytest.raises(ValueError, match="at least 2"):
        distance(good, good[:1])


@pytest.mark.parametrize("distance", [energy_distance, kernel_distance, frechet_distance, sliced_wasserstein])
def test_different_shapes_are_refused(distance):
    with pytest.raises(ValueError, match=r"give equal shapes|use one extractor"):
        distance(normal(10, 3), normal(10, 4))
