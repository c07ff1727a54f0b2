"""Shrinkage of tables: exact posterior of the model it states, and better tables from few images."""

from __future__ import annotations

import math

import pytest
import torch

from lowvar.calibrate import calibrate
from lowvar.calibrate.measurement import default_logsnr
from lowvar.calibrate.shrinkage import RELATIVE_FLOOR, shrink
from lowvar.process import CosineVP, Independent
from lowvar.testing import anisotropic_gaussian

D = 20_000


def _effects(tau: float, errors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """theta, and estimates v_hat of exp(theta) with y = log v_hat + r^2 / 2 exactly N(theta, r^2)."""
    theta = 0.7 + tau * Independent(1).normal([0], (D,), dtype=torch.float64)
    y = theta + errors * Independent(2).normal([0], (D,), dtype=torch.float64)
    v = torch.exp(y - errors**2 / 2)
    return theta, v, errors * v


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_posterior_of_random_effects(tau: float) -> None:
    """Data drawn from the module's own model: the entry has the mean of v given the data (so it standardises fresh
    residuals), and the stated standard deviation is that of log v around it. 20,000 entries: 4 standard errors of the
    mean of exp(N(0, s^2)) are below 0.02 here.
    """
    errors = torch.tensor([0.1, 0.5], dtype=torch.float64).repeat(D // 2)[None]
    theta, v, se = _effects(tau, errors)
    entry, spread = shrink(v, se, torch.ones(1, D))
    for r in (0.1, 0.5):
        mine = errors == r
        ratio = torch.exp(theta)[mine] / entry[mine]
        assert abs(float(ratio.mean()) - 1) < 0.02
        s2 = r**2 * tau**2 / (r**2 + tau**2)
        assert float((spread / entry)[mine].mean()) == pytest.approx(math.sqrt(s2), rel=0.05)
        assert float((torch.log(entry)[mine] - s2 / 2 - theta[mine]).std()) == pytest.approx(math.sqrt(s2), rel=0.05)


def test_equal_entries_are_pooled() -> None:
    """tau = 0: every entry becomes the common value, and its standard deviation all but vanishes."""
    errors = torch.full((1, D), 0.4, dtype=torch.float64)
    _, v, se = _effects(0.0, errors)
    entry, spread = shrink(v, se, torch.ones(1, D))
    assert float((entry / math.exp(0.7) - 1).abs().max()) < 0.05
    assert float(spread.max()) < 0.2 * float(se.mean())


def test_exact_entries_do_not_move() -> None:
    v = torch.tensor([[0.2, 1.0, 7.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    entry, spread = shrink(v, torch.zeros_like(v), torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(entry, v)
    assert float(spread.max()) == 0.0


def test_the_reference_has_no_scale_and_zero_is_not_zero() -> None:
    v = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    se = torch.tensor([[0.0, 0.3, 0.3]], dtype=torch.float64)
    a, b = (shrink(v, se, k * torch.tensor([[0.0, 1.0, 2.0]]))[0] for k in (1.0, 50.0))
    torch.testing.assert_close(a, b)
    assert float(a[0, 0]) == pytest.approx(RELATIVE_FLOOR, rel=0.01)


def test_tables_of_few_images_are_nearer_the_truth() -> None:
    """32 events of an anisotropic Gaussian: pooling at least halves the mean square error of log v against the raw
    moments' own chi-square error 2 / n.
    """
    target = anisotropic_gaussian((1, 4, 4), ratio=100.0, seed=3)
    schedule = CosineVP()
    data = target.sample(range(32), Independent(5))
    knots = default_logsnr(schedule, 7)
    exact = target.twin.denoiser(schedule)
    table = calibrate(
        exact, lambda: [data], twin_batches=lambda: [target.sample(range(4000), Independent(6))], logsnr=knots,
        replicates=1,
    ).table("pixel")  # fmt: skip
    truth = torch.cat([target.twin.posterior(data[:1], schedule.level(k)).covariance.diagonal() for k in knots])  # type: ignore[union-attr]
    error = float(((torch.log(table.variance) - torch.log(truth)) ** 2).mean())
    assert error < 0.5 * 2 / 32
