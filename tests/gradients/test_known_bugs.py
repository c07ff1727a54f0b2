"""Bugs that libraries have shipped, built by hand: the certificate catches each, with the bias that theory predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution
from torch.func import grad

from lowvar.gradients import REBAR, RELAX, Enumerate, Expectation, LeaveOneOut, MovingAverage, Score, SiteDraw, Sites
from lowvar.gradients.baselines import Baseline, Recordless, StatelessBaseline, Subtracted
from lowvar.gradients.estimator import Estimator, SiteRecord, SiteState, zero
from lowvar.gradients.relaxed import conditional, free, hard
from lowvar.testing import PROBLEMS, Certificate, QuadratureRule, certify, exact_moments

ONE = [problem for problem in PROBLEMS if problem.name == "1 bits"]
RULE = QuadratureRule(30)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def certified(estimator: Estimator, n: int = 1) -> Certificate:
    """On one bit whose cost is 0.4 + 1.7 b, gradient with respect to its logit."""

    def program(theta: Tensor, s: Sites) -> None:
        s.cost("f", 0.4 + 1.7 * s.sample("b", Bernoulli(logits=theta), estimator))

    return exact_moments(program, torch.tensor(0.8, dtype=torch.float64), n=n, rule=RULE)


def control(z: Tensor) -> Tensor:
    return torch.tanh(0.6 * z + 0.3).prod() + torch.tanh(0.4 * z).sum()


# -------------------------------------------------------------------------------------------------------------- RELAX


class DroppedCondition(RELAX):
    """z~ is differentiated as if it did not depend on the logits (relax#6)."""

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        right = super().draw(d, noise, state)
        assert isinstance(d, Bernoulli)
        b, logits = hard(d, noise), d.logits
        slope = grad(lambda phi: self.control(free(d, phi, b, noise["v"])).sum())(logits.detach())
        return SiteDraw(right.values, {**right.record, "term": (slope.detach() * zero(logits)).sum()})


def test_dropped_derivative_of_the_conditional_sample() -> None:
    assert certified(RELAX(control)).holds()
    wrong = certified(DroppedCondition(control))
    assert not wrong.holds()
    # the bias is E grad c(z~), which the right one subtracts
    d = Bernoulli(logits=torch.tensor(0.8, dtype=torch.float64))

    def term(u: Tensor, w: Tensor) -> Tensor:
        b = (u > 1 - d.probs).to(torch.float64)
        return grad(lambda phi: control(conditional(d, phi, b, w)))(d.logits)

    from lowvar.testing.quadrature import tanh_sinh

    w, weight = tanh_sinh(60)
    parts = [(1 - d.probs, 0.0), (d.probs, 1.0)]
    expected = sum(p * (weight * torch.stack([term(torch.tensor(u), x) for x in w])).sum() for p, u in parts)
    assert isinstance(expected, Tensor)
    assert float(wrong.mean - wrong.truth) == pytest.approx(float(expected), abs=1e-8)
    with pytest.raises(AssertionError, match="biased"):
        certify(DroppedCondition(control), ONE)


class Mixing(RELAX):
    """One control variate for all n samples: the mean of theirs."""

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        mixed = {**record, "control": record["control"].mean(0, keepdim=True).expand_as(record["control"])}
        return super().surrogate(mixed, live, costs, state)


def test_relax_that_mixes_samples() -> None:
    """With one sample it is right, with two it is not: a test at n = 1 only would have passed it."""
    assert certified(RELAX(control), n=1).holds()
    assert certified(Mixing(control), n=1).holds()

    def program(theta: Tensor, s: Sites, rule: Estimator) -> None:
        s.cost("f", 0.4 + 1.7 * s.sample("b", Bernoulli(logits=theta), rule))

    theta, rule = torch.tensor(0.8, dtype=torch.float64), QuadratureRule(7)
    right, wrong = (
        exact_moments(lambda th, s, e=e: program(th, s, e), theta, n=2, rule=rule)
        for e in (RELAX(control), Mixing(control))
    )
    assert right.bias < 2e-3  # 7 nodes a number, four numbers
    assert wrong.bias > 10 * right.bias


class Unrelaxed(REBAR):
    """REBAR whose relaxed branch is detached: grad c(z) is missing."""

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        cut = torch.cat([live[..., :1, :], live[..., 1:2, :].detach(), live[..., 2:, :]], -2)
        return super().surrogate(record, cut, costs, state)


def test_a_detached_branch_of_rebar() -> None:
    assert certified(REBAR(0.8, 0.7)).holds()
    assert certified(Unrelaxed(0.8, 0.7)).bias > 0.01
    with pytest.raises(AssertionError, match="biased"):
        certify(Unrelaxed(0.8, 0.7), ONE)


class Stopped(Enumerate):
    """Enumeration whose branches are detached: what depends on theta directly has no gradient."""

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        return super().surrogate(record, live.detach(), costs, state)


def test_a_detached_branch_of_an_enumeration() -> None:
    certify(Enumerate())
    with pytest.raises(AssertionError, match="Stopped is biased"):
        certify(Stopped())


# ---------------------------------------------------------------------------------------------------------- baselines


class Unchecked(Score):
    """Score that takes any baseline: what the refusals of `init` keep out, measured."""

    def start(self, d: Distribution) -> SiteState:
        return self.baseline.start(d)


@dataclass(frozen=True)
class OwnMean(Recordless, StatelessBaseline):
    """The mean of all samples, the own one included."""

    fits = True

    def subtracted(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        return Subtracted(costs.mean(0, keepdim=True).expand_as(costs), torch.zeros_like(costs))

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        return Subtracted(costs.mean(0, keepdim=True), torch.zeros_like(costs[:1]))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_mean_that_includes_the_sample(n: int) -> None:
    """Scales the gradient by 1 - 1/n."""
    assert certified(Score(LeaveOneOut()), n).holds()
    wrong = certified(Unchecked(OwnMean()), n)
    assert float(wrong.mean / wrong.truth) == pytest.approx(1 - 1 / n, abs=1e-12)
    assert not wrong.holds()


@dataclass(frozen=True)
class Leaking(MovingAverage):
    """A moving average that is updated before it is used."""

    def subtracted(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        return super().subtracted(record, costs, super().updated(state, record, costs))


def test_a_moving_average_that_includes_the_cost() -> None:
    """One sample: scales the gradient by the weight of the past; the right one is unbiased in any state."""
    past = {"mean": f64(0.9)[0], "weight": f64(1.0)[0]}

    def at(rule: MovingAverage) -> Certificate:
        def program(theta: Tensor, s: Sites) -> None:
            s.cost("f", 0.4 + 1.7 * s.sample("b", Bernoulli(logits=theta), Unchecked(rule)))

        theta = torch.tensor(0.8, dtype=torch.float64)
        state = Expectation(program).init(theta)
        state = state.restored({f"b/{k}": v for k, v in past.items()})
        return exact_moments(program, theta, state=state)

    assert at(MovingAverage(0.7)).holds()
    wrong = at(Leaking(0.7))
    assert float(wrong.mean / wrong.truth) == pytest.approx(0.7, abs=1e-12)
    assert not wrong.holds()


@dataclass(frozen=True)
class OwnSample(Recordless, StatelessBaseline):
    """A number that depends on the sample, without the gradient of its mean."""

    fits = False

    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        return {"x": x.sum()}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        return Subtracted(record["x"], torch.zeros_like(record["x"]))


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (OwnMean(), "OwnMean changes with the cost of the sample"),
        (Leaking(0.7), "Leaking changes with the cost of the sample"),
        (LeaveOneOut() + OwnSample(), "OwnSample changes with the sample"),
        (OwnSample(), "OwnSample changes with the sample"),
    ],
    ids=["mean", "average", "sum", "sample"],
)
def test_baselines_that_know_their_own_sample_are_refused(baseline: Baseline, words: str) -> None:
    assert certified(Unchecked(baseline), 2).bias > 0.05
    with pytest.raises(ValueError, match=words):
        certified(Score(baseline), 2)


# ----------------------------------------------------------------------------------------------------------------- KL


class NoDirect(Score):
    """The score of the cost without the cost's own derivative: a KL in closed form gets no gradient."""

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        return super().surrogate(record, live.detach(), costs, state)


def _elbo(estimator: Estimator, detach: bool) -> Certificate:
    """-E log p(x | b) + KL(q || p) of one bit, against its derivative by hand."""
    theta, prior = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)

    def kl(q: Tensor) -> Tensor:
        return q * torch.log(q / prior) + (1 - q) * torch.log((1 - q) / (1 - prior))

    def program(theta: Tensor, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta), estimator)
        s.cost("nll", (b - 0.2) ** 2)
        divergence = kl(torch.sigmoid(theta))
        s.cost("kl", divergence.detach() if detach else divergence, parents=())

    def exact(theta: Tensor) -> Tensor:
        q = torch.sigmoid(theta)
        return q * 0.64 + (1 - q) * 0.04 + kl(q)

    return exact_moments(program, theta, truth=grad(exact)(theta))


def test_kl_without_gradient() -> None:
    assert _elbo(Score(), detach=False).holds()
    assert _elbo(Score(), detach=True).bias > 0.1  # the program's fault: only an independent truth shows it
    with pytest.raises(AssertionError, match="NoDirect is biased"):
        certify(NoDirect())
