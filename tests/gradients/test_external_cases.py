"""Cases of other libraries as data: inputs and expected gradients, held exactly instead of within Monte Carlo error.

From optax's former `monte_carlo/stochastic_gradient_estimators_test.py` (removed in 2025; Apache-2.0): x ~ N(mean,
exp(log_scale)^2) in three dimensions; constants; sum x; sum x^2 / 2; sum w x; (sum w x)^2; expected gradients with
respect to mean and log_scale are the ones written there. For cosines its test compares estimators with each other; here
the expected value is E cos(2 sum x) = cos(2 sum mean) exp(-2 sum scale^2), and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.func import grad

from lowvar.gradients import DiCE, Estimator, MeasureValued, MultiSample, Pathwise, Score, Sites
from lowvar.testing import QuadratureRule, exact_moments


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    name: str
    mean: tuple[float, ...]
    log_scale: tuple[float, ...]
    function: Callable[[Tensor], Tensor]
    mean_gradient: tuple[float, ...]
    log_scale_gradient: tuple[float, ...]


def weighted_quadratic(mean: tuple[float, ...], log_scale: tuple[float, ...], w: tuple[float, ...]) -> Case:
    """Expected: 2 w sum(w mean), and 2 w^2 scale^2."""
    total = sum(a * b for a, b in zip(w, mean, strict=True))
    scale2 = torch.exp(2 * f64(*log_scale))
    return Case(
        f"(sum {w} x)^2",
        mean,
        log_scale,
        lambda x: (x * f64(*w)).sum() ** 2,
        tuple(2 * a * total for a in w),
        tuple((2 * f64(*w) ** 2 * scale2).tolist()),
    )


THREE = (1.0, 2.0, 3.0)
FIRST, SECOND = (-1.0, 0.3, -2.0), (0.1, 0.2, 0.1)
CASES = [
    *(
        Case(f"constant {c}", (1.5,) * 3, (0.0,) * 3, lambda x, c=c: 0 * x.sum() + c, (0,) * 3, (0,) * 3)
        for c in (0.1, 0.5, 0.9)
    ),
    *(
        Case(f"sum at {m}", (m,) * 3, (s,) * 3, torch.sum, (1,) * 3, (0,) * 3)
        for m, s in ((0.5, -1.0), (0.7, 0.0), (0.8, 0.1))
    ),
    Case(
        "squares", (1.0,) * 3, (0.3,) * 3, lambda x: x.square().sum() / 2, (1.0,) * 3, (float(torch.exp(f64(0.6))),) * 3
    ),
    *(
        Case(f"sum {w} x", THREE, s, lambda x, w=w: (x * f64(*w)).sum(), w, (0,) * 3)
        for s, w in ((FIRST, (1.0, 1.0, 1.0)), (FIRST, (4.0, 2.0, 3.0)), (SECOND, (10.0, 5.0, 1.0)))
    ),
    weighted_quadratic(THREE, FIRST, (1.0, 1.0, 1.0)),
    weighted_quadratic(THREE, FIRST, (4.0, 2.0, 3.0)),
    weighted_quadratic(THREE, SECOND, (3.0, 5.0, 1.0)),
]


def held(case: Case, estimator: Estimator, rule: QuadratureRule) -> None:
    def program(theta: Mapping[str, Tensor], s: Sites) -> None:
        x = s.sample("x", Normal(theta["mean"], theta["log_scale"].exp()), estimator)
        s.cost("f", case.function(x))

    theta = {"mean": f64(*case.mean), "log_scale": f64(*case.log_scale)}
    truth = {"mean": f64(*case.mean_gradient), "log_scale": f64(*case.log_scale_gradient)}
    assert exact_moments(program, theta, rule=rule, truth=truth).holds()


@pytest.mark.parametrize("estimator", [Pathwise(), Score(), DiCE()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_optax_in_three_dimensions(case: Case, estimator: Estimator) -> None:
    held(case, estimator, QuadratureRule(normal=6))


@pytest.mark.parametrize("estimator", [MeasureValued(), MultiSample(2)], ids=lambda e: type(e).__name__)
def test_optax_in_one_dimension(estimator: Estimator) -> None:
    """The first dimension of the weighted cases, where all estimators can be integrated."""
    for mean, log_scale, w in ((1.0, -1.0, 4.0), (1.0, 0.1, 10.0), (3.0, -2.0, 3.0)):
        held(weighted_quadratic((mean,), (log_scale,), (w,)), estimator, QuadratureRule(60, 6))


def test_optax_cosines() -> None:
    """sum cos x, sum cos 2x and cos sum 2x at mean 1 (and 2), log scale 1 (and -2)."""

    def expected(kind: str, mean: Tensor, log_scale: Tensor) -> Tensor:
        variance = torch.exp(2 * log_scale)
        if kind == "cos x":
            return (torch.cos(mean) * torch.exp(-variance / 2)).sum()
        if kind == "cos 2x":
            return (torch.cos(2 * mean) * torch.exp(-2 * variance)).sum()
        return torch.cos(2 * mean.sum()) * torch.exp(-2 * variance.sum())

    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "cos x": lambda x: torch.cos(x).sum(),
        "cos 2x": lambda x: torch.cos(2 * x).sum(),
        "cos sum 2x": lambda x: torch.cos(2 * x.sum()),
    }
    for kind, mean, log_scale in (
        ("cos x", (1.0,), (1.0,)),
        ("cos 2x", (1.0, 2.0), (1.0, -2.0)),
        ("cos sum 2x", (1.0, 2.0), (1.0, -2.0)),
    ):
        m, s = grad(lambda a, b, kind=kind: expected(kind, a, b), argnums=(0, 1))(f64(*mean), f64(*log_scale))
        case = Case(kind, mean, log_scale, functions[kind], tuple(m.tolist()), tuple(s.tolist()))
        held(case, Pathwise(), QuadratureRule(normal=70))
        if len(mean) == 1:
            held(case, MeasureValued(), QuadratureRule(120))
