"""Designs: what each claims, on cases where the answer is known without sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.expect import ChainSampler, ClassSampler, FunctionSampler, compare, estimate, estimates
from lowvar.expect.catalogue import Catalogue, canonical
from lowvar.expect.coupled import Coarse, block_weights
from lowvar.expect.design import Pooled, allocation
from lowvar.expect.integrand import Integrand
from lowvar.expect.multilevel import fitted_rates, ladder
from lowvar.expect.shadow import _Given
from lowvar.expect.sobol import SobolNoise, bridge_of, net_points
from lowvar.expect.sums import Sums, effective_freedom, fit
from lowvar.metrics import Statistic
from lowvar.process import CosineVP, Independent, MatrixBasis, ReverseKernel
from lowvar.process.grid import trailing
from lowvar.process.kernel import step_coefficients
from lowvar.sample import trajectory
from lowvar.testing import anisotropic_gaussian, rotation
from lowvar.testing.expectations import smooth_map

TARGET, SCHEDULE = anisotropic_gaussian((3,), ratio=25.0), CosineVP()
KERNELS = [ReverseKernel(0.0, "small"), ReverseKernel(1.0, "small"), ReverseKernel(0.5), ReverseKernel(1.0)]


def chain(kernel: ReverseKernel, steps: int = 8) -> ChainSampler:
    denoiser = TARGET.denoiser(SCHEDULE)
    return ChainSampler(denoiser, kernel, trailing(SCHEDULE, steps), (3,), twin=TARGET.twin, dtype=torch.float64)


def first(x: Tensor) -> Tensor:
    return x[:, 0]


def norm(x: Tensor) -> Tensor:
    return x.square().sum(1)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"eta{k.eta}-{k.variance}")
def test_the_shadow_of_gaussian_data_is_the_sample(kernel: ReverseKernel) -> None:
    sampler, index = chain(kernel), torch.arange(6)
    shadow = sampler.shadow
    assert shadow is not None
    torch.testing.assert_close(shadow(index, Independent(1)), sampler(index, Independent(1)), rtol=0, atol=1e-9)
    assert not torch.allclose(shadow(index, Independent(1)), sampler(index, Independent(2)))


def test_antithetic_coordinate_of_a_gaussian_has_no_variance_and_a_norm_is_declined() -> None:
    plain = replace(chain(KERNELS[0]), twin=None)
    found = estimate(plain, first, tol=1e-6, design="antithetic")
    assert found.nfe <= 66 * 8
    assert float(found.se) < 1e-12
    centred = plain(torch.arange(20000), Independent(9)).mean(0)
    found = estimate(plain, lambda x: norm(x - centred), tol=0.5)
    row = next(c for c in found.decision.candidates if c.design == "antithetic")
    assert row.gain < 0.8
    assert "harmful" in row.note
    assert found.design != "antithetic"
    assert "antithetic" in found.decision.sentence


@pytest.mark.parametrize("kernel", KERNELS[1:], ids=lambda k: f"eta{k.eta}-{k.variance}")
def test_coupled_chain_has_the_law_it_has_alone(kernel: ReverseKernel) -> None:
    """Its noise, written as a matrix of the fine chain's unit noises, has orthonormal rows."""
    fine = chain(kernel)
    coarse = fine.coarser
    assert coarse is not None
    assert coarse.lift is not None
    d, K = 3, 8
    given = torch.zeros(K + 1, d * (K + 1), d, dtype=torch.float64)
    for k in range(K + 1):
        given[k, k * d : (k + 1) * d] = torch.eye(d, dtype=torch.float64)
    source, index = coarse.lift(_Given(given)), torch.arange(d * (K + 1))
    rows = torch.cat([source.normal(index, (d,), draw=j, dtype=torch.float64) for j in range(K // 2 + 1)], 1)
    torch.testing.assert_close(rows.T @ rows, torch.eye(d * (K // 2 + 1), dtype=torch.float64), atol=1e-12, rtol=0)


def test_ancestral_weights_are_those_of_the_clock() -> None:
    sampler = chain(ReverseKernel(1.0, "small"))
    levels = SCHEDULE.at(sampler.grid)
    lambdas = [step_coefficients(levels[k], levels[k + 1]) for k in range(8)]
    a = [float(c.a) for c in lambdas[:2]]
    w = torch.tensor([float(lambdas[0].lambda2) ** 0.5 * a[1], float(lambdas[1].lambda2) ** 0.5])
    snr = torch.exp(levels.logsnr[:3])
    clock = torch.sqrt(snr.diff())
    torch.testing.assert_close((w / w.norm()).double(), clock / clock.norm(), atol=1e-6, rtol=0)
    weights = block_weights(torch.tensor([3.0, 4.0]), 2)
    assert float((weights**2).sum()) == pytest.approx(1.0)


def test_wrong_weights_stay_unbiased_but_unnormalised_ones_do_not() -> None:
    """The bug put back: the plain sum of the fine noise has twice the variance."""
    basis, index = MatrixBasis(rotation(3, 2), (3,)), torch.arange(20000)
    right = Coarse(
        Independent(0), block_weights(torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), 2), basis
    )
    wrong = Coarse(Independent(0), torch.ones(4, 3), basis)
    assert float(right.normal(index, (3,), draw=1).var()) == pytest.approx(1, abs=0.03)
    assert float(wrong.normal(index, (3,), draw=1).var()) > 1.8


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_multilevel_rates_match_theory(eta: float) -> None:
    """Exact: coupled Gaussian chains are affine, so means and variances of differences are sums over gains."""
    sampler = chain(ReverseKernel(eta, "small"), 256)
    levels = ladder(sampler, 8)
    d = 3
    means, variances = [], []
    draws = sampler.draws
    given = torch.zeros(draws + 1, d * (draws + 1) + 1, d, dtype=torch.float64)
    for k in range(draws + 1):
        given[k, k * d : (k + 1) * d] = torch.eye(d, dtype=torch.float64)
    source, index = _Given(given), torch.arange(d * (draws + 1) + 1)
    maps = []
    for level in levels:
        x = level(index, source)[:, 0]
        maps.append((x[:-1] - x[-1], x[-1]))
    for (g0, b0), (g1, b1) in pairwise(maps):
        variances.append(float(((g1 - g0) ** 2).sum()))
        means.append(float((g1**2).sum() + b1**2 - (g0**2).sum() - b0**2))  # of the square
    rates = fitted_rates(means[-3:], variances[-3:], [float(s.nfe) for s in levels[-3:]])
    assert rates.alpha == pytest.approx(1, abs=0.2)  # at 256 steps it is still on its way
    if eta == 0:
        assert rates.beta == pytest.approx(2, abs=0.3)
    assert rates.beta > 1.3  # noise: 1.45 here, of the asymptotic 2
    assert rates.gamma == pytest.approx(1, abs=1e-9)


def test_telescoping_sum_is_the_finest_mean() -> None:
    """On one common noise the differences telescope sample by sample."""
    levels, index = ladder(chain(ReverseKernel(1.0), 8)), torch.arange(5)
    values = [level(index, Independent(3)) for level in levels]
    total = values[0] + sum((b - a for a, b in pairwise(values)), torch.zeros(5, 3))
    torch.testing.assert_close(total, chain(ReverseKernel(1.0), 8)(index, Independent(3)), atol=1e-12, rtol=0)


def test_allocation_is_the_optimum() -> None:
    v, c = [3.0, 0.5, 0.02], [1.0, 3.0, 6.0]
    n = allocation(v, c, variance=0.01)
    cost = sum(a * b for a, b in zip(n, c, strict=True))
    assert sum(a / b for a, b in zip(v, n, strict=True)) == pytest.approx(0.01)
    for k in range(3):
        m = [x * (1.1 if j == k else 1.0) for j, x in enumerate(n)]
        scale = sum(a / b for a, b in zip(v, m, strict=True)) / 0.01
        assert scale * sum(a * b for a, b in zip(m, c, strict=True)) > cost


@pytest.mark.slow
def test_multilevel_run_allocates_and_its_cost_falls_as_the_square() -> None:
    costs = []
    for tol in (0.1, 0.05, 0.025):
        *_, last = estimates(chain(KERNELS[0], 64), norm, tol=tol, design="multilevel", batch_size=4096)
        costs.append(last.nfe)
    assert 3 < costs[1] / costs[0] < 5
    assert 3 < costs[2] / costs[1] < 5
    plain = estimate(replace(chain(KERNELS[0], 64), twin=None), norm, tol=0.1, design="independent", batch_size=4096)
    assert costs[0] < plain.nfe / 3


def test_points_never_reach_the_ends_and_nets_are_nets() -> None:
    u = net_points(Independent(7), torch.arange(50), 256, 20)
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert bool(torch.isfinite(torch.special.ndtri(u)).all())
    assert bool(((256 * u[3]).long().sort(0).values == torch.arange(256)[:, None]).all())
    assert not torch.equal(u[0], u[1])
    with pytest.raises(ValueError, match="direction numbers reach"):
        net_points(Independent(0), torch.arange(1), 8, 30000)


@pytest.mark.parametrize("draws", [0, 5])
def test_nets_keep_every_noise_standard_normal(draws: int) -> None:
    shape = torch.Size((3, 12, 12))  # 432 numbers: more than are covered
    source = SobolNoise(Independent(0), 16, bridge_of(shape, draws, None))
    z = torch.stack([source.normal(torch.arange(1024), shape, draw=k).flatten(1)[:, :40] for k in range(draws + 1)], 1)
    z = z.flatten(1)
    cov = z.T @ z / len(z)
    assert float((cov - torch.eye(len(cov))).abs().max()) < 0.2
    assert float(z.mean(0).abs().max()) < 0.15
    again = source.normal(torch.tensor([17, 3]), shape, draw=draws)
    torch.testing.assert_close(again, source.normal(torch.arange(20), shape, draw=draws)[[17, 3]])


def test_sums_add_and_do_not_depend_on_batches() -> None:
    z = Independent(0).normal(range(96), (2,), dtype=torch.float64)
    f, h = 100 + z[:, :1] ** 3, z[:, :1, None]
    whole = Sums.of(f, h, torch.arange(48), 2)
    parts = Sums.of(f[:20], h[:20], torch.arange(10), 2) + Sums.of(f[20:], h[20:], torch.arange(10, 48), 2)
    a, b = fit(whole), fit(parts)
    torch.testing.assert_close(a.mean, b.mean)
    torch.testing.assert_close(a.variance, b.variance)
    torch.testing.assert_close(whole.variance, parts.variance)
    torch.testing.assert_close(whole.variance, f.var(0))
    torch.testing.assert_close(whole.of_control(0).variance, parts.of_control(0).variance)


def test_batches_and_resuming_change_nothing() -> None:
    sampler = replace(smooth_map(), surrogate=None)
    runs = [list(estimates(sampler, norm, budget=3000, batch_size=size)) for size in (64, 128)]
    records = runs[0]
    whole = records[-1].estimate
    assert whole is not None
    assert len(runs[1]) < len(records)
    middle = records[len(records) // 2]
    *_, last = estimates(sampler, norm, budget=3000, batch_size=64, state=middle.state)
    assert last.estimate is not None
    assert last.nfe == records[-1].nfe
    torch.testing.assert_close(last.estimate.value, whole.value, rtol=1e-12, atol=0)
    assert last.estimate.decision.sentence == whole.decision.sentence
    others: list[tuple[dict[str, Any], str]] = [
        ({"design": "independent"}, "design 'auto', now it is 'independent'"),
        ({"name": "size"}, "statistic 'norm', now it is 'size'"),
        ({"norm": "rms"}, "norm 'max', now it is 'rms'"),
    ]
    for other, words in others:
        with pytest.raises(UserError, match=words):
            next(estimates(sampler, norm, budget=3000, state=middle.state, **other))
    with pytest.raises(UserError, match="evaluations a sample 8, now it is 1"):
        next(estimates(plain(), norm, budget=3000, state=middle.state))


def test_images_and_vectors() -> None:
    found = estimate(smooth_map(), lambda x: x.reshape(-1, 1, 2), tol=0.1, norm="rms")
    assert found.value.shape == found.se.shape == (1, 2)
    assert found.half_width <= 0.1
    assert bool((found.low < found.high).all())


def test_strata_remove_what_is_between_classes() -> None:
    def at(c: float) -> FunctionSampler:
        return FunctionSampler(lambda index, noise: c + noise.normal(index, (1,), dtype=torch.float64), (1,))

    both = ClassSampler(((0.3, at(-5.0)), (0.7, at(5.0))))
    found = estimate(both, first, tol=0.1, design="stratified")
    assert float(found.low) < 2.0 < float(found.high)
    assert 12 < found.vrf < 45  # 1 + 0.3 * 0.7 * 100 = 22
    assert estimate(both, first, tol=0.1).design in ("stratified", "antithetic", "sobol")


def test_single_term_is_unbiased_and_declares_itself() -> None:
    found = estimate(smooth_map(), norm, budget=40000, design="single-term")
    truth = estimate(smooth_map(), norm, budget=400000, design="independent", batch_size=4096)
    assert found.undercovers is not None
    assert abs(float(found.value - truth.value)) < 4 * float(found.se + truth.se)
    for budget in range(350, 450, 20):  # units cost 1 to 12 evaluations, and none passes the budget
        assert budget - 12 < estimate(smooth_map(), norm, budget=budget, design="single-term").nfe <= budget


def test_an_indicator_is_kept_from_multilevel() -> None:
    sampler = replace(chain(KERNELS[0]), twin=None)
    found = estimate(sampler, lambda x: x[:, 0] > 0.3, tol=0.03)
    row = next(c for c in found.decision.candidates if c.design == "multilevel")
    assert row.note.startswith("declined")
    assert found.undercovers is None


def test_common_noise() -> None:
    a, b = chain(KERNELS[0], 8), chain(KERNELS[0], 16)
    found = compare(b, a, norm, tol=0.05)
    assert found.factor > 50
    assert found.verdict == "ahead"
    torch.testing.assert_close(found.value_a - found.value_b, found.difference.value, atol=0.05, rtol=0)


BAD = [
    (lambda x: x[:, 0] / 0, {"tol": 0.1}, "must be finite"),
    (lambda x: x.mean(), {"tol": 0.1}, "one value a sample"),
    (lambda x: x[:, 0] + torch.rand(len(x)), {"tol": 0.1}, "random itself"),
    (first, {"tol": 0.0}, "tol is 0"),
    (first, {}, "neither tol nor budget"),
    (first, {"budget": 100}, "pilot of 64"),
    (first, {"tol": 0.1, "design": "magic"}, "parts of it"),
    (first, {"tol": 0.1, "design": "sobol+antithetic"}, "cannot be combined"),
    (first, {"tol": 0.1, "design": "stratified"}, "ClassSampler"),
    (first, {"tol": 0.1, "pilot": 7}, "pilot is 7"),
    (first, {"tol": "0.1"}, "tol is '0.1'; give a number"),
    (first, {"tol": 0.1, "design": None}, "design is None"),
    (first, {"tol": 0.1, "noise": 3}, r"give a NoiseSource, for example Independent\(3\)"),
    ("norm", {"tol": 0.1}, "the statistic is 'norm'; give a function"),
    (lambda x: x[:, :0], {"tol": 0.1}, "give at least one number"),
    (first, {"budget": 20, "design": "independent"}, "an interval"),
]


@pytest.mark.parametrize(("statistic", "arguments", "words"), BAD, ids=[b[2].replace(" ", "-") for b in BAD])
def test_bad_input_is_refused_in_words(statistic, arguments, words: str) -> None:
    with pytest.raises(UserError, match=words):
        estimate(smooth_map(), statistic, **arguments)


def test_a_sampler_has_a_cost() -> None:
    with pytest.raises(UserError, match="the sampler costs 0 evaluations a sample"):
        estimate(plain(nfe=0), first, tol=0.1)
    with pytest.raises(UserError, match="give a ChainSampler, or FunctionSampler"):
        estimate(lambda index, noise: noise.normal(index, (2,)), first, tol=0.1)  # type: ignore[arg-type]


def test_names_of_designs() -> None:
    assert canonical("antithetic + multilevel") == "multilevel+antithetic"
    catalogue = Catalogue(
        FunctionSampler(lambda i, n: n.normal(i, (2,)), (2,)), Integrand(Statistic("x", first), torch.Size(()))
    )
    with pytest.raises(UserError, match="Gaussian twin"):
        catalogue.design("twin")
    with pytest.raises(UserError, match="coarser"):
        catalogue.design("multilevel")


def test_trajectory_and_chain_sampler_agree() -> None:
    sampler, index = chain(KERNELS[3]), torch.arange(4)
    z = Independent(2).normal(index, (3,), draw=0, dtype=torch.float64)
    *_, (state, _) = trajectory(sampler.denoiser, sampler.solver, sampler.grid, z, Independent(2), index)
    torch.testing.assert_close(sampler(index, Independent(2)), state.x)


def plain(d: int = 2, nfe: int = 1) -> FunctionSampler:
    return FunctionSampler(lambda index, noise: noise.normal(index, (d,)), (d,), nfe)


def test_what_was_never_seen_is_not_excluded() -> None:
    """No sample above 5: an indicator's interval has the width of the binomial bound, log(40) / n; others say so."""
    found = estimate(plain(), lambda x: x[:, 0] > 5, tol=0.01)
    assert float(found.value) == 0
    assert 0.005 < found.half_width <= 0.01
    assert found.half_width >= math.log(40) / found.samples
    assert (float(found.low), float(found.high)) == (-found.half_width, found.half_width)
    assert found.undercovers is None
    *records, last = estimates(plain(), lambda x: x[:, 0] > 5, budget=2000)
    assert last.nfe == 2000
    assert len(records) < 20  # whole batches, although no variance says how many are wanted
    assert last.estimate is not None
    n = 2000 - 2 - 192 / 2  # 2 tell the shape, and the 192 of the pilot, in pairs and nets, count half
    assert last.estimate.half_width == pytest.approx(math.log(40) / n)
    found = estimate(plain(), lambda x: (x - 5).relu(), tol=0.01)
    assert found.half_width == 0
    assert found.undercovers == "2 of 2 numbers have one value, and nothing is known of values rarer than 1 in 64"


def test_a_pilot_that_saw_no_rare_value_is_not_exact() -> None:
    """The bug put back: weights 1 / Var by each stream's own variance give a pilot of zeros all the weight."""
    catalogue = Catalogue(plain(), Integrand(Statistic("x", first), torch.Size(())), ())
    pilot, main = catalogue.one("antithetic", ()), catalogue.one("independent", ())
    hits = (torch.arange(192) % 40 == 7).double()[:, None]
    sums = {
        "antithetic": Sums.of(torch.zeros(64, 1), None, torch.arange(32), 2),
        "independent": Sums.of(hits, None, torch.arange(192)),
    }
    found = Pooled(main, (pilot,)).combined(sums)
    assert found is not None
    assert float(found.mean) == pytest.approx(5 / 256, rel=0.1)
    truth = math.erfc(2.33 / 2**0.5) / 2
    runs = [estimate(plain(), lambda x: x[:, 0] > 2.33, tol=0.01, noise=Independent(s)) for s in range(6)]
    assert all(float(e.low) <= truth <= float(e.high) for e in runs)


def test_one_hit_is_one_degree_of_freedom() -> None:
    one = fit(Sums.of((torch.arange(64) == 9).double()[:, None], None, torch.arange(64)))
    assert float(effective_freedom(one.leave_out, one.freedom)) == 1


def test_a_budget_that_ends_with_the_pilot_is_enough_and_declared() -> None:
    """Pairs harm a norm, and nothing is left for another design: the estimate is the pilot's, and says what it is."""
    for budget in (66, 81):
        found = estimate(plain(), norm, budget=budget)
        assert found.design == found.decision.chosen == "antithetic"
        assert "the budget ends before independent samples would have an interval" in found.decision.sentence
        assert found.nfe <= budget
        assert found.undercovers is not None
    assert estimate(plain(), norm, budget=130).undercovers is not None
    assert estimate(plain(), norm, budget=300).undercovers is None


def test_a_statistic_need_not_be_defined_where_only_a_twin_goes() -> None:
    inner = smooth_map()
    sampler = replace(inner, function=lambda index, noise: inner(index, noise).abs() + 0.1, coarser=None)
    plain = estimate(sampler, lambda x: x[:, 0].sqrt(), tol=0.02, design="independent")
    for design in ("auto", "twin", "mixture"):
        found = estimate(sampler, lambda x: x[:, 0].sqrt(), tol=0.02, design=design)
        assert abs(float(found.value - plain.value)) < 3 * float(found.se + plain.se)
    with pytest.raises(UserError, match="must be finite"):
        estimate(replace(sampler, function=inner), lambda x: x[:, 0].sqrt(), tol=0.02)


def test_large_whole_numbers_keep_their_digits() -> None:
    found = estimate(plain(), lambda x: 20_000_001 + (x[:, 0] > 0).long(), tol=0.05)
    assert float(found.value) == 20_000_001.5


def test_a_comparison_checks_its_statistic() -> None:
    for statistic, words in (
        (lambda x: x[:, 0] - x[:, 0].mean(), "must not depend on the other samples"),
        (lambda x: "high", "returned a str"),
        ("high", "give a function of samples"),
    ):
        with pytest.raises(UserError, match=words):
            compare(plain(), plain(), statistic, tol=0.1)  # type: ignore[arg-type]
