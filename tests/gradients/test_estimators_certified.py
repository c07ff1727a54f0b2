"""Every site estimator: exact expectation equal to the true gradient, and the closed-form variances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Bernoulli, Normal

from lowvar.gradients import (
    ARM,
    REBAR,
    Antithetic,
    Constant,
    DiCE,
    DisARM,
    Enumerate,
    Estimator,
    Expectation,
    GumbelSoftmax,
    LeaveOneOut,
    MeasureValued,
    MultiSample,
    Pathwise,
    Score,
    Sites,
    StraightThrough,
)
from lowvar.process import Independent
from lowvar.testing import PROBLEMS, QuadratureRule, certify, exact_moments

BY_NAME = {problem.name: problem for problem in PROBLEMS}
SMALL = [p for p in PROBLEMS if p.name in ("1 bits", "normal, bit, normal", "3 one-hot classes")]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("estimator", "n", "least"),
    [
        (Score(), 1, 14),
        (Score(Constant(1.3)), 1, 14),
        (Score(LeaveOneOut()), 2, 14),
        (DiCE(), 1, 14),
        (DiCE(0.5), 1, 14),
        (Enumerate(), 1, 11),
        (Pathwise(), 1, 2),
        (MultiSample(2), 1, 14),
        (ARM(), 1, 6),
        (DisARM(), 1, 6),
        (Antithetic(ARM()), 1, 6),
        (Antithetic(Score()), 1, 14),
        (Antithetic(Pathwise()), 1, 2),
    ],
    ids=str,
)
def test_unbiased_on_every_problem_it_takes(estimator: Estimator, n: int, least: int) -> None:
    found = certify(estimator, n=n)
    assert len(found) >= least
    for problem in PROBLEMS:
        if problem.name in found:
            assert found[problem.name].value == pytest.approx(_value(problem), abs=1e-10)


def _value(problem: Any) -> float:
    """E cost by enumeration of bits and classes, quadrature of normal numbers; Poisson in closed form."""
    if problem.name == "poisson":
        return 1.7 + 0.8**2
    rule: Any = Pathwise() if problem.name.startswith("normal") and "bit" not in problem.name else Enumerate()
    return exact_moments(problem.program(rule), problem.theta).value


def test_antithetic_of_several_draws() -> None:
    assert len(certify(Antithetic(MultiSample(2)), SMALL)) == 3


def test_measure_valued_is_unbiased_and_needs_no_derivative() -> None:
    wanted = [p for p in PROBLEMS if p.name != "normal pair"]
    assert len(certify(MeasureValued(), wanted)) == 13

    def step(theta: Tensor, s: Sites) -> None:
        x = s.sample("x", Normal(theta[0], theta[1]), MeasureValued())
        s.cost("positive", 1 / (1 + torch.exp(-3 * x.detach())))

    smooth, truth = f64(0.4, 0.8), None
    certificate = exact_moments(step, smooth, truth=_by_differences(smooth), rule=QuadratureRule(smooth=80))
    assert truth is None
    assert certificate.holds(1e-9)


def _by_differences(theta: Tensor) -> Tensor:
    """d E sigmoid(3 x), x ~ N(mu, s^2), by Gauss-Hermite of the derivative."""
    from lowvar.testing.quadrature import hermite

    z, w = hermite(120)
    p = torch.sigmoid(3 * (theta[0] + theta[1] * z))
    slope = 3 * p * (1 - p)
    return torch.stack([(w * slope).sum(), (w * slope * z).sum()])


@pytest.mark.parametrize("estimator", [GumbelSoftmax(0.5), StraightThrough()], ids=str)
def test_biased_estimators_say_so_and_are(estimator: Estimator) -> None:
    assert estimator.label == "biased"
    found = certify(estimator, [BY_NAME["2 bits"], BY_NAME["two dependent bits"]])
    assert found["2 bits"].bias > 0.05

    def program(theta: Tensor, s: Sites) -> None:
        s.cost("c", s.sample("b", Bernoulli(logits=theta), estimator).sum())

    E = Expectation(program)
    assert E.surrogate(f64(0.1, 0.2), Independent(0), E.init(f64(0.1, 0.2)))[2].biased == ("b",)


# ---------------------------------------------------------------------------------- closed-form variances (Bernoulli)

P = 0.3
D = 1.7  # f(1) - f(0), f(b) = 0.4 + D b


def _bernoulli(estimator: Estimator, n: int = 1) -> float:
    def program(theta: Tensor, s: Sites) -> None:
        s.cost("f", 0.4 + D * s.sample("b", Bernoulli(logits=theta), estimator))

    theta = torch.tensor(math.log(P / (1 - P)), dtype=torch.float64)
    certificate = exact_moments(program, theta, n=n)
    assert certificate.holds()
    assert float(certificate.mean) == pytest.approx(D * P * (1 - P), abs=1e-12)
    return float(certificate.variance)


@pytest.mark.parametrize(
    ("estimator", "n", "closed"),
    [
        (ARM(), 1, D**2 * (2 / 3 * (1 / 8 - (max(P, 1 - P) - 0.5) ** 3) - (P * (1 - P)) ** 2)),
        (DisARM(), 1, D**2 * (P * (1 - P) * max(P, 1 - P) / 2 - (P * (1 - P)) ** 2)),
        (Score(LeaveOneOut()), 2, D**2 * (P * (1 - P) / 2 - (P * (1 - P)) ** 2)),
        (MultiSample(2), 1, D**2 * (P * (1 - P) / 2 - (P * (1 - P)) ** 2)),
        (Enumerate(), 1, 0.0),
        (MeasureValued(), 1, 0.0),
    ],
    ids=str,
)
def test_variance_of_one_bit(estimator: Estimator, n: int, closed: float) -> None:
    assert _bernoulli(estimator, n) == pytest.approx(closed, abs=1e-12)


# ------------------------------------------------------------------------------------- closed-form variances (Normal)

MU, SIGMA, K = 1.3, 0.7, 3.0
V, DELTA = SIGMA**2, MU - K


def _normal(estimator: Estimator) -> tuple[float, float]:
    problem = BY_NAME["normal"]
    certificate = exact_moments(problem.program(estimator), problem.theta, rule=QuadratureRule(60))
    assert certificate.holds()
    return float(certificate.variance["mu"]), float(certificate.variance["sigma"])


def test_variance_of_score_on_a_square() -> None:
    mu, sigma = _normal(Score())
    assert mu == pytest.approx(15 * V + 14 * DELTA**2 + DELTA**4 / V, rel=1e-12)
    assert sigma == pytest.approx(74 * V + 60 * DELTA**2 + 2 * DELTA**4 / V, rel=1e-12)


def test_variance_of_pathwise_on_a_square() -> None:
    mu, sigma = _normal(Pathwise())
    assert mu == pytest.approx(4 * V, rel=1e-12)
    assert sigma == pytest.approx(8 * V + 4 * DELTA**2, rel=1e-12)


def test_variance_of_measure_valued_on_a_square() -> None:
    mu, sigma = _normal(MeasureValued())
    assert mu == pytest.approx(16 * DELTA**2 * (2 - math.pi / 2) / (2 * math.pi), rel=1e-9)
    assert sigma > 0


def test_antithetic_is_exact_where_the_derivative_is_odd() -> None:
    mu, sigma = _normal(Antithetic(Pathwise()))
    assert mu == pytest.approx(0, abs=1e-12)  # 2 (x - k) averaged over x and its mirror image
    assert sigma == pytest.approx(8 * V, rel=1e-12)


# --------------------------------------------------------------------------------------------- categorical relaxations


def test_conditional_gumbels_have_the_joint_law() -> None:
    """z given b, averaged over b, is Gumbel around log p; its maximum is at b; 20,000 samples, 5 standard errors."""
    from lowvar.gradients.relaxed import conditional, free

    d = td.OneHotCategorical(logits=f64(0.5, -1.0, 0.2))
    n = 20_000
    source = Independent(0)
    u, v = (source.uniform(range(n), shape, draw=k, dtype=torch.float64) for k, shape in ((0, ()), (1, (3,))))
    b = (u[:, None] > d.probs.cumsum(-1)[:-1]).sum(-1)
    b = torch.nn.functional.one_hot(b, 3).to(torch.float64)
    z = torch.func.vmap(lambda b, v: conditional(d, d.logits, b, v))(b, v)
    assert torch.equal(z.argmax(-1), b.argmax(-1))
    assert torch.equal(z, torch.func.vmap(lambda b, v: free(d, d.logits, b, v))(b, v))
    gumbel = z - torch.log_softmax(d.logits, -1)
    mean, var = 0.5772156649, math.pi**2 / 6
    error = (gumbel.mean(0) - mean).abs() / math.sqrt(var / n)
    assert float(error.max()) < 5
    second = (gumbel**2).mean(0) - (var + mean**2)
    assert float((second.abs() / (gumbel**2).std(0) * math.sqrt(n)).max()) < 5
    cdf = torch.exp(-torch.exp(-gumbel))
    assert float((torch.corrcoef(cdf.T) - torch.eye(3)).abs().max()) < 5 / math.sqrt(n)


def test_errors_name_what_is_allowed() -> None:
    for rule, d, words in (
        (ARM(), Normal(0.0, 1.0), "for Bernoulli sites"),
        (DisARM(), td.Categorical(torch.ones(3)), "for Bernoulli sites"),
        (REBAR(), td.Categorical(torch.ones(3)), "relaxes Bernoulli and OneHotCategorical"),
        (MeasureValued(), td.Gamma(1.0, 1.0), "MeasureValued is for Normal"),
        (StraightThrough(), Normal(0.0, 1.0), "relaxes Bernoulli"),
    ):
        with pytest.raises(ValueError, match=words):
            rule.noise(d)
    with pytest.raises(ValueError, match="no finite list"):
        Enumerate().branches(td.Poisson(1.0))
    with pytest.raises(ValueError, match="4096"):
        Enumerate().branches(Bernoulli(torch.full((13,), 0.5)))
    with pytest.raises(ValueError, match="at least 2"):
        MultiSample(1)
    for make in (REBAR, GumbelSoftmax):
        with pytest.raises(ValueError, match="temperature"):
            make(temperature=0.0)
