"""EM for scale mixtures: its objective never falls, one component is exact, known mixtures are found."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lowvar.calibrate.em import FLOOR, Components, em
from lowvar.process.noise import Independent

WEIGHT = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
MEAN = torch.tensor([[3.0, 0.0, 0.0, 1.0], [-3.0, 2.0, 0.5, 0.0], [0.0, -4.0, 0.0, -1.0]], dtype=torch.float64)
VARIANCE = torch.tensor([[1.0, 0.5, 0.1, 0.3], [0.2, 0.4, 1.0, 0.1], [0.3, 1.0, 0.2, 0.5]], dtype=torch.float64)


def _rows(n: int, seed: int = 1, squares: tuple[float, ...] = (1.0,)) -> tuple[Tensor, Tensor]:
    """Rows of the mixture above, each at a scale drawn evenly, and the component of each."""
    u = Independent(seed).uniform(range(n), (2,), dtype=torch.float64)
    z = Independent(seed + 1).normal(range(n), (4,), dtype=torch.float64)
    k = torch.searchsorted(WEIGHT.cumsum(0), u[:, 0].contiguous(), right=True).clamp(max=2)
    g2 = torch.tensor(squares, dtype=torch.float64)[(u[:, 1] * len(squares)).long()]
    return MEAN[k] + (VARIANCE[k] * g2[:, None]).sqrt() * z, k


@pytest.mark.parametrize("squares", [(1.0,), (0.25, 1.0, 4.0)], ids=["plain", "scales"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_likelihood_never_falls(squares: tuple[float, ...], seed: int) -> None:
    """Without the penalty: EM's own law, in float64, from every start, up to rounding."""
    rows, _ = _rows(700, squares=(0.3, 1.0, 3.0))
    values = [c.objective(rows, 0.0) for c in em(rows, 6, squares, a=0.0, iterations=25, seed=seed)]
    assert values[-1] > values[0] + 10
    for before, after in pairwise(values):
        assert after >= before - 1e-9 * abs(before)


@pytest.mark.parametrize("squares", [(1.0,), (0.25, 1.0, 4.0)], ids=["plain", "scales"])
def test_the_penalised_likelihood_never_falls_given_its_target(squares: tuple[float, ...]) -> None:
    rows, _ = _rows(300)
    found = list(em(rows, 12, squares, a=20.0, iterations=15, seed=3))
    assert found[-1].objective(rows, 20.0) > found[0].objective(rows, 20.0) + 10
    for before, after in pairwise(found):
        assert after.objective(rows, 20.0) >= before.objective(rows, 20.0, after.target) - 1e-9


def test_log_joint_is_the_density() -> None:
    rows, _ = _rows(20)
    *_, found = em(rows, 2, (0.5, 2.0), iterations=4)
    for k in range(2):
        for j, square in enumerate((0.5, 2.0)):
            law = torch.distributions.Normal(found.mean[k], (square * found.variance[k]).sqrt())
            expected = law.log_prob(rows).sum(1) + 2 * math.log(2 * math.pi) + found.weight[k, j].log()
            torch.testing.assert_close(found.log_joint(rows)[:, k, j], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("directions", [None, 2])
def test_one_component_has_the_moments_of_the_rows(directions: int | None) -> None:
    """Whatever the penalty: there is nothing to shrink to but itself."""
    rows, _ = _rows(500)
    *_, found = em(rows, 1, directions=directions, a=50.0, iterations=3)
    torch.testing.assert_close(found.mean[0], rows.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.variance[0], rows.var(0, correction=0), rtol=1e-12, atol=0)
    assert found.weight.tolist() == [[1.0]]


def _matched(found: Components) -> list[int]:
    return torch.cdist(MEAN, found.mean).argmin(1).tolist()


def test_a_known_mixture_is_found() -> None:
    """4,000 rows: means within 4 standard errors, log variances too (sqrt(2 / n_k)), weights within 4 of theirs."""
    n = 4000
    rows, k = _rows(n)
    *_, found = em(rows, 3, a=1.0, iterations=60)
    order = _matched(found)
    assert sorted(order) == [0, 1, 2]
    for i, at in enumerate(order):
        count = float((k == i).sum())
        assert float(((found.mean[at] - MEAN[i]).abs() / (VARIANCE[i] / count).sqrt()).max()) < 4
        assert float((found.variance[at] / VARIANCE[i]).log().abs().max()) < 4 * (2 / count) ** 0.5
        assert abs(float(found.weight[at].sum() - WEIGHT[i])) < 4 * (float(WEIGHT[i]) / n) ** 0.5


def test_known_scales_are_found() -> None:
    """Scales 1/4, 1, 4 drawn evenly: each component's weights are a third each, within .05 of it."""
    rows, _ = _rows(8000, squares=(0.25, 1.0, 4.0))
    *_, found = em(rows, 3, (0.25, 1.0, 4.0), a=1.0, iterations=60)
    share = found.weight[_matched(found)] / WEIGHT[:, None]
    torch.testing.assert_close(share, torch.full((3, 3), 1 / 3, dtype=torch.float64), rtol=0, atol=0.06)


def test_other_directions_follow_from_who_belongs_where() -> None:
    """Groups told apart by the first two directions: the rest are the groups' own moments, of rows hard assigned."""
    rows, k = _rows(3000)
    apart = rows.clone()
    apart[:, :2] = 0.01 * rows[:, :2] + 30 * MEAN[k, :2]
    *_, found = em(apart, 3, directions=2, a=0.0, iterations=20, seed=5)
    for i in range(3):
        group = apart[k == i]
        at = int((found.mean[:, :2] - 30 * MEAN[i, :2]).square().sum(1).argmin())
        torch.testing.assert_close(found.mean[at], group.mean(0), rtol=0, atol=1e-9)
        torch.testing.assert_close(found.variance[at, 2:], group.var(0, correction=0)[2:], rtol=1e-9, atol=0)
        assert float(found.variance[at, :2].min()) >= FLOOR


def test_small_components_are_shrunk_at_their_own_scale() -> None:
    """Three scales of one shape, twelve components of about 20 rows in 24 directions: the smallest is found.

    Shrunk to the plain mean of the variances, a component of 20 rows of variance .01 would have at least .5.
    """
    scale = torch.tensor([0.01, 0.2, 5.0], dtype=torch.float64)
    k = (3 * Independent(1).uniform(range(240), (), dtype=torch.float64)).long()
    rows = scale[k, None].sqrt() * Independent(2).normal(range(240), (24,), dtype=torch.float64)
    *_, found = em(rows, 12, iterations=20)
    assert 0.005 < float(found.variance.mean(1).min()) < 0.02


def test_the_seed_decides() -> None:
    rows, _ = _rows(200)
    (*_, one), (*_, same), (*_, other) = (em(rows, 4, iterations=3, seed=s) for s in (7, 7, 8))
    assert torch.equal(one.mean, same.mean)
    assert torch.equal(one.variance, same.variance)
    assert not torch.equal(one.mean, other.mean)


def test_refuses_more_components_than_rows() -> None:
    rows, _ = _rows(5)
    with pytest.raises(ValueError, match="K is 6 for 5 rows"):
        next(em(rows, 6))
