"""Costs of reverse steps: the formulas against divergences computed from the kernels, and what grids rest on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lowvar.process import (
    VE,
    CosineVP,
    Denoiser,
    Flow,
    Gaussian,
    Independent,
    Isotropic,
    ReverseKernel,
    Schedule,
    WithCovariance,
)
from lowvar.process.cost import CostCurve, Noise, decoder_nats, monotone, posterior_costs
from lowvar.process.covariance import Covariance, Diagonal
from lowvar.process.grid import karras, make_grid, trailing, uniform, uniform_logsnr
from lowvar.process.kernel import step_coefficients
from lowvar.process.matched import knot_rate, matched
from lowvar.process.matrix import Dense
from lowvar.process.planning import chains, fewest_steps, optimal
from lowvar.process.posterior import Posterior
from lowvar.process.probe import squared_deviation, third_cumulant
from lowvar.sample.likelihood import discretised_log_prob
from lowvar.testing import MixtureTarget, anisotropic_gaussian, mixture2, mixture8

SCHEDULES = [CosineVP(), VE(10.0), Flow()]
LOGSNR = torch.linspace(-8, 10, 73, dtype=torch.float64)


def best_noise(C: Covariance, noise: Noise) -> Covariance:
    """The member of a class that C is replaced by."""
    shape = C.event_shape
    if noise == "small":
        return Isotropic(torch.zeros(1, dtype=torch.float64), shape)
    if noise == "isotropic":
        return Isotropic(C.trace() / C.d, shape)
    return Diagonal(C.diagonal()) if noise == "diagonal" else C


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.family)
@pytest.mark.parametrize("noise", ["small", "isotropic", "diagonal", "full"])
def test_cost_is_the_expected_divergence(schedule: Schedule, noise: Noise) -> None:
    """E KL(N(a x + kappa x0, lambda^2) || N(a x + kappa x0_hat, lambda^2 + kappa^2 V)) over x0 ~ N(x0_hat, C)."""
    target = mixture8()
    t, s = schedule.at(0.6), schedule.at(0.35)
    x = target.noisy(range(5), t)
    posterior = target.posterior(x, t, "dense")
    C = posterior.covariance
    assert C is not None
    c = step_coefficients(t, s)
    p = ReverseKernel()(x, Posterior(posterior.mean, best_noise(C, noise)), t, s)
    q = Gaussian(p.mean, Isotropic(c.lambda2, C.event_shape))
    expected = q.kl(p) + 0.5 * float(c.kappa2) * p.covariance.inverse_trace(C)
    found = posterior_costs(C, (torch.exp(s.logsnr) - torch.exp(t.logsnr))[None], noise)[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_classes_are_ordered() -> None:
    level = CosineVP().at(0.4)
    C = mixture8().posterior(mixture8().noisy(range(50), level), level, "dense").covariance
    assert C is not None
    steps = torch.logspace(-2, 2, 5, dtype=torch.float64)
    costs = [posterior_costs(C, steps, noise) for noise in ("small", "isotropic", "diagonal", "full")]
    assert all(bool((a >= b - 1e-12).all()) for a, b in itertools.pairwise(costs))
    with pytest.raises(ValueError, match="allowed: small, isotropic, diagonal, full"):
        posterior_costs(C, steps, "best")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- curves


def gaussian_curve(noise: str = "table", entries: int = 4) -> CostCurve:
    """Four directions of a Gaussian: v = c / (1 + snr c)."""
    c = torch.tensor([3.0, 1.0, 0.2, 0.01], dtype=torch.float64)
    v = c / (1 + torch.exp(LOGSNR)[:, None] * c)
    v = v if entries == 4 else v.mean(1, keepdim=True)
    return CostCurve(LOGSNR, v, 4, noise)  # type: ignore[arg-type]


def test_curve_reads_tables_as_kernels_do() -> None:
    from lowvar.calibrate import CovarianceTable

    curve = gaussian_curve()
    table = CovarianceTable("pixel", LOGSNR, curve.variance, (4,))
    at = torch.tensor([-30.0, -3.3, 0.01, 9.99, 14.0], dtype=torch.float64)
    torch.testing.assert_close(curve.variance_at(at), table.at(at), rtol=1e-12, atol=0)


def test_information_is_the_integral() -> None:
    """Against a fine trapezium over snr v(logsnr) d logsnr / 2, ends beyond the knots included."""
    curve = gaussian_curve()
    fine = torch.linspace(-25, 13, 200_001, dtype=torch.float64)
    rate = (torch.exp(fine)[:, None] * curve.variance_at(fine)).sum(1) / 2
    total = torch.cumulative_trapezoid(rate, fine)
    at = torch.tensor([20_000, 100_000, 150_000, 199_999])
    torch.testing.assert_close(curve.information(fine[at + 1]), total[at], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("noise", "entries"), [("table", 4), ("table", 1), ("small", 4)])
def test_path_kl_of_a_gaussian(noise: str, entries: int) -> None:
    """In its own basis a Gaussian costs nothing on any path; otherwise what the closed forms say."""
    curve, path = gaussian_curve(noise, entries), LOGSNR[::9]
    snr, c = torch.exp(path), torch.tensor([3.0, 1.0, 0.2, 0.01], dtype=torch.float64)
    v, dsnr = c / (1 + snr[:-1, None] * c), snr.diff()[:, None]
    if noise == "small":
        steps = dsnr * v
    else:
        steps = torch.log1p(dsnr * (v if entries == 4 else v.mean(1, keepdim=True).expand_as(v)))
    expected = 0.5 * (steps.sum() - torch.log((1 + snr[-1] * c) / (1 + snr[0] * c)).sum())
    # between knots 0.25 apart log v is not quite linear in logsnr: 0.1 % of the 4.9 nats of the path
    assert float(curve.path_kl(path)) == pytest.approx(float(expected), abs=6e-3)
    if entries == 4 and noise == "table":
        assert abs(float(expected)) < 1e-12


def test_matrix_holds_every_step() -> None:
    for curve in (gaussian_curve(), gaussian_curve("small"), gaussian_curve(entries=1)):
        at = torch.linspace(-7, 12, 9, dtype=torch.float64)
        matrix = curve.matrix(at)
        for i, j in itertools.product(range(9), range(9)):
            if i < j:
                assert float(matrix[i, j]) == pytest.approx(float(curve.step(at[i], at[j])), rel=1e-12)
            else:
                assert float(matrix[i, j]) == math.inf


def test_table_cost_holds_around_a_wrong_mean() -> None:
    """A mean that is off by b has the residual v = C + b^2 and costs log(1 + dsnr v) / 2 with that variance."""
    C, b, t, s = 0.3, 0.4, CosineVP().at(0.6), CosineVP().at(0.3)
    c = step_coefficients(t, s)
    v, dsnr = C + b**2, float(torch.exp(s.logsnr) - torch.exp(t.logsnr))
    S, l2, k2 = float(c.lambda2 + c.kappa2 * v), float(c.lambda2), float(c.kappa2)
    divergence = 0.5 * (l2 / S - 1 + math.log(S / l2)) + 0.5 * k2 * (C + b**2) / S
    curve = CostCurve(LOGSNR, torch.full((73, 1), v, dtype=torch.float64), 1)
    assert float(curve.step(t.logsnr, s.logsnr)) == pytest.approx(divergence, rel=1e-10)
    assert divergence == pytest.approx(math.log1p(dsnr * v) / 2, rel=1e-10)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_decoder_of_a_gaussian_residual(levels: int) -> None:
    """Against the likelihood's bins, averaged over a fine quadrature of the residual."""
    for std in (1e-3, 0.02, 0.3, 1.0):
        z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
        weight = torch.exp(-(z**2) / 2) / torch.exp(-(z**2) / 2).sum()
        x = torch.zeros_like(z)  # an inner bin
        if levels > 2:
            nats = -(weight * discretised_log_prob(x, std * z, torch.tensor(std), levels)).sum()
            found = decoder_nats(torch.tensor([std**2]), levels)[0]
            assert float(found) == pytest.approx(float(nats), rel=1e-6, abs=1e-9)
    v = torch.tensor([1e-9, 4.0])
    assert bool((decoder_nats(v, None) - decoder_nats(v, 10**7) - math.log(1e7 / 2) < 1e-3)[1])


def test_curve_refuses() -> None:
    v = torch.ones(73, 3)
    for arguments, said in (
        ((LOGSNR.flip(0), v, 3), "increasing"),
        ((LOGSNR, v, 4), "divisor"),
        ((LOGSNR, -v, 3), "not negative"),
        ((LOGSNR, v, 3, "full"), "allowed: small, table"),
        ((LOGSNR, v, 3, "table", torch.ones(3)), "last has shape"),
    ):
        with pytest.raises(ValueError, match=said):
            CostCurve(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="what the last step costs"):
        gaussian_curve().ending(LOGSNR)
    with pytest.raises(ValueError, match="levels is 1"):
        decoder_nats(v, 1)


# ----------------------------------------------------------------------------- mixtures: what the curves stand for


def basis_table(target: MixtureTarget, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """By Monte Carlo over x_t: E C_ii in the principal components, E ||C - diag v||^2, E ||C||^2."""
    schedule, P = CosineVP(), target.twin.basis.matrix()
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for value in LOGSNR:
        level = schedule.level(value)
        C = target.posterior(target.noisy(range(n), level), level, "dense").covariance
        assert C is not None
        rotated = P.mT @ C.dense() @ P
        v = torch.diagonal(rotated, dim1=1, dim2=2).mean(0)
        rows.append((v, ((rotated - torch.diag(v)) ** 2).sum((1, 2)).mean(), (rotated**2).sum((1, 2)).mean()))
    v, off, all_of_it = zip(*rows, strict=True)
    return torch.stack(v), torch.stack(off), torch.stack(all_of_it)


def test_the_table_alone_gives_its_own_R() -> None:
    """sqrt(-M' - sum v^2) from the curve against E ||C - diag v||^2 from the covariances (8 dimensions)."""
    v, off, whole = basis_table(mixture8(), 400)
    snr = torch.exp(LOGSNR)
    for noise, expected in (("table", off), ("small", whole)):
        curve = CostCurve(LOGSNR, monotone(v), 8, noise)  # type: ignore[arg-type]
        rate, exact = knot_rate(curve, curve.noise, LOGSNR), snr * expected.sqrt()
        inner = exact > 0.15 * exact.max()
        assert float(inner.sum()) > 15
        # 400 states: E C_ii is known to about 1 %, its slope to about 10 %
        torch.testing.assert_close(rate[inner], exact[inner], rtol=0.15, atol=0)


def test_R_counts_every_dimension() -> None:
    """One variance for all 8 dimensions: R is E ||C - v I||^2 of the whole matrix, not of one entry."""
    v = basis_table(mixture8(), 400)[0].mean(1)
    i = int((LOGSNR - 1.0).abs().argmin())
    level = CosineVP().level(LOGSNR[i])
    C = mixture8().posterior(mixture8().noisy(range(4000), level), level, "dense").covariance
    assert C is not None
    exact = ((C.dense() - v[i] * torch.eye(8, dtype=torch.float64)) ** 2).sum((1, 2)).mean()
    rate = knot_rate(CostCurve(LOGSNR, monotone(v)[:, None], 8), "table", LOGSNR[i : i + 1])
    assert float(rate) == pytest.approx(float(torch.exp(LOGSNR[i]) * exact.sqrt()), rel=0.1)


def test_full_covariance_costs_the_third_cumulant() -> None:
    """One dimension, by quadrature: E log(1 + dsnr C) / 2 - (1/2) int M d snr = dsnr^3 T / 12 to leading order."""
    target = MixtureTarget(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.01))
    schedule, x = CosineVP(), torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]

    def moments(snr: float) -> tuple[Tensor, Tensor, Tensor]:
        level = schedule.level(math.log(snr))
        weight = torch.exp(target.log_prob(x, level)) * (16 / 4000)
        C = target.posterior(x, level, "isotropic").covariance
        assert C is not None
        one = torch.ones_like(x)
        return weight, C.trace(), third_cumulant(target.denoiser(schedule, None), x, level, one, one)

    start, step = 1.2, 0.02
    weight, C, T = moments(start)
    nodes = [start, start + step / 2, start + step]  # Simpson's rule
    M = [float((w * c).sum()) for w, c, _ in map(moments, nodes)]
    excess = float((weight * torch.log1p(step * C)).sum()) / 2 - step * (M[0] + 4 * M[1] + M[2]) / 12
    assert excess == pytest.approx(step**3 * float((weight * T).sum()) / 12, rel=0.1)


def test_probes_add_up() -> None:
    """Probes along all coordinates sum to the squared norms: which is that normal probes are unbiased."""
    target, schedule = mixture8(), CosineVP()
    level = schedule.at(0.45)
    x = target.noisy(range(1), level)
    eye = torch.eye(8, dtype=torch.float64)
    states = x.repeat(8, 1)
    denoiser = target.denoiser(schedule, None)
    C = target.posterior(x, level, "dense").covariance
    assert C is not None
    found = squared_deviation(denoiser, states, level, eye)[1].sum()
    assert float(found) == pytest.approx(
        float((C.dense() ** 2).sum()), rel=0.03
    )  # a difference quotient over sigma / 64

    table = torch.linspace(0.5, 0.1, 8, dtype=torch.float64)
    attached = _attached(denoiser, table)
    posterior, around = squared_deviation(attached, states, level, eye)
    assert float(around.sum()) == pytest.approx(float(((C.dense()[0] - torch.diag(table)) ** 2).sum()), rel=0.03)
    torch.testing.assert_close(posterior.mean, denoiser(states, level).mean)

    pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    exact = third_cumulant(denoiser, x.repeat(64, 1), level, eye[pairs[:, 0]], eye[pairs[:, 1]]).sum()
    h = 1e-4
    slope = [
        (_dense(target, x + h * e, level) - _dense(target, x - h * e, level)) / (2 * h)
        for e in eye  # kappa_3[., ., e] = (sigma^2 / alpha) d C / d x [e]
    ]
    norm = sum(float((k**2).sum()) for k in slope) * float(level.sigma**2 / level.alpha) ** 2
    assert float(exact) == pytest.approx(norm, rel=1e-5)


def _dense(target: MixtureTarget, x: Tensor, level: object) -> Tensor:
    C = target.posterior(x, level, "dense").covariance  # type: ignore[arg-type]
    assert isinstance(C, Dense)
    return C.dense()[0]


def _attached(denoiser: Denoiser, variance: Tensor) -> Denoiser:
    return WithCovariance(denoiser, lambda x, level, posterior: Diagonal(variance[None]))


# -------------------------------------------------------------------------------------------------------- chosen grids


def test_chains_are_the_cheapest() -> None:
    """Against all chains through 7 candidates with arbitrary costs."""
    L = Independent(4).uniform(range(7), (7,), dtype=torch.float64)
    L = torch.where(torch.ones(7, 7, dtype=torch.bool).triu(1), L, math.inf)
    D = Independent(5).uniform([0], (7,), dtype=torch.float64)[0]
    found = list(chains(L, D))
    assert len(found) == 7
    for K, (cost, path) in enumerate(found, 1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, 7), K - 1)]
        costs = [float(sum(L[a, b] for a, b in itertools.pairwise(p)) + D[p[-1]]) for p in every]
        assert cost == pytest.approx(min(costs), rel=1e-12)
        assert tuple(path) == every[costs.index(min(costs))]


@pytest.fixture(scope="module")
def curves() -> dict[str, CostCurve]:
    v = monotone(basis_table(mixture8(), 300)[0])
    return {
        "isotropic": CostCurve(LOGSNR, v.mean(1, keepdim=True), 8),
        "basis": CostCurve(LOGSNR, v, 8),
        "small": CostCurve(LOGSNR, v.mean(1, keepdim=True), 8, "small"),
    }


@pytest.mark.parametrize("name", ["isotropic", "basis", "small"])
@pytest.mark.parametrize("steps", [5, 12])
def test_chosen_grids_cost_least(curves: dict[str, CostCurve], name: str, steps: int) -> None:
    """Between the same two levels; 6 % of what the best fixed grid costs is left between closed form and optimum."""
    schedule, curve = CosineVP(), curves[name]
    start, end = float(schedule.time(-7.0)), float(schedule.time(8.0))
    optimum = optimal(curve, schedule, steps, start, end)
    closed = curve.grid_kl(schedule, matched(curve, schedule, steps, None, start, end))
    fixed = {
        "logsnr": uniform_logsnr(schedule, steps, start, end),
        "karras": karras(schedule, steps, start, end),
        "uniform": torch.cat([torch.linspace(start, end, steps, dtype=torch.float64), torch.zeros(1).double()]),
    }
    costs = {key: curve.grid_kl(schedule, grid) for key, grid in fixed.items()}
    assert optimum.path_kl * 8 == pytest.approx(curve.grid_kl(schedule, optimum.grid), rel=1e-9)
    assert optimum.path_kl * 8 <= closed * (1 + 1e-3)
    assert closed < optimum.path_kl * 8 + 0.06 * min(costs.values()), costs
    assert closed < 0.9 * min(costs.values())


def test_grids_of_another_kernel_cost_more(curves: dict[str, CostCurve]) -> None:
    """Grid and noise belong together: the isotropic-optimal grid is no good for `small`, and the other way about."""
    schedule = CosineVP()
    for own, other in (("small", "isotropic"), ("isotropic", "small")):
        grid = optimal(curves[other], schedule, 10).grid
        assert curves[own].grid_kl(schedule, grid) > 1.2 * 8 * optimal(curves[own], schedule, 10).path_kl


def test_end_is_where_the_levels_are_decided(curves: dict[str, CostCurve]) -> None:
    """Coarser data end earlier: free of charge, a chain would end between where the posterior's standard deviation is a
    fifth of a level's distance and, for data that a Gaussian decoder describes well, four times it."""
    schedule, ends = CosineVP(), []
    fine = torch.linspace(-8, 10, 1801, dtype=torch.float64)
    for levels in (17, 65, 257):
        curve = curves["basis"].ending_with(curves["basis"].variance, levels)
        free = fine[(curve.information(fine) + curve.ending(fine)).argmin()]
        std = float(curve.variance_at(free).mean().sqrt())
        assert 0.2 < std * (levels - 1) / 2 < 4
        for grid in (optimal(curve, schedule, 30).grid, matched(curve, schedule, 30)):
            assert float(free) - 3 < float(schedule.logsnr(grid[-2])) < float(free) + 0.2
        ends.append(float(schedule.logsnr(grid[-2])))
    assert ends == sorted(ends)
    free = curves["basis"].ending_with(curves["basis"].variance, 17)
    assert free.grid_kl(schedule, optimal(free, schedule, 10).grid) < free.grid_kl(schedule, trailing(schedule, 10))
    for name in ("uniform", "karras", "uniform-logsnr"):
        assert free.grid_kl(schedule, optimal(free, schedule, 10).grid) < free.grid_kl(
            schedule, make_grid(name, schedule, 10)
        )


def test_fewest_steps_is_the_fewest(curves: dict[str, CostCurve]) -> None:
    schedule, curve = CosineVP(), curves["basis"].ending_with(curves["basis"].variance, 65)
    for tol in (0.2, 0.03):
        plan = fewest_steps(curve, schedule, tol)
        assert plan.path_kl <= tol
        assert optimal(curve, schedule, plan.steps - 1).path_kl > tol
        assert curve.grid_kl(schedule, plan.grid) / 8 == pytest.approx(plan.path_kl, rel=1e-9)
    assert fewest_steps(curve, schedule, 1e9).steps == 1
    with pytest.raises(ValueError, match="the least that 8 steps reach"):
        fewest_steps(curve, schedule, 1e-3, most=8)
    with pytest.raises(ValueError, match="above 0"):
        fewest_steps(curve, schedule, -1.0)
    with pytest.raises(ValueError, match="what the last step costs"):
        fewest_steps(curves["basis"], schedule, 0.1)


def test_entropic_takes_equal_information(curves: dict[str, CostCurve]) -> None:
    schedule, curve = CosineVP(), curves["basis"]
    grid = matched(curve, schedule, 9, "entropic", t_end=float(schedule.time(6.0)))
    shares = curve.information(schedule.logsnr(grid[:-1]).clamp_min(-8.0)).diff()
    torch.testing.assert_close(shares, shares.mean().expand(8), rtol=0.02, atol=0)


def test_full_rule_follows_the_third_cumulant() -> None:
    """Mixture in two dimensions, exact C: the grid of T costs the full kernel hardly more than its optimum."""
    target, schedule, n = mixture2(), CosineVP(), 300
    at, P = torch.linspace(-7, 8, 61, dtype=torch.float64), target.twin.basis.matrix()
    snr, cost = torch.exp(at), torch.full((61, 61), math.inf, dtype=torch.float64)
    third, table, M = [], [], []
    z, w = (Independent(k).normal(range(n), (2,), dtype=torch.float64) for k in (1, 2))
    for i, value in enumerate(at):
        level = schedule.level(value)
        x = target.noisy(range(n), level)
        C = target.posterior(x, level, "dense").covariance
        assert C is not None
        M.append(C.trace().mean())
        table.append(torch.diagonal(P.mT @ C.dense() @ P, dim1=1, dim2=2).mean(0))
        third.append(third_cumulant(target.denoiser(schedule, None), x, level, z, w).mean())
        if i < 60:
            cost[i, i + 1 :] = posterior_costs(C, snr[i + 1 :] - snr[i], "full").mean(0)
    least = float(torch.trapezoid(torch.stack(M) * snr, at)) / 2
    curve = CostCurve(at, monotone(torch.stack(table)), 2, third=torch.stack(third))
    last = torch.full((61,), math.inf, dtype=torch.float64)
    last[-1] = 0
    found = chains(cost, last)
    for _ in range(10):
        next(found)
    optimum = next(found)[0] - least
    start, end = (float(schedule.time(v)) for v in (-7.0, 8.0))
    excess = {}
    for rule in ("full", "table", "entropic"):
        times = matched(curve, schedule, 11, rule, start, end)[:-1]  # type: ignore[arg-type]
        path = ((schedule.logsnr(times) + 7) / 0.25).round().long().tolist()
        excess[rule] = float(sum(cost[a, b] for a, b in itertools.pairwise(path))) - least
    assert optimum < excess["full"] < 1.2 * optimum + 0.01
    assert excess["full"] < excess["table"] + 0.005
    assert excess["table"] < 0.6 * excess["entropic"]
    with pytest.raises(ValueError, match="third cumulant"):
        matched(CostCurve(at, monotone(torch.stack(table)), 2), schedule, 5, "full")


def test_gaussian_needs_no_knots_anywhere() -> None:
    """R of a Gaussian in its own basis is 0: the density is at its floor, which is flat."""
    curve = gaussian_curve()
    assert float(knot_rate(curve, "table", LOGSNR).max()) < 0.02 * float(knot_rate(curve, "small", LOGSNR).max())
    target = anisotropic_gaussian((4,))
    level = CosineVP().at(0.5)
    x = target.sample(range(3))
    assert float(third_cumulant(target.denoiser(CosineVP(), None), x, level, x, x).abs().max()) < 1e-20


def test_grids_refuse() -> None:
    schedule, curve = CosineVP(), gaussian_curve()
    with pytest.raises(ValueError, match="steps is 0"):
        optimal(curve, schedule, 0)
    with pytest.raises(ValueError, match="steps is 0"):
        matched(curve, schedule, 0)
    with pytest.raises(ValueError, match="allowed: entropic, small, table, full"):
        matched(curve, schedule, 3, "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must start before it ends"):
        optimal(curve, schedule, 3, t_start=0.2, t_end=0.3)
    assert (
        uniform(schedule, 1).tolist()
        == matched(curve, schedule, 1).tolist()
        == optimal(curve, schedule, 1).grid.tolist()
    )
