"""Control variates: the same expected gradient by enumeration, and the in-sample coefficient caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowvar.gradients import Controlled, ControlState, controlled, lagged
from lowvar.gradients.controlled import _coefficient, _moments
from lowvar.process.noise import Independent

ATOMS = torch.tensor([-1.3, 0.2, 1.7], dtype=torch.float64)  # the values a draw can have
CHANCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
THETA = 0.6


def loss_of(theta: Tensor, z: Tensor) -> Tensor:
    return torch.sin(2 * theta * z) + theta * z**2


def variate_of(theta: Tensor, z: Tensor) -> Tensor:
    """Two variates, of which the second depends on the parameter, (n, 2)."""
    return torch.stack([z, torch.exp(theta * z)], -1)


def mean_of(theta: Tensor) -> Tensor:
    return (CHANCE[:, None] * variate_of(theta, ATOMS)).sum(0)


def expected(estimate: Callable[[Tensor, Tensor], Tensor], n: int) -> tuple[float, float]:
    """Mean and mean gradient of an estimate of batches of n draws, over all batches there are."""
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    value = torch.zeros((), dtype=torch.float64)
    for index in itertools.product(range(len(ATOMS)), repeat=n):
        rows = torch.tensor(index)
        value = value + CHANCE[rows].prod() * estimate(theta, ATOMS[rows])
    (slope,) = torch.autograd.grad(value, theta)
    return float(value.detach()), float(slope)


PLAIN = expected(lambda theta, z: loss_of(theta, z).mean(), 1)


@pytest.mark.parametrize("ridge", [0.0, 0.7])
@pytest.mark.parametrize(("n", "folds"), [(4, 2), (5, 3), (4, torch.tensor([1, 0, 2, 0]))], ids=["2", "3", "own"])
@pytest.mark.parametrize("binned", [False, True])
def test_cross_fitted_is_unbiased(n: int, folds: int | Tensor, ridge: float, binned: bool) -> None:
    def estimate(theta: Tensor, z: Tensor) -> Tensor:
        where = (torch.arange(n) % 2) if binned else None
        return controlled(
            loss_of(theta, z), variate_of(theta, z), mean_of(theta), folds=folds, bins=where, ridge=ridge
        ).mean()

    value, slope = expected(estimate, n)
    assert abs(value - PLAIN[0]) < 1e-9
    assert abs(slope - PLAIN[1]) < 1e-9


def test_lagged_is_unbiased() -> None:
    """Every pair of batches of 2: the second is controlled by what the first says."""

    def estimate(theta: Tensor, z: Tensor) -> Tensor:
        first, second = z[:3], z[3:]
        mean = mean_of(theta)
        _, state = lagged(
            loss_of(theta, first), variate_of(theta, first), mean, ControlState.empty(2, decay=0.8, ridge=0.1)
        )
        return lagged(loss_of(theta, second), variate_of(theta, second), mean, state)[0].mean()

    value, slope = expected(estimate, 5)
    assert abs(value - PLAIN[0]) < 1e-9
    assert abs(slope - PLAIN[1]) < 1e-9


def test_in_sample_coefficient_is_biased() -> None:
    """The known bug: a coefficient that has seen the sample it is applied to."""

    def estimate(theta: Tensor, z: Tensor) -> Tensor:
        loss, d = loss_of(theta, z), variate_of(theta, z) - mean_of(theta)
        beta = _coefficient(_moments(loss, d, torch.zeros(4, dtype=torch.int64), 1), 0.1)[0]
        return (loss - d @ beta).mean()

    value, slope = expected(estimate, 4)
    assert abs(value - PLAIN[0]) > 0.01
    assert abs(slope - PLAIN[1]) > 0.01


def test_mean_without_its_gradient_is_biased() -> None:
    """The other known bug: the variate's mean moves with the parameter, and its gradient is dropped."""

    def estimate(theta: Tensor, z: Tensor) -> Tensor:
        return controlled(loss_of(theta, z), variate_of(theta, z), mean_of(theta).detach(), ridge=0.7).mean()

    value, slope = expected(estimate, 4)
    assert abs(value - PLAIN[0]) < 1e-9
    assert abs(slope - PLAIN[1]) > 0.01


def test_pairs_in_one_fold_stay_unbiased_and_across_folds_do_not() -> None:
    """Draws that come twice: the second half repeats the first."""

    def estimate(folds: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def inner(theta: Tensor, z: Tensor) -> Tensor:
            z = torch.cat([z, z])
            return controlled(loss_of(theta, z), variate_of(theta, z), mean_of(theta), folds=folds).mean()

        return inner

    together = expected(estimate(torch.tensor([0, 0, 1, 1] * 2)), 4)
    apart = expected(estimate(torch.tensor([0] * 4 + [1] * 4)), 4)
    assert abs(together[0] - PLAIN[0]) < 1e-9
    assert abs(together[1] - PLAIN[1]) < 1e-9
    assert abs(apart[0] - PLAIN[0]) > 0.01


# ------------------------------------------------------------------------------------------------------ the coefficient


def test_coefficient_is_least_squares() -> None:
    source = Independent(3)
    d = source.normal(range(50), (3,), dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.5, 0.0], [0.0, 2.0, 0.0], [0.3, 0.0, 1e-4]], dtype=torch.float64
    )
    loss = d @ torch.tensor([1.0, -2.0, 300.0], dtype=torch.float64) + source.normal(
        range(50), (), draw=1, dtype=torch.float64
    )
    state = ControlState.empty(3, ridge=0.0).updated(loss, d, 0.0)
    centred = d - d.mean(0)
    beta = torch.linalg.lstsq(centred, (loss - loss.mean())[:, None]).solution[:, 0]
    assert torch.allclose(state.coefficient()[0], beta, rtol=1e-6)
    residual = loss - d @ beta
    assert float(state.explained()) == pytest.approx(1 - float(residual.var() / loss.var()), abs=1e-9)


def test_coefficients_do_not_depend_on_the_variates_scale() -> None:
    z = Independent(1).normal(range(20), (2,), dtype=torch.float64)
    loss, scale = z.sum(1) ** 2 + z[:, 0], torch.tensor([1e-6, 1e5], dtype=torch.float64)
    one, other = (controlled(loss, z * s, 0.0) for s in (torch.ones(2, dtype=torch.float64), scale))
    assert torch.allclose(one, other, rtol=1e-9)


def test_decay_weighs_batches() -> None:
    z = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    state = ControlState.empty(decay=0.5, ridge=0.0)
    for slope in (1.0, 2.0, 3.0):
        state = state.updated(slope * z, z, 0.0)
    assert float(state.coefficient()) == pytest.approx((0.25 * 1 + 0.5 * 2 + 3) / 1.75, abs=1e-9)


def test_bins_have_their_own_coefficients() -> None:
    z = Independent(2).normal(range(400), (), dtype=torch.float64)
    where = torch.arange(400) % 3
    state = ControlState.empty(n_bins=3).updated((where + 1) * z, z, 0.0, bins=where)
    assert torch.allclose(state.coefficient()[:, 0], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), rtol=0.02)
    left = lagged((where + 1) * z, z, 0.0, state, bins=where)[0]
    assert float(left.var()) < 1e-3 * float(((where + 1) * z).var())


@pytest.mark.parametrize(
    ("variate", "expectation"),
    [
        (torch.ones(6), 1.0),  # does not vary
        (torch.stack([torch.arange(6.0), torch.arange(6.0)], 1), torch.tensor([2.5, 2.5])),  # collinear
        (torch.arange(6.0), torch.full((6,), 2.5)),
    ],
)
def test_degenerate_variates(variate: Tensor, expectation: Tensor | float) -> None:
    loss = torch.arange(6.0) ** 2
    assert bool(torch.isfinite(controlled(loss, variate, expectation, ridge=0.0)).all())
    for alone in (controlled(loss, variate, expectation, folds=1), controlled(loss[:1], variate[:1], 2.5)):
        assert torch.equal(alone, loss[: len(alone)])


def test_what_is_not_finite_stays_outside_the_state() -> None:
    loss, z = torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([-1.0, 0.0, 1.0])
    result, state = lagged(loss, z, 0.0, ControlState.empty())
    assert bool(result[1].isnan())
    assert float(state.moments[0, 0, 0]) == 2


def test_state_is_restored() -> None:
    control = Controlled(2, n_bins=2, decay=0.9)
    z, where = Independent(0).normal(range(12), (2,)), torch.arange(12) // 6
    control(z.sum(1), z, 0.0, bins=where)
    again = Controlled(2, n_bins=2, decay=0.9)
    again.state = again.state.restored(control.state.state())
    assert torch.equal(control(z[:, 0], z, 0.0, bins=where), again(z[:, 0], z, 0.0, bins=where))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda z: controlled(z[:, None], z, 0.0),
        lambda z: controlled(z, z[:3], 0.0),
        lambda z: controlled(z, z, torch.zeros(4, 4)),
        lambda z: controlled(z, z, 0.0, bins=torch.zeros(3, dtype=torch.int64)),
        lambda z: lagged(z, z, 0.0, ControlState.empty(2)),
        lambda z: lagged(z, z, 0.0, ControlState.empty(n_bins=2)),
        lambda z: lagged(z, z, 0.0, ControlState.empty(), bins=torch.zeros(4, dtype=torch.int64)),
        lambda z: ControlState.empty(decay=1.5),
        lambda z: ControlState(torch.zeros(2, 2)),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"give|state|decay|moments"):
        wrong(torch.arange(4.0))
