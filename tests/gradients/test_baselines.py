"""Baselines and control variates: exactly unbiased, and as good as theory says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Bernoulli, Normal

from lowvar.gradients import (
    Baseline,
    Constant,
    Expectation,
    Learned,
    LeaveOneOut,
    MovingAverage,
    Optimal,
    Regression,
    Score,
    Sites,
    Taylor,
)
from lowvar.process import Independent
from lowvar.testing import PROBLEMS, Certificate, QuadratureRule, certify, exact_moments

BITS = [p for p in PROBLEMS if p.name in ("1 bits", "2 bits", "two dependent bits", "normal")]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def h(x: Tensor) -> Tensor:
    return torch.stack([x.sum(), (x * x).sum()])


def mean_h(d: Any) -> Tensor:
    return torch.stack([d.mean.sum(), (d.mean**2 + d.variance).sum()])


def like_cost(x: Tensor) -> Tensor:
    return (x**3).sum() + (x.sum() - 0.3) ** 2


@pytest.mark.parametrize(
    ("baseline", "n"),
    [
        (Constant(2.0), 1),
        (LeaveOneOut(), 3),
        (Optimal(), 2),
        (Optimal(), 3),
        (Regression(h, mean_h), 2),
        (Regression(h, mean_h, ridge=0.1), 3),
        (Regression(h, mean_h, coefficient=0.7), 1),
        (Taylor(like_cost), 1),
        (Taylor(like_cost, order=1), 1),
        (Taylor(like_cost, coefficient=None), 3),
        (LeaveOneOut() + Regression(h, mean_h), 3),
        (LeaveOneOut() + Regression(h, mean_h) + Optimal(), 3),
        (Constant(0.4) + Taylor(like_cost) + LeaveOneOut(), 2),
        (Learned(lambda: torch.tensor(0.7, dtype=torch.float64)), 1),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value)),  # the same on every worker
)
def test_unbiased(baseline: Baseline, n: int) -> None:
    problems = [p for p in BITS if not (n == 3 and p.name == "normal")]
    found = certify(Score(baseline), problems, n=n)
    assert len(found) == len(problems)


def _square(baseline: Baseline, n: int = 1) -> Certificate:
    """(x - 3)^2 of a normal number."""
    (problem,) = (p for p in PROBLEMS if p.name == "normal")
    return exact_moments(problem.program(Score(baseline)), problem.theta, n=n, rule=QuadratureRule(normal=20))


def test_taylor_of_the_cost_itself_leaves_no_variance() -> None:
    """f is its own second-order expansion: f - (h - E h) = f(mu) + sigma^2, a constant that a baseline takes away."""
    certificate = _square(Constant((1.3 - 3) ** 2 + 0.49) + Taylor(lambda x: (x - 3) ** 2))
    assert certificate.holds()
    assert float(certificate.variance["mu"]) == pytest.approx(0, abs=1e-12)
    without = _square(Taylor(lambda x: (x - 3) ** 2))
    assert float(without.variance["mu"]) == pytest.approx(((1.3 - 3) ** 2 + 0.49) ** 2 / 0.49)  # a constant times s


def test_regression_on_all_of_the_cost_leaves_nothing() -> None:
    """f linear in x: with h = x and the right coefficient (rho = 1) a constant is left."""

    def program(theta: Tensor, s: Sites) -> None:
        rule = Score(Constant(0.3) + Regression(lambda x: x, lambda d: d.mean, coefficient=2.0))
        x = s.sample("x", Normal(theta, 1.0), rule)
        s.cost("linear", 2 * x + 0.3 - 2 * theta.detach())

    certificate = exact_moments(program, f64(0.6)[0])
    assert certificate.holds()
    assert float(certificate.variance) == pytest.approx(0, abs=1e-12)


def test_optimal_is_better_than_the_mean() -> None:
    """A rare bit: b* = f(1) q + f(0) p of one bit makes the variance 0; the mean does not."""

    def of(baseline: Baseline) -> float:
        def program(theta: Tensor, s: Sites) -> None:
            s.cost("f", 0.4 + 1.7 * s.sample("b", Bernoulli(logits=theta), Score(baseline)))

        certificate = exact_moments(program, f64(-1.5)[0])
        assert certificate.holds()
        return float(certificate.variance)

    p = float(torch.sigmoid(f64(-1.5)[0]))
    assert of(Constant(2.1 * (1 - p) + 0.4 * p)) == pytest.approx(0, abs=1e-12)
    assert of(Constant(0.4 + 1.7 * p)) > 0.05


def test_optimal_baseline_tends_to_its_limit() -> None:
    record = Optimal().record(Bernoulli(logits=f64(-1.5)[0]), f64(1.0)[0], {})
    p = float(torch.sigmoid(f64(-1.5)[0]))
    assert float(record["weight"]) == pytest.approx((1 - p) ** 2)


def test_learned_baseline_learns_and_leaves_theta_alone() -> None:
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def program(theta: Tensor, s: Sites, x: Tensor) -> None:
        rule = Score(Learned(lambda v: weight @ v, theta * x))
        b = s.sample("b", Bernoulli(logits=theta * x), rule)
        s.cost("cost", 3 * x.sum() + b.sum())

    x, theta = f64(0.2, -0.4, 1.0, 0.3).reshape(2, 2), f64(0.5, 0.5).requires_grad_()
    E = Expectation(program, n=2)
    state = E.init(theta, (x,))
    loss, _, info = E.surrogate(theta, Independent(0), state, data=(x,))
    loss.backward(retain_graph=True)
    assert weight.grad is None
    before = theta.grad
    assert before is not None
    kept = before.clone()
    info.auxiliary.backward()
    assert torch.equal(theta.grad if theta.grad is not None else kept, kept)
    assert weight.grad is not None
    by_hand = -2 * (info.values[..., None] * (theta.detach() * x)).mean((0, 1))
    assert torch.allclose(weight.grad, by_hand)


def test_sum_keeps_states_apart() -> None:
    rule = MovingAverage(0.5) + MovingAverage(0.9)
    d = Normal(0.0, 1.0)
    state = rule.updated(rule.start(d), {}, f64(4.0))
    assert float(state["0.mean"]) == pytest.approx(2.0)
    assert float(state["1.mean"]) == pytest.approx(0.4)
    after = rule.updated(state, {}, f64(4.0))
    assert float(rule.subtracted({}, f64(0.0), state).value) == pytest.approx(4 + 4)
    assert float(after["1.mean"]) == pytest.approx(0.9 * 0.4 + 0.1 * 0.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="decay is 1"):
        MovingAverage(1.0)
    with pytest.raises(ValueError, match="ridge"):
        Regression(h, mean_h, ridge=-1.0)
    with pytest.raises(ValueError, match="order is 3"):
        Taylor(like_cost, order=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Optimal is fitted to the other samples"):
        Optimal().subtracted({"weight": f64(1.0)}, f64(1.0), {})


@pytest.mark.parametrize(
    ("baseline", "law", "words"),
    [
        (Optimal(), lambda th: td.LogNormal(th, 1.0), "LogNormal has no parameters of its own whose score"),
        (Taylor(torch.sum), lambda th: td.Cauchy(th, 1.0), "Taylor is nan at a site of Cauchy"),
        (
            Regression(torch.sum, lambda d: d.mean.sum()),
            lambda th: td.TransformedDistribution(Normal(th, 1.0), [td.transforms.TanhTransform()]),
            "asks TransformedDistribution for a mean",
        ),
        (
            Regression(lambda x: x, lambda d: d.mean.sum()),
            lambda th: Normal(th, 1.0),
            r"feature has shape \(2,\) and its mean \(\)",
        ),
        (Learned(lambda: torch.zeros(3)), lambda th: Normal(th, 1.0), r"network of Learned gives shape \(3,\)"),
    ],
    ids=["score", "no mean", "no mean at all", "shapes", "network"],
)
def test_sites_that_a_baseline_does_not_fit(baseline: Baseline, law: Any, words: str) -> None:
    def program(theta: Tensor, s: Sites) -> None:
        s.cost("f", s.sample("x", law(theta), Score(baseline)).sum())

    with pytest.raises(ValueError, match=words):
        Expectation(program, n=2).init(f64(0.3, 0.7))
