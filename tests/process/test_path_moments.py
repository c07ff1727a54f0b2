"""Path moments: the coefficient, the cost of an arrow and the best chain, against direct computation."""

from __future__ import annotations

from itertools import combinations, pairwise

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


def errors_by_sampling(levels: list[int], n: int = 20_000) -> float:
    """Sum over steps of the mean square error of a step, with the paths drawn."""
    moments, root = made()
    z = Independent(1).normal(range(n), (2, L), dtype=torch.float64)
    r, w, total = torch.einsum("gab,ngb->nga", root, z), weights(), 0.0
    ends = [*levels[1:], L]
    parts = [(None, 0, levels[0]), *((a, a, s) for a, s in zip(levels, ends, strict=True))]
    for known, low, high in parts:
        left = r[:, :, low:high]
        if known is not None:
            left = left - moments.kappa[:, known, low:high] * r[:, :, known, None]
        error = (w[:, low:high] * left).sum(2)
        total += float(((error**2).mean(0) / VARIANCE.sqrt() * torch.tensor([0.75, 0.25])).sum())
    return total


def test_the_cost_of_a_chain_is_its_mean_square_error() -> None:
    moments, _ = made()
    for error, levels in list(moments.chosen())[1:5]:
        assert error == pytest.approx(errors_by_sampling(levels), rel=0.04)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_chain_is_the_best_of_all(steps: int) -> None:
    moments, _ = made()
    cost, last = moments._arrows

    def price(levels: tuple[int, ...]) -> float:
        nodes = [0, *(i + 1 for i in levels)]
        return float(sum(cost[i, j] for i, j in pairwise(nodes)) + last[nodes[-1]])

    best = min(combinations(range(L), steps), key=price)
    error, levels = list(moments.chosen())[steps - 1]
    assert tuple(levels) == best
    assert error == pytest.approx(price(best))


def test_the_coefficient_is_a_regression() -> None:
    moments, root = made()
    z = Independent(2).normal(range(50_000), (2, L), dtype=torch.float64)
    r = torch.einsum("gab,ngb->nga", root, z)
    slope = (r[:, :, 2] * r[:, :, 4]).mean(0) / (r[:, :, 2] ** 2).mean(0)
    torch.testing.assert_close(moments.kappa[:, 2, 4], slope, rtol=0, atol=0.03)
    torch.testing.assert_close(moments.trust(float(LOGSNR[2]), LOGSNR[4:5])[0], moments.kappa[:, 2, 4])
    middle = moments.trust(float(LOGSNR[2]), (LOGSNR[4:5] + LOGSNR[5:6]) / 2)[0]
    torch.testing.assert_close(middle, moments.kappa[:, 2, 4:6].mean(1))


def test_a_chain_may_begin_at_pure_noise() -> None:
    moments, _ = made()
    to = torch.tensor([-torch.inf, -20.0, float(LOGSNR[1])], dtype=torch.float64)
    seen = moments.trust(-torch.inf, to)
    torch.testing.assert_close(seen[:2], torch.ones(2, 2, dtype=torch.float64))
    torch.testing.assert_close(seen[2], moments.kappa[:, 0, 1])


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
