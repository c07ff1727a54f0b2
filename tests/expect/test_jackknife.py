"""Nonlinear scores: value, bias and interval against exact distances of Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.expect.jackknife import BIAS, ScoreEstimate, ScoreName, score_estimate
from lowvar.metrics.energy import energy_statistic
from lowvar.metrics.frechet import FrechetStatistic, frechet_from_moments
from lowvar.metrics.intervals import Replicates
from lowvar.metrics.kernel import kernel_statistic
from lowvar.process.noise import Antithetic, Independent, NoiseSource

MEAN, STD = 0.4, 1.3


@dataclass(frozen=True)
class Normals:
    """N(MEAN, STD^2 I)."""

    d: int = 1
    mean: float = MEAN
    nfe: int = 3

    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor:
        return self.mean + STD * noise.normal(index, (self.d,), dtype=torch.float64)


def data(d: int = 1, m: int = 300) -> Tensor:
    return Independent(99).normal(range(m), (d,), dtype=torch.float64)


def exact(score: ScoreName, y: Tensor) -> float:
    """theta against the reference y (m, 1), in closed form; Frechet against the moments of N(0, 1) per dimension."""
    if score == "frechet":
        d = y.shape[1]
        eye = torch.eye(d, dtype=torch.float64)
        cov = torch.atleast_2d(torch.cov(y.mT))
        return float(frechet_from_moments(torch.full((d,), MEAN).double(), STD**2 * eye, y.mean(0), cov))
    v, m = y[:, 0], len(y)
    off = ~torch.eye(m, dtype=torch.bool)
    if score == "energy":
        z = (MEAN - v) / STD
        cross = STD * math.sqrt(2 / math.pi) * torch.exp(-(z**2) / 2) + (MEAN - v) * torch.special.erf(z / math.sqrt(2))
        own = 2 * STD / math.sqrt(math.pi)
        within = (v[:, None] - v).abs()[off].mean()
        return float(2 * cross.mean() - own - within)
    m1, m2, m3 = MEAN, MEAN**2 + STD**2, MEAN**3 + 3 * MEAN * STD**2
    cross = 1 + 3 * v * m1 + 3 * v**2 * m2 + v**3 * m3
    own = 1 + 3 * m1**2 + 3 * m2**2 + m3**2
    within = (v[:, None] * v + 1)[off] ** 3
    return float(own + within.mean() - 2 * cross.mean())


def replicates(score: ScoreName, y: Tensor, count: int, n: int, blocks: int = 16) -> list[Replicates]:
    statistic = {"frechet": FrechetStatistic.against, "kernel": kernel_statistic, "energy": energy_statistic}[score](y)
    z = MEAN + STD * Independent(5).normal(range(count * n), (y.shape[1],), dtype=torch.float64)
    return [statistic.replicates(x, blocks) for x in z.split(n)]


def test_bias_is_what_is_declared() -> None:
    """At n = 64 in 4 dimensions the Frechet distance is biased upwards and the correction takes most of it off."""
    assert BIAS == {"frechet": "upwards, of order 1/n", "kernel": "none", "energy": "none"}
    y = data(4)
    truth = exact("frechet", y)
    found = replicates("frechet", y, 150, 64)
    plain = torch.tensor([r.value for r in found])
    corrected = torch.tensor([r.corrected().value for r in found])
    se = float(plain.std()) / math.sqrt(len(plain))
    assert float(plain.mean()) - truth > 5 * se
    assert abs(float(corrected.mean()) - truth) < 3 * se
    assert all(
        r.interval().high - r.interval().low == pytest.approx(r.corrected().high - r.corrected().low) for r in found
    )
    for score in ("kernel", "energy"):
        y = data()
        values = torch.tensor([r.value for r in replicates(score, y, 100, 64)])
        assert abs(float(values.mean()) - exact(score, y)) < 3.5 * float(values.std()) / math.sqrt(100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("score", "d", "n", "least"),
    [("frechet", 1, 320, 0.93), ("frechet", 3, 480, 0.93), ("kernel", 1, 320, 0.88), ("energy", 1, 320, 0.93)],
)
def test_coverage_of_the_corrected_interval(score: ScoreName, d: int, n: int, least: float) -> None:
    """2,000 replicates, 32 blocks: theta lies in 93% to 97% of the corrected intervals.

    Kernel distance falls short, as it declares: a cubic kernel of one Gaussian feature has heavy tails (seen: .9025 at
    n = 320, .924 at n = 1280, the misses on one side).
    """
    y = data(d)
    truth = exact(score, y)
    found = [r.corrected() for r in replicates(score, y, 2000, n, blocks=32)]
    covered = sum(i.low <= truth <= i.high for i in found) / len(found)
    assert least <= covered <= 0.97, covered


def test_estimate_streams_blocks_and_counts() -> None:
    y = data(2)
    seen: list[int] = []
    found = score_estimate(
        Normals(2), y, "frechet", blocks=16, block_size=32, noise=Independent(3), progress=seen.append
    )
    everything = Normals(2)(torch.arange(512), Independent(3))
    assert found.replicates.value == pytest.approx(FrechetStatistic.against(y).value(everything), rel=1e-9)
    assert seen == [32] * 16
    assert (found.samples, found.nfe, found.declared_bias) == (512, 1536, "upwards, of order 1/n")
    assert found.corrected.value == pytest.approx(found.at_n.value - found.bias)
    assert found.corrected.low < exact("frechet", y) < found.corrected.high


def test_features_are_what_is_compared() -> None:
    y = data(2)
    sums = score_estimate(Normals(2), y, "kernel", features=lambda x: x.sum(1, keepdim=True), blocks=16, block_size=8)
    x = Normals(2)(torch.arange(128), Independent(0)).sum(1, keepdim=True)
    assert sums.at_n.value == pytest.approx(kernel_statistic(y.sum(1, keepdim=True)).value(x), rel=1e-9)


def test_two_samplers_on_common_noise() -> None:
    """The difference of two close samplers is seen on common noise and not on independent noise."""
    y = data(2)

    def made(sampler: Normals, seed: int) -> ScoreEstimate:
        return score_estimate(sampler, y, "energy", blocks=16, block_size=32, noise=Independent(seed))

    a, b, apart = made(Normals(2), 0), made(Normals(2, MEAN + 0.03), 0), made(Normals(2, MEAN + 0.03), 1)
    assert a.minus(b).excludes(0.0)
    assert a.minus(b).se < 0.3 * a.minus(apart).se
    with pytest.raises(ValueError, match="compare one score"):
        a.minus(score_estimate(Normals(2), y, "kernel", blocks=16, block_size=32))


def test_mirrored_pairs_stay_together() -> None:
    """With antithetic noise the mean of a block is exact, and the interval of the Frechet distance knows it."""
    y = data(1)
    plain = score_estimate(Normals(), y, blocks=16, block_size=32)
    paired = score_estimate(Normals(), y, blocks=16, block_size=32, noise=Antithetic(Independent(0)))
    assert paired.at_n.se != plain.at_n.se
    assert paired.corrected.low - 0.05 < exact("frechet", y) < paired.corrected.high + 0.05


REFUSED = [
    ({"score": "inception"}, "score is 'inception'; allowed: frechet, kernel, energy"),
    ({"blocks": 8}, "blocks is 8; an interval needs at least 16"),
    ({"block_size": 33}, "block_size is 33; give an even number"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=range(len(REFUSED)))
def test_bad_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        score_estimate(Normals(), data(), **settings)


def test_samples_that_diverged_are_named() -> None:
    def broken(index: Tensor, noise: NoiseSource) -> Tensor:
        return torch.where(index == 70, math.nan, 1.0)[:, None]

    broken.nfe = 1  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="1 of the samples 64 to 95 are not finite"):
        score_estimate(broken, data(), blocks=16, block_size=32)  # type: ignore[arg-type]


def test_a_reference_of_another_shape_or_not_finite_is_named() -> None:
    y = data()
    with pytest.raises(UserError, match="the reference holds values that are not finite"):
        score_estimate(Normals(), y.masked_fill(y > 1, math.inf), blocks=16, block_size=4)
    with pytest.raises(UserError, match="give reference samples of the sampler's shape"):
        score_estimate(Normals(), torch.cat([y, y], 1), "energy", blocks=16, block_size=4)


def test_a_score_that_covers_too_little_says_so() -> None:
    """As its coverage was measured above: .90 and .92 for kernel distance, within 93% to 97% for the others."""
    found = {s: score_estimate(Normals(), data(), s, blocks=16, block_size=4) for s in ("frechet", "kernel", "energy")}
    assert "heavy tails" in str(found["kernel"].undercovers)
    assert found["frechet"].undercovers is found["energy"].undercovers is None
