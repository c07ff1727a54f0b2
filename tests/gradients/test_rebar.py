"""REBAR: direct derivatives enter by the discrete sample alone; eta and lambda are tuned on the variance itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, OneHotCategorical

from lowvar.gradients import REBAR, Expectation, Score, SiteDraw, Sites, second_moment
from lowvar.gradients.distributions import log_prob, natural
from lowvar.gradients.estimator import BaseNoise, SiteRecord, SiteState, zero
from lowvar.gradients.relaxed import conditional, free, hard, relax, relaxed_noise
from lowvar.process import Independent
from lowvar.testing import PROBLEMS, Certificate, QuadratureRule, exact_moments
from lowvar.testing.nodes import noise_nodes

BY_NAME = {problem.name: problem for problem in PROBLEMS}
RULE = QuadratureRule(10, ends="analytic")
FINE = QuadratureRule(24, ends="mild")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Apart(REBAR):
    """z and z~ with noise of their own: unbiased as well, but a decoder's gradient has their difference in it."""

    apart = ("v", "w")

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        return relaxed_noise(d, "REBAR")

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        b, logits = hard(d, noise), natural(d)["logits"]
        z, given = free(d, logits, b, noise["v"]), conditional(d, logits, b, noise["w"])
        values = torch.stack([b, relax(d, z, self.temperature), relax(d, given, self.temperature)])
        return SiteDraw(values, {"log_prob": log_prob(d, b)})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        score = (costs[..., 0, :] - self.eta * costs[..., 2, :]) * zero(record["log_prob"])[..., None]
        return live[..., 0, :] + score + self.eta * (zero(live[..., 1, :]) - zero(live[..., 2, :]))


@pytest.mark.parametrize(
    ("problem", "rule", "tolerance"),
    [
        ("1 bits", QuadratureRule(12, ends="analytic", apart=True), 1e-10),
        ("2 bits", QuadratureRule(10, ends="analytic", apart=True), 1e-10),
        ("one of 3 classes", QuadratureRule(12, ends="mild", apart=True), 1e-4),
    ],
)
def test_direct_derivatives_have_the_variance_of_the_discrete_sample(
    problem: str, rule: QuadratureRule, tolerance: float
) -> None:
    """The same expectation and, for the parameter that costs use directly, the variance of Score: less by a factor."""
    tied, apart, score = (
        exact_moments(BY_NAME[problem].program(e), BY_NAME[problem].theta, rule=rule)
        for e in (REBAR(1.0, 1.0), Apart(1.0, 1.0), Score())
    )
    assert tied.holds(tolerance)
    assert apart.holds(tolerance)
    assert float(tied.variance["direct"]) == pytest.approx(float(score.variance["direct"]), rel=1e-12)
    assert float(tied.variance["direct"]) < 0.65 * float(apart.variance["direct"])
    assert tied.nodes < apart.nodes


@pytest.mark.parametrize("eta", [f64(0.4, 1.3), f64(0.7)[0], 0.0])
def test_a_coefficient_an_element(eta: Any) -> None:
    assert exact_moments(BY_NAME["2 bits"].program(REBAR(eta, 1.0)), BY_NAME["2 bits"].theta, rule=RULE).holds()


def test_no_coefficient_is_the_score_function() -> None:
    rebar, score = (
        exact_moments(BY_NAME["2 bits"].program(e), BY_NAME["2 bits"].theta, rule=RULE) for e in (REBAR(0.0), Score())
    )
    for name, variance in score.variance.items():
        assert torch.allclose(rebar.variance[name], variance, atol=1e-12)


def test_a_coefficient_an_element_of_classes() -> None:
    """Two elements of three classes in one dimension less: the first is certain."""

    def program(theta: Tensor, s: Sites) -> None:
        logits = torch.stack([theta, torch.zeros_like(theta)], -1)  # two elements of two classes
        c = s.sample("c", OneHotCategorical(logits=logits), REBAR(f64(0.6, 1.4), 1.0))
        s.cost("f", torch.cos(c[0] @ f64(0.3, 1.1) + 2 * c[0, 0] * c[1, 1]))

    assert exact_moments(program, f64(0.4, -0.6), rule=QuadratureRule(10, ends="mild")).holds(1e-5)


# ------------------------------------------------------------------------------------------------------------- tuning


def _variance(eta: Tensor, log_lambda: Tensor, problem: str = "2 bits") -> float:
    rule = REBAR(eta.detach(), log_lambda.detach().exp())
    nodes = FINE if problem == "1 bits" else RULE
    found: Certificate = exact_moments(BY_NAME[problem].program(rule), BY_NAME[problem].theta, rule=nodes)
    return sum(float(v.sum()) for v in found.variance.values())


def test_second_moment_has_the_slope_of_the_variance() -> None:
    """The expected slope, over all noise of one bit, against differences of the exact variance."""
    eta, log_lambda = f64(0.8)[0].requires_grad_(), f64(0.1)[0].requires_grad_()
    problem = BY_NAME["1 bits"]
    theta = {name: x.clone().requires_grad_() for name, x in problem.theta.items()}

    def program(theta: Any, s: Sites) -> None:  # its own exp every time: a graph is used once
        problem.program(REBAR(eta, log_lambda.exp()))(theta, s)

    E = Expectation(program)
    state = E.init(theta)
    nodes = noise_nodes(E, theta, state, FINE, ())
    slopes = []
    for i in range(len(nodes.weight)):
        noises = {site: {k: v[i : i + 1] for k, v in own.items()} for site, own in nodes.noises.items()}
        loss = E.evaluate(theta, noises, state).surrogates.mean()
        moment = second_moment(loss, theta.values())
        slopes.append(torch.stack(torch.autograd.grad(moment, (eta, log_lambda))))
    slope = (nodes.weight[:, None] * torch.stack(slopes)).sum(0)
    step = 1e-4
    by_eta = (_variance(eta + step, log_lambda, "1 bits") - _variance(eta - step, log_lambda, "1 bits")) / (2 * step)
    by_lambda = (_variance(eta, log_lambda + step, "1 bits") - _variance(eta, log_lambda - step, "1 bits")) / (2 * step)
    assert float(slope[0]) == pytest.approx(by_eta, rel=1e-6)
    assert float(slope[1]) == pytest.approx(by_lambda, rel=1e-6)


def test_tuning_finds_less_variance_and_leaves_the_parameters_alone() -> None:
    """From eta = 1, lambda = 1/2: 60 steps of 8 samples take 40% off the exact variance of two bits."""
    eta, log_lambda = f64(1.0, 1.0).requires_grad_(), f64(-0.7)[0].requires_grad_()
    problem = BY_NAME["2 bits"]
    theta = {name: x.clone().requires_grad_() for name, x in problem.theta.items()}
    before = _variance(eta, log_lambda)

    def program(theta: Any, s: Sites) -> None:  # its own exp every time: a graph is used once
        problem.program(REBAR(eta, log_lambda.exp()))(theta, s)

    E = Expectation(program, n=8)
    state, optimiser = E.init(theta), torch.optim.Adam([eta, log_lambda], lr=0.1)
    for step in range(60):
        loss, state, _ = E.surrogate(theta, Independent(0), state, step=step)
        optimiser.zero_grad()
        second_moment(loss, theta.values()).backward(inputs=[eta, log_lambda])
        optimiser.step()
    assert _variance(eta, log_lambda) < 0.6 * before
    loss, _, _ = E.surrogate(theta, Independent(0), state, step=99)
    tuned = torch.autograd.grad(loss, (eta, log_lambda), allow_unused=True, retain_graph=True)
    assert all(g is None or float(g.abs().max()) < 1e-14 for g in tuned)  # the surrogate has no slope in them
    loss.backward()
    assert theta["logits"].grad is not None


def test_bad_input() -> None:
    def program(theta: Tensor, s: Sites, rule: REBAR) -> None:
        s.cost("f", s.sample("b", Bernoulli(logits=theta), rule).sum())

    for rule, words in (
        (REBAR(f64(1.0, 2.0, 3.0)), r"eta has shape \(3,\); give a number, or one an element, \(2,\)"),
        (REBAR(1.0, f64(-0.1)[0]), "temperature is -0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            Expectation(lambda th, s, rule=rule: program(th, s, rule)).init(f64(0.0, 0.0))
    with pytest.raises(ValueError, match="the loss has no gradient"):
        second_moment(f64(1.0).sum(), f64(1.0))
