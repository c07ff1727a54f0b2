"""Path moments: the coefficient, the cost of an arrow and the best chain, against direct computation."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from lowvar.calibrate import path_moments
from lowvar.process.noise import Independent
from lowvar.process.path import PathMoments, spread_groups
from lowvar.process.schedule import CosineVP
from lowvar.testing import anisotropic_gaussian, mixture2

L = 8
LOGSNR = torch.linspace(-3.0, 4.0, L, dtype=torch.float64)
VARIANCE = torch.tensor([2.0, 0.1], dtype=torch.float64)


def made() -> tuple[PathMoments, torch.Tensor]:
    """Two groups whose remainders are smooth Gaussian processes, and their roots."""
    a = LOGSNR[:, None] - LOGSNR
    size = torch.exp(-((LOGSNR - 0.5) ** 2) / 8)
    M = torch.stack([size[:, None] * size * torch.exp(-(a**2) / w) for w in (4.0, 1.0)])
    M = M + 1e-9 * torch.eye(L, dtype=torch.float64)
    return PathMoments(LOGSNR, M, VARIANCE, torch.tensor([3.0, 1.0])), torch.linalg.cholesky(M)


def weights() -> torch.Tensor:
    v = 1 + VARIANCE[:, None] * torch.exp(LOGSNR)
    return torch.sqrt((v - 1) / v) * float(LOGSNR[1] - LOGSNR[0]) / 2


def drawn(n: int, seed: int) -> torch.Tensor:
    """Paths of the remainder, (n, G, L)."""
    _, root = made()
    return torch.einsum("gab,ngb->nga", root, Independent(seed).normal(range(n), (2, L), dtype=torch.float64))


def errors_by_sampling(levels: list[int], n: int = 20_000) -> float:
    """Sum over steps of the mean square error of a step, with the paths drawn and regressed on."""
    r, w, total = drawn(n, 1), weights(), 0.0
    ends = [*levels[1:], L]
    parts = [([], 0, levels[0]), *((levels[max(j - 1, 0) : j + 1], a, ends[j]) for j, a in enumerate(levels))]
    for known, low, high in parts:
        left = (w[:, low:high] * r[:, :, low:high]).sum(2)
        for g in range(2):
            if known:
                seen = r[:, g, known]
                left[:, g] -= seen @ torch.linalg.lstsq(seen, left[:, g : g + 1]).solution[:, 0]
        total += float(((left**2).mean(0) / VARIANCE.sqrt() * torch.tensor([0.75, 0.25])).sum())
    return total


def test_the_cost_of_a_chain_is_its_mean_square_error() -> None:
    moments, _ = made()
    for error, levels in list(moments.chosen())[1:5]:
        assert error == pytest.approx(errors_by_sampling(levels), rel=0.04)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_chain_is_the_best_of_all(steps: int) -> None:
    moments, _ = made()
    first, step = moments._arrows

    def price(levels: tuple[int, ...]) -> float:
        nodes = [L, *levels, L]  # no level before the first, the end after the last
        return float(first[levels[0]] + sum(step[nodes[j], nodes[j + 1], nodes[j + 2]] for j in range(len(levels))))

    best = min(combinations(range(L), steps), key=price)
    error, levels = list(moments.chosen())[steps - 1]
    assert tuple(levels) == best
    assert error == pytest.approx(price(best))


def test_the_coefficient_is_a_regression() -> None:
    moments, _ = made()
    r, at = drawn(50_000, 2), LOGSNR[4:5]
    slope = (r[:, :, 2] * r[:, :, 4]).mean(0) / (r[:, :, 2] ** 2).mean(0)
    one = moments.trust(float(LOGSNR[2]), at)
    torch.testing.assert_close(one[0, 0], slope, rtol=0, atol=0.03)
    torch.testing.assert_close(one[0, 0], moments.moments[:, 2, 4] / moments.moments[:, 2, 2])
    middle = moments.trust(float(LOGSNR[2]), (LOGSNR[4:5] + LOGSNR[5:6]) / 2)[0, 0]
    torch.testing.assert_close(middle, moments.trust(float(LOGSNR[2]), LOGSNR[4:6])[0].mean(0))


def test_the_coefficients_of_two_remainders_are_a_regression() -> None:
    moments, _ = made()
    r = drawn(50_000, 3)
    both = moments.trust(float(LOGSNR[3]), LOGSNR[4:6], float(LOGSNR[1]))
    assert both.shape == (2, 2, 2)
    for g in range(2):
        fitted = torch.linalg.lstsq(r[:, g, [3, 1]], r[:, g, 4:6]).solution
        torch.testing.assert_close(both[:, :, g], fitted, rtol=0, atol=0.03)
        exact = torch.linalg.solve(moments.moments[g][[3, 1]][:, [3, 1]], moments.moments[g][[3, 1], 4:6])
        torch.testing.assert_close(both[:, :, g], exact)


def test_a_smooth_remainder_is_extrapolated_and_one_seen_twice_counts_once() -> None:
    """r = xi + eta l: two levels say all of it. At one level, or two of a constant, nothing is divided by 0."""
    line = 1 + LOGSNR[:, None] * LOGSNR
    moments = PathMoments(LOGSNR, line[None], torch.ones(1), torch.ones(1))
    between = [float(LOGSNR[3]) + 0.3, float(LOGSNR[1]) - 0.2]  # no measured levels
    l = LOGSNR[6]
    newest, older = moments.trust(between[0], l[None], between[1])[:, 0, 0].tolist()
    assert newest == pytest.approx((float(l) - between[1]) / (between[0] - between[1]))
    assert newest + older == pytest.approx(1)
    assert list(moments.chosen())[1][0] < 1e-9 + float(moments._arrows[0][0])
    constant = PathMoments(LOGSNR, torch.ones(1, L, L), torch.ones(1), torch.ones(1))
    assert constant.trust(1.0, l[None], -1.0).flatten().tolist() == [1.0, 0.0]
    assert moments.trust(1.0, l[None], 1.0)[1].item() == 0
    nothing = PathMoments(LOGSNR, torch.zeros(1, L, L), torch.ones(1), torch.ones(1))
    assert nothing.trust(1.0, l[None], -1.0).flatten().tolist() == [0.0, 0.0]


def test_a_chain_may_begin_at_pure_noise() -> None:
    moments, _ = made()
    to = torch.tensor([-torch.inf, -20.0, float(LOGSNR[1])], dtype=torch.float64)
    seen = moments.trust(-torch.inf, to)[0]
    torch.testing.assert_close(seen[:2], torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(seen[2], moments.moments[:, 0, 1] / moments.moments[:, 0, 0])


def test_groups_have_similar_variances() -> None:
    variance = torch.exp(12 * torch.rand(300, generator=torch.Generator().manual_seed(0)) - 10)
    groups = spread_groups(variance.reshape(3, 100))
    G = int(groups.max()) + 1
    assert 18 <= G <= 24
    for g in range(G):
        inside = variance[groups == g]
        assert len(inside) > 0
        assert float(inside.max() / inside.min()) < 1.8
        if g + 1 < G:
            assert float(inside.max()) <= float(variance[groups == g + 1].min())


def test_nothing_is_left_of_gaussian_data() -> None:
    target, schedule = anisotropic_gaussian((4,)), CosineVP()
    from lowvar.calibrate import fit_twin

    twin = fit_twin([target.sample(range(50_000), dtype=torch.float64)])
    moments = path_moments(target.denoiser(schedule, None), twin, 16, 12, dtype=torch.float64)
    scale = float(moments.variance.max())
    assert float(moments.moments.diagonal(dim1=1, dim2=2).max()) < 1e-3 * scale


def test_the_grid_has_its_steps_and_ends_at_zero() -> None:
    target, schedule = mixture2(), CosineVP()
    moments = path_moments(target.denoiser(schedule, None), target.twin, 32, 20)
    for K in (1, 3, 20, 50):
        grid = moments.grid(schedule, K)
        assert grid.shape == (K + 1,)
        assert float(grid[-1]) == 0
        assert bool((grid.diff() < 0).all())
    with pytest.raises(ValueError, match="steps is 0"):
        moments.grid(schedule, 0)
