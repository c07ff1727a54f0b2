"""The variational bound: parity with improved-diffusion, closed forms, exact truth on a Gaussian."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import (
    VE,
    CosineVP,
    Denoiser,
    DiscreteVP,
    Flow,
    GaussianTwin,
    Independent,
    Isotropic,
    Level,
    MatrixBasis,
    NetworkDenoiser,
    NoiseSource,
    PixelBasis,
    Posterior,
    ReverseKernel,
    Schedule,
    WithCovariance,
    schedule_from_diffusers,
)
from lowvar.process.cost import CostCurve, monotone
from lowvar.process.grid import make_grid, trailing, uniform, uniform_logsnr
from lowvar.process.planning import optimal
from lowvar.sample.likelihood import VLB, discretised_log_prob, kl_bits, step_bits, vlb
from lowvar.testing import mixture8

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "improved_diffusion_vlb.json").read_text())
LN2 = math.log(2)


# ---------------------------------------------------------------------------------------------- parity with the peer


def golden_schedule() -> DiscreteVP:
    betas = torch.linspace(GOLDEN["betas"][0], GOLDEN["betas"][1], GOLDEN["T"], dtype=torch.float64)
    schedule = schedule_from_diffusers({"trained_betas": betas.tolist()})
    assert isinstance(schedule, DiscreteVP)
    return schedule


def golden_data() -> Tensor:
    levels = (torch.arange(4 * 18) * 37 % 256).reshape(4, 2, 3, 3)
    levels[0, 0, 0, 0], levels[1, 1, 2, 2] = 0, 255
    return levels.double() / 127.5 - 1


def golden_network(x: Tensor, t: Tensor) -> Tensor:
    n = t.double().reshape(-1, 1, 1, 1)
    return torch.cat([0.9 * x * (n + 1) / 20 + 0.1 * torch.sin(3 * x), torch.tanh(x + n / 10 - 0.5)], 1)


def golden_bound(variance: Any, levels: int | None = 256) -> VLB:
    schedule = golden_schedule()
    head = "range" if variance == "learned" else None
    network = golden_network if head else lambda x, t: golden_network(x, t)[:, :2]
    denoiser = NetworkDenoiser(network, schedule, "epsilon", head)
    kernel = ReverseKernel(variance=variance, last="decoder")
    return vlb(denoiser, kernel, trailing(schedule, GOLDEN["T"]), golden_data(), levels, Independent(GOLDEN["seed"]))


@pytest.mark.parametrize("variance", ["learned", "small", "large"])
def test_kl_and_prior_equal_improved_diffusion(variance: str) -> None:
    bound, golden = golden_bound(variance), GOLDEN[variance]
    assert torch.allclose(bound.prior, torch.tensor(golden["prior"], dtype=torch.float64), atol=1e-9, rtol=0)
    expected = torch.tensor(golden["vb"], dtype=torch.float64)
    assert torch.allclose(bound.kl, expected[:, :-1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("variance", ["learned", "small", "large"])
def test_decoder_equals_improved_diffusion(variance: str) -> None:
    """1e-9 with the exact normal cdf in the peer's formula; its tanh approximation itself is off by up to 1e-3 bits."""
    decoder, golden = golden_bound(variance).decoder, GOLDEN[variance]
    exact = torch.tensor(golden["vb"], dtype=torch.float64)[:, -1]
    tanh = torch.tensor(golden["decoder_tanh"], dtype=torch.float64)
    assert torch.allclose(decoder, exact, atol=1e-9, rtol=0)
    assert 1e-5 < float((tanh - exact).abs().max()) < 2e-3


# -------------------------------------------------------------------------------------------------- the decoder's bins


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("std", [1e-3, 0.05, 2.0])
def test_bins_sum_to_one(levels: int, std: float) -> None:
    grid = 2 * torch.arange(levels, dtype=torch.float64) / (levels - 1) - 1
    means = torch.tensor([-1.3, -1.0, -0.2, 0.037, 1.0], dtype=torch.float64)[:, None]
    p = discretised_log_prob(grid, means, torch.tensor(std, dtype=torch.float64), levels).exp()
    assert torch.allclose(p.sum(1), torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_bin_far_in_the_tail() -> None:
    """Where both cdfs round to 1 the log probability is still right: log of the density's integral by Mills' ratio."""
    mean = torch.tensor([-2.0, 2.0], dtype=torch.float64, requires_grad=True)
    log_p = discretised_log_prob(torch.zeros(2, dtype=torch.float64), mean, torch.full((2,), 0.05).double(), 17)
    z = (2.0 - 1 / 16) / 0.05
    expected = -0.5 * z**2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(-1 / z**2)
    assert torch.allclose(log_p, torch.full((2,), expected, dtype=torch.float64), atol=1e-5)
    log_p.sum().backward()
    assert mean.grad is not None
    assert bool(torch.isfinite(mean.grad).all())


def test_single_precision_agrees() -> None:
    x = golden_data()
    mean, std = 0.9 * x, torch.full_like(x, 0.1)
    wide, narrow = (
        discretised_log_prob(x, mean, std, 256),
        discretised_log_prob(x.float(), mean.float(), std.float(), 256),
    )
    assert torch.allclose(wide, narrow.double(), atol=1e-3)


def test_refuses() -> None:
    denoiser = GaussianTwin(torch.zeros(1), PixelBasis((1,)), torch.ones(1)).denoiser(CosineVP())
    x, grid = torch.zeros(1, 1), trailing(CosineVP(), 2)
    with pytest.raises(ValueError, match="last='decoder'"):
        vlb(denoiser, ReverseKernel(), grid, x, None)
    with pytest.raises(ValueError, match="eta is 0"):
        vlb(denoiser, ReverseKernel(eta=0.0, last="decoder"), grid, x, None)
    with pytest.raises(ValueError, match="ends at t = 0"):
        vlb(denoiser, ReverseKernel(last="decoder"), grid[:-1], x, None)
    with pytest.raises(ValueError, match="levels is 1"):
        discretised_log_prob(x, x, x + 1, 1)


# -------------------------------------------------------------------------------------- a Gaussian, expectations exact

MEAN, VARIANCE = 0.3, 1.7
# Three-point Gauss-Hermite: exact for the quadratics that the terms are in (x0, eps)
NODES = torch.tensor([-math.sqrt(3.0), 0.0, math.sqrt(3.0)], dtype=torch.float64)
WEIGHTS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
PAIRS = torch.cartesian_prod(NODES, NODES)
PAIR_WEIGHTS = torch.cartesian_prod(WEIGHTS, WEIGHTS).prod(1)


class Nodes(NoiseSource):
    """The quadrature's second coordinate as noise, at every draw."""

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        return PAIRS[:, 1].reshape(-1, *shape).to(dtype)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        raise AssertionError("no uniform numbers are needed")


def gaussian(schedule: Schedule) -> Denoiser:
    twin = GaussianTwin(
        torch.tensor([MEAN], dtype=torch.float64), PixelBasis((1,)), torch.tensor([VARIANCE], dtype=torch.float64)
    )
    return twin.denoiser(schedule)


def expected_terms(denoiser: Denoiser, kernel: ReverseKernel, grid: Tensor) -> Tensor:
    """Exact expectations of (prior, kl.., decoder) in nats."""
    x0 = MEAN + math.sqrt(VARIANCE) * PAIRS[:, :1]
    return (PAIR_WEIGHTS[:, None] * vlb(denoiser, kernel, grid, x0, None, Nodes()).terms).sum(0) * LN2


ENTROPY = 0.5 * math.log(2 * math.pi * math.e * VARIANCE)


def prior_gap(schedule: Schedule, t: float = 1.0) -> float:
    """KL of the marginal at the chain's start from the prior N(0, alpha^2 + sigma^2)."""
    level = schedule.at(t)
    a2, s2 = float(level.alpha) ** 2, float(level.sigma) ** 2
    v = (a2 * VARIANCE + s2) / (a2 + s2)
    return 0.5 * (v - 1 - math.log(v) + a2 * MEAN**2 / (a2 + s2))


@pytest.mark.parametrize("schedule", [CosineVP(), VE(10.0), Flow()], ids=lambda s: s.family)
@pytest.mark.parametrize("steps", [2, 4, 16])
def test_exact_kernel_reaches_the_entropy(schedule: Schedule, steps: int) -> None:
    """With the exact covariance the bound is tight in any number of steps: NLL plus the prior's mismatch."""
    grid = uniform(schedule, steps, 0.97)
    terms = expected_terms(gaussian(schedule), ReverseKernel(last="decoder"), grid)
    assert float(terms.sum()) == pytest.approx(ENTROPY + prior_gap(schedule, 0.97), abs=1e-9)
    # below eta = 1 the forward process is no Markov chain: still a bound, but not a tight one
    loose = expected_terms(gaussian(schedule), ReverseKernel(eta=0.5, last="decoder"), grid)
    assert float(loose.sum()) > float(terms.sum()) + 0.1


@pytest.mark.parametrize("schedule", [CosineVP(), VE(10.0), Flow()], ids=lambda s: s.family)
def test_small_variance_costs_dsnr_mmse_half(schedule: Schedule) -> None:
    grid = uniform(schedule, 6, 0.97)
    terms = expected_terms(gaussian(schedule), ReverseKernel(variance="small", last="decoder"), grid)
    levels = schedule.at(grid)
    snr = torch.exp(levels.logsnr)[:-1]
    mmse = VARIANCE * levels.sigma**2 / (levels.alpha**2 * VARIANCE + levels.sigma**2)
    closed = (snr[1:] - snr[:-1]) * mmse[:-2] / 2
    assert torch.allclose(terms[1:-1], closed, rtol=1e-10, atol=1e-12)


def test_fine_grids_approach_the_entropy_from_above() -> None:
    """Injected variance alone (C := 0 but in the decoder): the gap is O(1/K)."""
    schedule = CosineVP()
    exact = gaussian(schedule)

    def only_last(x: Tensor, level: Level, posterior: Posterior) -> Any:
        assert posterior.covariance is not None
        return posterior.covariance if float(level.t) < 1.001 * schedule.t_min else Isotropic(0.0, (1,))

    denoiser, kernel = WithCovariance(exact, only_last), ReverseKernel(last="decoder")
    totals = [float(expected_terms(denoiser, kernel, uniform_logsnr(schedule, k)).sum()) for k in (50, 100, 200, 400)]
    gaps = [total - ENTROPY - prior_gap(schedule) for total in totals]
    assert all(gap > 0 for gap in gaps)
    assert all(1.6 < a / b < 2.4 for a, b in itertools.pairwise(gaps))


def test_estimate_agrees_with_the_expectation() -> None:
    """2,000 samples of a bound in 3-d with a full covariance: within 4 standard errors of its exact value."""
    schedule = CosineVP()
    matrix = torch.tensor([[1.0, 0.4, 0.2], [0.1, 1.0, 0.5], [0.3, 0.2, 1.0]], dtype=torch.float64)
    basis = MatrixBasis(torch.linalg.qr(matrix)[0], (3,))
    spectrum = torch.tensor([2.0, 0.5, 0.1], dtype=torch.float64)
    twin = GaussianTwin(torch.zeros(3, dtype=torch.float64), basis, spectrum)
    x0 = twin.sample(Independent(1).normal(range(2000), (3,), dtype=torch.float64))
    bound = vlb(twin.denoiser(schedule), ReverseKernel(last="decoder"), uniform(schedule, 5), x0, None, Independent(2))
    entropy = 0.5 * float(torch.log(2 * math.pi * math.e * spectrum).mean()) / LN2
    assert abs(float(bound.mean) - entropy) < 4 * float(bound.se)
    kernel, grid = ReverseKernel(last="decoder"), uniform(schedule, 5)
    again = vlb(twin.denoiser(schedule), kernel, grid, x0[7:9], None, Independent(2), [7, 8])
    assert torch.allclose(again.terms, bound.terms[7:9], atol=1e-12)


def test_kl_of_dense_covariance_equals_the_diagonal_path() -> None:
    from lowvar.process import Dense, Diagonal

    variance = torch.tensor([[0.5, 2.0, 1.1]], dtype=torch.float64)
    posterior = Posterior(torch.tensor([[0.1, 0.2, -0.4]], dtype=torch.float64))
    x0, kappa, lambda2 = torch.ones(1, 3).double(), torch.tensor(0.7).double(), torch.tensor(0.4).double()
    pair = [
        kl_bits(x0, posterior, c, kappa, lambda2) for c in (Diagonal(variance), Dense(torch.diag_embed(variance), (3,)))
    ]
    assert torch.allclose(pair[0], pair[1], atol=1e-12)


@pytest.mark.parametrize("far", [2.0, 20.0, 2e4])
def test_gradients_stay_finite_far_from_the_data(far: float) -> None:
    """Early in training a mean is far from the data in units of a step's standard deviation (1e-3 to 1e-2): there the
    float32 derivative of log Phi is wrong or NaN. Rows whose step is not the last must not reach it at all.
    """
    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    kernel = ReverseKernel(variance="learned", last="decoder")
    t, s, before = (schedule.at(torch.tensor(n, dtype=torch.float64) / 1000) for n in ([1, 400], [0, 399], [2, 401]))
    x0 = torch.ones(2, 1, 2, 2)
    mean = torch.full_like(x0, 1 - far).requires_grad_()
    fraction = torch.full_like(x0, 0.5).requires_grad_()
    for levels in (17, 256):
        bits = step_bits(x0, x0, Posterior(mean, None, fraction), kernel, t, s, before, levels)
        of_mean, of_fraction = torch.autograd.grad(bits.sum(), (mean, fraction))
        assert bool(torch.isfinite(bits).all())
        assert bool(torch.isfinite(of_fraction).all())
        law = kernel(x0, Posterior(mean.detach(), None, fraction.detach()), t, s, before)
        std = float(law.covariance.diagonal()[0, 0, 0, 0].sqrt())
        # d/dm of -log Phi(-z) is about -z / s at z = (far - 1 / (L - 1)) / s
        expected = -(far - 1 / (levels - 1)) / std**2 / (4 * math.log(2))
        torch.testing.assert_close(of_mean[0], torch.full_like(of_mean[0], expected), rtol=0.01, atol=0)


# ------------------------------------------------------------------------------- targets with known entropy, any kernel


def mixture_gaps(denoiser: Denoiser, kernel: ReverseKernel, grid: Tensor, n: int = 600) -> Tensor:
    """Bound minus -log p(x0) minus the prior's own mismatch, sample by sample, nats: mean >= 0 for any bound."""
    target = mixture8()
    x0 = target.sample(range(n), Independent(11))
    bound = vlb(denoiser, kernel, grid, x0, None, Independent(12))
    clean = CosineVP().at(0.0)
    return bound.total * 8 * LN2 + target.log_prob(x0, clean)


@pytest.mark.parametrize("name", ["trailing", "uniform-logsnr", "optimal"])
@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "pca-diagonal", "dense"])
def test_upper_bound_on_a_mixture(name: str, covariance: Any) -> None:
    """8 dimensions, anisotropic, 6 components: every covariance and grid bounds the entropy, better ones closer."""
    schedule, target = CosineVP(), mixture8()
    if name == "optimal":
        logsnr = torch.linspace(-8, 9, 35, dtype=torch.float64)
        mmse = torch.tensor([target.mmse(schedule.level(v), n=256)[0] for v in logsnr], dtype=torch.float64)
        grid = optimal(CostCurve(logsnr, monotone(mmse[:, None]), 8), schedule, 12).grid
    else:
        grid = make_grid(name, schedule, 12)
    gaps = {}
    for form in (covariance, "isotropic"):
        gap = mixture_gaps(target.denoiser(schedule, form), ReverseKernel(last="decoder"), grid)
        se = float(gap.std()) / math.sqrt(len(gap))
        assert float(gap.mean()) > -3 * se
        gaps[form] = gap
    better = gaps["isotropic"] - gaps[covariance]
    assert covariance == "isotropic" or float(better.mean()) > 3 * float(better.std()) / math.sqrt(len(better))


@pytest.mark.parametrize(("variance", "eta"), [("small", 1.0), ("large", 1.0), ("posterior", 0.6)])
def test_upper_bound_of_other_kernels(variance: Any, eta: float) -> None:
    schedule = CosineVP()
    kernel = ReverseKernel(eta, variance, "decoder")
    gap = mixture_gaps(mixture8().denoiser(schedule, "dense"), kernel, uniform_logsnr(schedule, 20), 300)
    assert float(gap.mean()) > 3 * float(gap.std()) / math.sqrt(len(gap))  # strictly above: none of these is exact


class _Discrete(Denoiser):
    """Independent entries on 17 levels with given probabilities: exact posterior, variance pixel by pixel."""

    def __init__(self, schedule: Schedule, p: Tensor, best: bool = True) -> None:
        self.schedule, self.p, self.best = schedule, p, best
        self.levels = torch.linspace(-1, 1, 17, dtype=torch.float64)

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        from lowvar.process import Diagonal

        distance = (x[..., None] - level.alpha * self.levels) ** 2 / (2 * level.sigma**2)
        w = torch.softmax(torch.log(self.p) - distance, -1)
        mean = w @ self.levels
        variance = (w * (self.levels - mean[..., None]) ** 2).sum(-1)
        # a decoder of variance 0 has no bins; 1e-6 is a hundredth of a bin
        return Posterior(mean, Diagonal(variance.clamp_min(1e-6)) if self.best else Isotropic(0.1, (6,)))


def discrete_data(p: Tensor, n: int) -> Tensor:
    u = Independent(31).uniform(range(n), (6,), dtype=torch.float64)
    return torch.linspace(-1, 1, 17, dtype=torch.float64)[torch.searchsorted(torch.cumsum(p, 0), u).clamp_max(16)]


@pytest.mark.parametrize("skew", [0.0, 0.4])
def test_upper_bound_on_discrete_data(skew: float) -> None:
    """Entropy through the decoder of 17 levels: a bound on any grid, and on a fine one no more than its own noise away.

    The last evaluation is at logsnr 5, where a bin is still 1.5 standard deviations wide: later, the Gaussian decoder
    of an entry that is almost decided loses a few hundredths of a bit.
    """
    p = torch.exp(-skew * torch.arange(17, dtype=torch.float64))
    p = p / p.sum()
    x0, schedule = discrete_data(p, 1000), CosineVP()
    surprise = -torch.log2(p[((x0 + 1) * 8).round().long()]).mean(1)  # -log2 p(x0) a dimension
    assert abs(float(surprise.mean()) + float((p * torch.log2(p)).sum())) < 0.05
    excess = []
    for steps in (4, 12, 100):
        grid = uniform_logsnr(schedule, steps, t_end=float(schedule.time(5.0)))
        bound = vlb(_Discrete(schedule, p), ReverseKernel(last="decoder"), grid, x0, 17, Independent(32))
        excess.append(bound.total - surprise)
        assert float(excess[-1].mean()) > -3 * float(excess[-1].std()) / math.sqrt(1000)
        worse = vlb(_Discrete(schedule, p, best=False), ReverseKernel(last="decoder"), grid, x0, 17, Independent(32))
        assert float(worse.mean) > float(bound.mean) + 0.05
    gain = excess[0] - excess[-1]
    assert float(gain.mean()) > 3 * float(gain.std()) / math.sqrt(1000)
    assert float(excess[-1].mean()) < 0.01 + 3 * float(excess[-1].std()) / math.sqrt(1000)


def test_curve_predicts_every_term() -> None:
    """Table costs are the bound's terms in expectation: decoder and each step within 4 standard errors (mixture)."""
    schedule, target = CosineVP(), mixture8()
    grid = uniform_logsnr(schedule, 7, t_end=float(schedule.time(5.0)))
    logsnr, n = schedule.logsnr(grid[:-1]), 1500
    x0 = target.sample(range(n), Independent(41))
    v = torch.tensor([target.mmse(schedule.level(t), n=20_000)[0] for t in logsnr], dtype=torch.float64)[:, None]
    curve = CostCurve(logsnr, v, 8).ending_with(v, None)
    table = WithCovariance(
        target.denoiser(schedule, None), lambda x, t, _: Isotropic(curve.variance_at(t.logsnr)[0], (8,))
    )
    bound = vlb(table, ReverseKernel(last="decoder"), grid, x0, None, Independent(42))
    terms = torch.cat([bound.kl, bound.decoder[:, None]], 1) * 8 * LN2
    expected = torch.cat([curve.step(logsnr[:-1], logsnr[1:]), curve.ending(logsnr[-1:])])
    se = terms.std(0) / math.sqrt(n)
    assert bool(((terms.mean(0) - expected).abs() < 4 * se + 2e-3 * expected.abs()).all())
    assert float(se.max()) < 0.1
