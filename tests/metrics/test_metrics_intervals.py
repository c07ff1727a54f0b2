"""Block jackknife: equal to its definition, honest coverage, pairing."""

import math

import pytest
import torch

from lowvar.metrics import Interval, Replicates
from lowvar.metrics.intervals import block_bounds, block_numbers, jackknife
from lowvar.process.noise import Antithetic, Independent


def test_equal_blocks_give_the_standard_error_of_block_means():
    x = Independent(1).normal(range(320), (), dtype=torch.float64)
    means = x.reshape(32, 10).mean(1)
    i = jackknife(x, 32).interval()
    assert i.se == pytest.approx((means.std() / math.sqrt(32)).item(), rel=1e-10)
    assert i.value == pytest.approx(x.mean().item(), abs=1e-12)
    assert i.high - i.value == pytest.approx(2.0395134 * i.se, rel=1e-6)  # t quantile, 31 degrees of freedom


def test_unequal_blocks_weigh_by_their_size():
    # Busing et al.: for a mean, pseudo-value j is the mean of block j, so se^2 = mean (m_j - m)^2 n_j / (n - n_j)
    x = Independent(1).normal(range(71), (), dtype=torch.float64)
    r = jackknife(x, 16)
    means = torch.stack([part.mean() for part in x.split(r.sizes.tolist())])
    centred = (means - means.mean()).square() * r.sizes / (71 - r.sizes)
    assert r.interval().se == pytest.approx(math.sqrt(centred.mean().item()), rel=1e-10)


@pytest.mark.parametrize(("n", "blocks"), [(32, 16), (71, 16), (1000, 32), (8192, 20), (65, 32)])
def test_blocks_cover_everything_and_never_cut_an_antithetic_pair(n: int, blocks: int):
    bounds = block_bounds(n, blocks)
    sizes = bounds.diff()
    assert bounds[0] == 0
    assert bounds[-1] == n
    assert len(sizes) == blocks
    assert (bounds[:-1] % 2 == 0).all()
    assert sizes.min() >= 2
    assert sizes.max() - sizes.min() <= 3
    assert block_numbers(bounds).bincount().tolist() == sizes.tolist()


def test_coverage_of_a_linear_statistic():
    # 2000 intervals from a skewed law: at 95% the number that cover has sd 9.7; below 93.5% would be 3 sd short
    covered = 0
    for k in range(2000):
        x = Independent(k).uniform(range(64), (), dtype=torch.float64).log().neg()
        i = jackknife(x, 16).interval()
        covered += i.low <= 1.0 <= i.high
    assert 0.92 < covered / 2000 < 0.97


def test_antithetic_pairs_narrow_the_interval_and_blocks_know_it():
    z = Antithetic(Independent(3)).normal(range(512), (), dtype=torch.float64)
    assert jackknife(z, 16).interval().se < 1e-12
    independent = Independent(3).normal(range(512), (), dtype=torch.float64)
    assert jackknife(independent, 16).interval().se == pytest.approx(1 / math.sqrt(512), rel=0.5)


def test_bias_of_a_nonlinear_score_is_estimated():
    # theta = (mean)^2 has bias 1/n for unit variance; the jackknife's estimate is exact in mean
    n, estimates = 64, []
    for k in range(400):
        r = jackknife(Independent(k).normal(range(n), (), dtype=torch.float64), 32)
        estimates.append(Replicates(r.value**2, r.leave_out.square(), r.sizes).bias)
    assert sum(estimates) / len(estimates) == pytest.approx(1 / n, rel=0.1)
    linear = jackknife(Independent(0).normal(range(n), (), dtype=torch.float64), 32)
    assert abs(linear.bias) < 1e-12


def test_pairing_keeps_the_covariance():
    common = Independent(1).normal(range(256), (), dtype=torch.float64)
    own = Independent(2).normal(range(256), (), dtype=torch.float64)
    a, b = jackknife(common + 0.05, 16), jackknife(common + 0.01 * own, 16)
    paired = a.minus(b).interval()
    assert paired.se == pytest.approx(0.01 / 16, rel=0.5)
    assert paired.excludes(0.0)
    assert not a.interval().excludes(b.value)


def test_confidence_widens():
    r = jackknife(torch.arange(64.0), 16)
    assert r.interval(0.99).high > r.interval(0.9).high
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="confidence"):
            r.interval(bad)


def test_too_few_blocks_or_samples_and_unlike_blocks_are_refused():
    with pytest.raises(ValueError, match="at least 16"):
        jackknife(torch.arange(64.0), 8)
    with pytest.raises(ValueError, match="draw at least 32"):
        jackknife(torch.arange(31.0), 16)
    with pytest.raises(ValueError, match="at least 16"):
        Replicates(0.0, torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="different blocks"):
        jackknife(torch.arange(64.0), 16).minus(jackknife(torch.arange(66.0), 16))


def test_excludes_is_about_the_closed_interval():
    i = Interval(0.5, 0.0, 1.0, 0.25)
    assert not i.excludes(0.0)
    assert not i.excludes(1.0)
    assert i.excludes(-1e-9)
    assert i.excludes(1.1)
