"""Densities by change of the uniform number: exact integrals, published laws, what is learned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import VE, CosineVP, schedule_from_diffusers
from lowvar.train import (
    EDM,
    EntropyRateTimes,
    FixedTimes,
    GradientNormTimes,
    LearnedBins,
    LearnedScheduleTimes,
    LogitNormalTimes,
    LognormalTimes,
    LossSecondMomentTimes,
    MinSNR,
    ModeTimes,
    RunningMeans,
    Times,
    UniformTimes,
    continuous,
    floored,
)
from lowvar.train.objectives import LikelihoodOnly, log_error_factor

SCHEDULE = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
PLAIN = [UniformTimes(12), UniformTimes(None, 0.02)]  # 12 does not divide by the numbers of bins below


def weighted(plain: UniformTimes) -> list[Any]:
    norms = GradientNormTimes(plain=plain, bins=5, uniform=0.2, least=1)
    rates = EntropyRateTimes(SCHEDULE, "v_prediction", MinSNR(), plain=plain, bins=7, uniform=0.3, least=2)
    seen = torch.arange(7).repeat(2)
    return [
        LogitNormalTimes(-0.4, 0.7, weighted=True, uniform=0.15, plain=plain, bins=9),
        ModeTimes(1.5, weighted=True, uniform=0.05, plain=plain, bins=8),
        ModeTimes(-0.9, weighted=True, uniform=0.4, plain=plain, bins=5),
        LognormalTimes(SCHEDULE, -0.8, 0.9, weighted=True, uniform=0.25, plain=plain, bins=11),
        norms,
        norms.updated(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([9.0, 1e-4, 3.0, 0.0, 100.0])),
        rates.updated(seen, torch.cos(seen.double()) + 1.5),
        LearnedScheduleTimes(plain, bins=3, uniform=0.2).updated(torch.tensor([0, 2]), torch.tensor([1.0, 4.0])),
    ]


def integral(times: Times, probabilities: Tensor, plain: UniformTimes, f: Any) -> float:
    """Of weight f(t) over u in (0, 1): Gauss-Legendre of 3 nodes on each piece where the integrand is a polynomial."""
    k = len(probabilities)
    cdf = torch.cat([torch.zeros(1).double(), probabilities.cumsum(0)])
    v = torch.arange(k + 1).double() / k
    if plain.steps is not None:
        v = torch.cat([v, torch.arange(plain.steps + 1).double() / plain.steps]).sort().values
    place = (v * k).floor().long().clamp_max(k - 1)
    edges = cdf[place] + (v * k - place) * probabilities[place]
    node = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64)
    weight = torch.tensor([5 / 18, 8 / 18, 5 / 18], dtype=torch.float64)
    length = edges.diff()
    u = edges[:-1, None] + length[:, None] * (node + 1) / 2
    drawn = times.at(u.flatten())
    return float((length[:, None] * weight * (drawn.weight * f(drawn.t)).reshape(u.shape)).sum())


def exact(plain: UniformTimes, power: int) -> float:
    """Mean of t^power over the plain times."""
    if plain.steps is not None:
        return sum(((n + 1) / plain.steps) ** power for n in range(plain.steps)) / plain.steps
    return (1 - plain.t_min ** (power + 1)) / (power + 1) / (1 - plain.t_min)


OWN = [LognormalTimes(VE(), -0.7, 1.6), LogitNormalTimes(0.3, 1.4), LogitNormalTimes(-0.5, 0.9, weighted=True)]


@pytest.mark.parametrize("own", OWN, ids=["lognormal", "logit-normal", "weighted"])
def test_learned_times_keep_the_mean_over_the_objectives_own(own: FixedTimes) -> None:
    """On 40 midpoints of each bin, the plain times' and the learned ones': the same terms, so the same sum exactly."""

    def f(t: Tensor) -> Tensor:
        return torch.exp(-3 * t) + torch.sin(20 * t)

    node = (torch.arange(40).double() + 0.5) / 40
    seen = torch.tensor([9.0, 0.1, 3.0, 0.0, 100.0, 2.0, 4.0])
    bins = torch.arange(7)
    learned: list[Any] = [
        GradientNormTimes(plain=own, bins=7, uniform=0.2, least=1),
        EntropyRateTimes(VE(), "edm", EDM(0.6), 0.6, plain=own, bins=7, uniform=0.3, least=1),
        LearnedScheduleTimes(own, bins=7, uniform=0.2),
        LossSecondMomentTimes(7, 1, 0.2, plain=own),
    ]
    v = ((bins[:, None] + node) / 7).flatten()
    plain = own.at(v)
    mean = float((plain.weight * f(plain.t)).mean())
    for start in learned:
        times = start.updated(bins, seen)
        q = times.probabilities()
        assert float(q.max()) > 1.5 / 7  # so there is something to weight
        drawn = times.at((q.cumsum(0)[:, None] - q[:, None] * (1 - node)).flatten())
        share = q.repeat_interleave(40) / 40
        assert float((share * drawn.weight * f(drawn.t)).sum()) == pytest.approx(mean, abs=1e-9), type(times)
        assert bool((drawn.bin == bins.repeat_interleave(40)).all())


@pytest.mark.parametrize("plain", PLAIN, ids=["table", "continuous"])
@pytest.mark.parametrize("number", range(8))
def test_weights_make_it_unbiased(plain: UniformTimes, number: int) -> None:
    times = weighted(plain)[number]
    q = times.probabilities()
    assert float(q.sum()) == pytest.approx(1, abs=1e-12)
    assert times.label == "unbiased"
    for power in range(6):  # power 0: weights average to 1
        mean = integral(times, q, plain, lambda t, power=power: t**power)
        assert mean == pytest.approx(exact(plain, power), abs=1e-9)


@pytest.mark.parametrize("plain", PLAIN, ids=["table", "continuous"])
@pytest.mark.parametrize("number", range(8))
def test_inverse_cdf_increases_and_weights_are_bounded(plain: UniformTimes, number: int) -> None:
    times = weighted(plain)[number]
    drawn = times.at(torch.linspace(0, 1, 5001, dtype=torch.float64)[:-1])
    assert bool((drawn.t.diff() >= 0).all())
    assert bool((drawn.bin.diff() >= 0).all())
    assert float(drawn.weight.max()) <= 1 / times.uniform + 1e-9
    assert float(drawn.t.min()) > 0
    assert float(drawn.t.max()) <= 1
    assert bool(torch.isfinite(times.at(torch.tensor([0.0, 1 - 2.0**-53]).double()).t).all())
    learned = ["means"] if isinstance(times, LearnedBins) else list(times.state())
    again = replace(times, **dict.fromkeys(learned)).restored(times.state())  # from an empty one of its kind
    u = torch.linspace(0.01, 0.99, 50)
    assert torch.equal(again.at(u).t, times.at(u).t)
    assert torch.equal(again.at(u).weight, times.at(u).weight)


# ------------------------------------------------------------------------------------------------------- published laws


def test_logit_normal_quantiles() -> None:
    u = torch.tensor([0.05, 0.3, 0.5, 0.9]).double()
    times = LogitNormalTimes(0.3, 0.8, plain=UniformTimes(None))
    drawn = times.at(u)
    assert torch.allclose(torch.special.ndtr((torch.logit(drawn.t) - 0.3) / 0.8), u, atol=1e-12)
    assert torch.equal(drawn.weight, torch.ones(4).double())
    assert times.label == "changes the objective"
    assert float(LogitNormalTimes(0.3, 0.8, plain=UniformTimes(10)).at(u).t[2]) == pytest.approx(0.6)


def test_mode_is_the_published_formula() -> None:
    u = torch.linspace(0.01, 0.99, 9).double()
    for s in (-1.0, 0.0, 0.81, 1.75):
        published = 1 - (1 - u) - s * (torch.cos(math.pi / 2 * (1 - u)) ** 2 - 1 + (1 - u))
        assert torch.allclose(ModeTimes(s, plain=UniformTimes(None)).at(u).t, published, atol=1e-12)
    assert ModeTimes(1.0).label == "changes the objective"


@pytest.mark.parametrize(
    "kind",
    [
        (LogitNormalTimes, {"mean": -0.5, "std": 0.6}),
        (ModeTimes, {"scale": 1.3}),
        (ModeTimes, {"scale": -0.7}),
        (LognormalTimes, {"schedule": CosineVP(), "mean": -1.0, "std": 0.7}),
    ],
)
def test_weighted_density_is_that_of_the_unweighted_law(kind: tuple[Any, dict[str, Any]]) -> None:
    """Probabilities of the bins, a uniform share aside, against a fine lattice pushed through the unweighted draw."""
    make, given = kind
    n, plain = 200_000, UniformTimes(None, 1e-3)
    t = make(**given, plain=plain).at((torch.arange(n).double() + 0.5) / n).t
    share = (((t - 1e-3) / (1 - 1e-3) * 10).long().clamp(0, 9)).bincount(minlength=10) / n
    q = make(**given, plain=plain, weighted=True, uniform=0.2, bins=10).probabilities()
    assert torch.allclose(q, 0.8 * share.double() + 0.02, atol=2e-5)


# ------------------------------------------------------------------------------------------------------ what is learned


def test_running_means_are_the_recursion() -> None:
    d, means = 0.8, RunningMeans.empty(3, 0.8)
    s, c = [0.0] * 3, [0] * 3
    for k in range(12):
        value = math.sin(3.0 * k) + 2
        means = means.updated(torch.tensor([k % 2]), torch.tensor([value], dtype=torch.float64))
        s[k % 2], c[k % 2] = d * s[k % 2] + (1 - d) * value, c[k % 2] + 1
    expected = [s[0] / (1 - d**6), s[1] / (1 - d**6), 0.0]
    assert means.mean.tolist() == pytest.approx(expected, abs=1e-12)
    twice = RunningMeans.empty(2, d).updated(torch.tensor([1, 1]), torch.tensor([2.0, 4.0]))
    assert twice.mean.tolist() == pytest.approx([0, 3])


def test_gradient_norm_times_have_the_best_variance() -> None:
    """Known m2, constant on the bins: the variance of the weighted gradient is the closed form's."""
    m2 = torch.tensor([40.0, 2.0, 0.5, 0.1, 7.0]).double()
    mu2 = 0.3
    times = GradientNormTimes(plain=UniformTimes(None), bins=5, uniform=1e-9, least=3)
    for _ in range(3):
        assert torch.equal(times.probabilities(), torch.full((5,), 0.2, dtype=torch.float64))
        times = times.updated(torch.arange(5), m2)
    q = times.probabilities()
    variance = float((q * (1 / (5 * q)) ** 2 * m2).sum()) - mu2
    best = float(m2.sqrt().mean()) ** 2 - mu2
    assert variance == pytest.approx(best, rel=1e-7)
    assert (float(m2.mean()) - mu2) / variance > 1.7
    assert GradientNormTimes.learns_from == "squared gradient norms"
    assert UniformTimes.learns_from == EntropyRateTimes.learns_from == "losses"


def gaussian_losses(times: EntropyRateTimes, s2: float) -> Tensor:
    """Losses of the best network for data N(0, s2), by bin: w mmse at the middle of the bin."""
    k = times.bins
    t = times.plain.at((torch.arange(k).double() + 0.5) / k).t
    logsnr = SCHEDULE.logsnr(t)
    mmse = 1 / (1 / s2 + logsnr.exp())
    return times.weighting.log_weight(logsnr, times.prediction).exp() * mmse


@pytest.mark.parametrize("weighting", [None, MinSNR()])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_entropy_rate_is_that_of_a_gaussian(prediction: Any, weighting: Any) -> None:
    """H(x_0 | x_t) = log(2 pi e / (1 / s2 + snr)) / 2 exactly; its differences over the bins are the density."""
    s2, given = 0.25, {} if weighting is None else {"weighting": weighting}
    times = EntropyRateTimes(SCHEDULE, prediction, **given, plain=continuous(), bins=200, uniform=1e-9, least=1)
    times = times.updated(torch.arange(200), gaussian_losses(times, s2))
    edges = 1e-3 + (1 - 1e-3) * torch.arange(201).double() / 200
    entropy = -0.5 * torch.log(1 / s2 + SCHEDULE.logsnr(edges).exp())
    rate = entropy.diff()
    got, expected = times.probabilities()[5:], rate[5:]  # the midpoint rule is coarse where logsnr falls fastest
    assert torch.allclose(got / got.sum(), expected / expected.sum(), rtol=0.02, atol=1e-5)


def test_loss_factor_of_the_plain_loss_is_the_targets() -> None:
    """With epsilon the factor of a bin is the fall of logsnr alone: k = snr."""
    times = EntropyRateTimes(SCHEDULE, "epsilon", bins=10, least=1, uniform=1e-9)
    q = times.updated(torch.arange(10), torch.ones(10)).probabilities()
    edges = 1e-3 + (1 - 1e-3) * torch.arange(11).double() / 10
    fall = -SCHEDULE.logsnr(edges).diff()
    assert torch.allclose(q, fall / fall.sum(), atol=1e-8)
    assert float(log_error_factor("epsilon", torch.tensor(2.0))) == 2.0


def test_learned_schedule_descends_the_variance() -> None:
    """From uniform times, with each bin seen once, the step is that of dV/dtheta by finite differences."""
    loss, k, m = torch.tensor([3.0, 0.5, 1.0, 2.0]).double(), 4, 0.3
    times = LearnedScheduleTimes(bins=k, uniform=m, rate=0.01)

    def variance(theta: Tensor) -> float:
        q = (1 - m) * torch.softmax(theta, 0) + m / k
        return float((loss**2 / (k**2 * q)).sum())

    h, zero = 1e-6, torch.zeros(k, dtype=torch.float64)
    slope = torch.tensor([(variance(zero + h * e) - variance(zero - h * e)) / (2 * h) for e in torch.eye(k).double()])
    moved = times.updated(torch.arange(k), loss).theta
    assert torch.allclose(moved, -0.01 * slope.double() / (loss**2).mean(), atol=1e-9)


def test_learned_schedule_ends_at_the_second_moments() -> None:
    loss = torch.tensor([3.0, 0.5, 1.0, 2.0]).double()
    times = LearnedScheduleTimes(UniformTimes(None), bins=4, uniform=1e-6, rate=0.5)
    u = (torch.arange(1024).double() + 0.5) / 1024
    for _ in range(100):
        bins = times.at(u).bin
        times = times.updated(bins, loss[bins])
    assert torch.allclose(times.probabilities(), loss / loss.sum(), atol=0.01)
    assert times.updated(torch.tensor([0]), torch.tensor([0.0])).theta.isfinite().all()
    assert LearnedScheduleTimes(bins=2).updated(torch.tensor([0]), torch.tensor([0.0])).theta.tolist() == [0, 0]


def test_refusals() -> None:
    wrong = GradientNormTimes(bins=4)
    for make, message in [
        (lambda: LogitNormalTimes(std=0), "std is 0"),
        (lambda: LogitNormalTimes(uniform=0), "uniform is 0"),
        (lambda: ModeTimes(2.0), "scale is 2.0"),
        (lambda: ModeTimes(bins=0), "bins 0"),
        (lambda: LognormalTimes(SCHEDULE, uniform=2), "uniform is 2"),
        (lambda: GradientNormTimes(least=0), "least is 0"),
        (lambda: GradientNormTimes(decay=1.0), "decay is 1.0"),
        (lambda: GradientNormTimes(bins=3).restored(wrong.state()), "of 4 bins, not of 3"),
        (lambda: EntropyRateTimes(SCHEDULE, "epsilon", uniform=0), "uniform 0"),
        (lambda: EntropyRateTimes(SCHEDULE, "epsilon", bins=3).restored(wrong.state()), "of 4 bins, not of 3"),
        (lambda: EntropyRateTimes(SCHEDULE, "epsilon", LikelihoodOnly()), "LikelihoodOnly gives the squared error no"),
        (lambda: LearnedScheduleTimes(rate=0), "rate 0"),
        (lambda: LearnedScheduleTimes(theta=torch.zeros(3)), "of 3 bins, not of 32"),
        (lambda: floored(torch.tensor([1.0, -1.0]), 0.1), "negative or not finite"),
        (lambda: floored(torch.ones(2), 0.0), "uniform is 0"),
        (lambda: RunningMeans.empty(0, 0.5), "bins is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
