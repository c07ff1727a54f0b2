"""REBAR and RELAX on up to four bits, three and five classes, dependent and mixed sites.

Given the discrete values REBAR needs d smooth numbers; RELAX twice that, but its gradient is a sum of a function of v
and one of w, so its exact expectation takes two grids of d numbers instead of one of 2 d. What limits it is the
quadrature: 1e-10 for three bits (in the slow tests for four as well), 1e-6 for three classes, 1e-4 for five (1e-6 in
the slow tests).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import grad

from lowvar.gradients import REBAR, RELAX, Antithetic, Estimator, SiteDraw
from lowvar.gradients.distributions import natural
from lowvar.gradients.estimator import SiteRecord, SiteState, zero
from lowvar.gradients.relaxed import free, hard, relax
from lowvar.testing import PROBLEMS, Certificate, QuadratureRule, certify, exact_moments

BY_NAME = {problem.name: problem for problem in PROBLEMS}


def control(z: Tensor) -> Tensor:
    """A control variate that is no sum over elements, smooth in z and in its tails."""
    soft = torch.sigmoid(z)
    return torch.cos(soft.sum() ** 2) + soft.prod()


def certificate(problem: str, estimator: Estimator, rule: QuadratureRule, n: int = 1) -> Certificate:
    return exact_moments(BY_NAME[problem].program(estimator), BY_NAME[problem].theta, n=n, rule=rule)


def bits(nodes: int) -> QuadratureRule:
    return QuadratureRule(nodes, ends="analytic", apart=True)


def lattice(points: int) -> QuadratureRule:
    return QuadratureRule(lattice=points, apart=True)


THREE = QuadratureRule(16, ends="mild", apart=True)
ESTIMATORS = [REBAR(0.7, 1.0), RELAX(control)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["REBAR", "RELAX"])
@pytest.mark.parametrize(
    ("problem", "rule", "tolerance"),
    [
        pytest.param("1 bits", bits(12), 1e-10, id="1 bit"),
        pytest.param("2 bits", bits(12), 1e-10, id="2 bits"),
        pytest.param("3 bits", bits(11), 1e-10, id="3 bits"),
        pytest.param("4 bits", bits(6), 1e-4, id="4 bits, coarse"),
        pytest.param("two dependent bits", bits(12), 1e-10, id="dependent"),
        pytest.param("normal, bit, normal", bits(12), 1e-10, id="mixed"),
        pytest.param("one of 3 classes", THREE, 1e-6, id="3 classes"),
        pytest.param("one of 5 classes", lattice(4093), 1e-4, id="5 classes, coarse"),
        pytest.param("4 bits", bits(12), 1e-10, id="4 bits", marks=pytest.mark.slow),
        pytest.param("one of 5 classes", lattice(131071), 1e-6, id="5 classes", marks=pytest.mark.slow),
        pytest.param("3 one-hot classes", lattice(32749), 1e-4, id="two elements of 3", marks=pytest.mark.slow),
    ],
)
def test_relaxed_sites_are_unbiased(estimator: Estimator, problem: str, rule: QuadratureRule, tolerance: float) -> None:
    assert certificate(problem, estimator, rule).holds(tolerance)


@pytest.mark.parametrize(("temperature", "ends", "tolerance"), [(0.5, "analytic", 1e-10), (0.7, "mild", 1e-7)])
def test_other_temperatures(temperature: float, ends: Any, tolerance: float) -> None:
    """1 / 0.7 is no whole number: the integrand has a power in its tails, and the rule's ends are smoothed."""
    rule = QuadratureRule(16, ends=ends, apart=True)
    assert certificate("2 bits", REBAR(1.0, temperature), rule).holds(tolerance)


@pytest.mark.parametrize("problem", ["1 bits", "2 bits", "normal, bit, normal"])
@pytest.mark.parametrize("estimator", [RELAX(control), Antithetic(RELAX(control))], ids=["RELAX", "Antithetic"])
def test_part_by_part_equals_the_product(problem: str, estimator: Estimator) -> None:
    """Mean and variance, with a site before it, one after it, and none."""
    parts = certificate(problem, estimator, QuadratureRule(6, 4, ends="analytic", apart=True))
    product = certificate(problem, estimator, QuadratureRule(6, 4, ends="analytic"))
    assert parts.nodes < 0.6 * product.nodes
    for name, mean in product.mean.items():
        assert torch.allclose(parts.mean[name], mean, atol=1e-12)
        assert torch.allclose(parts.variance[name], product.variance[name], atol=1e-12)


def test_two_samples_part_by_part() -> None:
    """The variance of a mean of two samples is half that of one, and both are found."""
    one, two = (certificate("2 bits", RELAX(control), bits(10), n=n) for n in (1, 2))
    for name, variance in one.variance.items():
        assert torch.allclose(two.mean[name], one.mean[name], atol=1e-12)
        assert torch.allclose(two.variance[name], variance / 2, atol=1e-12)


def test_variance_is_not_given_where_it_is_not_known() -> None:
    found = certificate("two dependent bits", RELAX(control), bits(4))
    assert all(bool(x.isnan().all()) for x in found.variance.values())


@pytest.mark.parametrize(
    ("estimator", "left_out"), [(REBAR(0.7, 1.0), []), (RELAX(control), ["4 bits"])], ids=["REBAR", "RELAX"]
)
def test_certify_takes_relaxed_sites(estimator: Estimator, left_out: list[str]) -> None:
    asked = ["2 bits", "4 bits", "one of 3 classes"]
    found = certify(estimator, [BY_NAME[name] for name in asked], max_nodes=60_000)
    assert [name for name in asked if name not in found] == left_out  # four bits need more nodes than that
    assert found["one of 3 classes"].bias < 1e-5
    assert 0 < found["one of 3 classes"].error < 1e-4


# -------------------------------------------------------------------------------------- bugs put back on these problems


class DroppedCondition(RELAX):
    """z~ is differentiated as if it did not depend on the logits."""

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        right = super().draw(d, noise, state)
        b, logits = hard(d, noise), natural(d)["logits"]
        slope = grad(lambda phi: self.control(free(d, phi, b, noise["v"])).sum())(logits.detach())
        return SiteDraw(right.values, {**right.record, "term": (slope.detach() * zero(logits)).sum()})


class DroppedREBAR(REBAR):
    """REBAR with the same bug."""

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        right = super().draw(d, noise, state)
        z = free(d, natural(d)["logits"], hard(d, noise), noise["v"])
        relaxed = relax(d, z.detach() + self.eta * zero(z), self.temperature)
        return SiteDraw(torch.stack([right.values[0], relaxed, right.values[2]]), right.record)


class Mixing(RELAX):
    """One control variate for all n samples: the mean of theirs."""

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        mixed = {**record, "control": record["control"].mean(0, keepdim=True).expand_as(record["control"])}
        return super().surrogate(mixed, live, costs, state)


CASES = [
    pytest.param("3 bits", bits(6), id="3 bits"),
    pytest.param("4 bits", bits(5), id="4 bits"),
    pytest.param("two dependent bits", bits(8), id="dependent"),
    pytest.param("one of 3 classes", QuadratureRule(10, ends="mild", apart=True), id="3 classes"),
    pytest.param("one of 5 classes", lattice(2039), id="5 classes"),
]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [(RELAX(control), DroppedCondition(control)), (REBAR(0.7, 1.0), DroppedREBAR(0.7, 1.0))],
    ids=["RELAX", "REBAR"],
)
@pytest.mark.parametrize(("problem", "rule"), CASES)
def test_dropped_derivative_of_the_conditional_sample(
    right: Estimator, wrong: Estimator, problem: str, rule: QuadratureRule
) -> None:
    bias = certificate(problem, right, rule).bias
    assert certificate(problem, wrong, rule).bias > max(20 * bias, 2e-3)


@pytest.mark.parametrize(
    ("problem", "rule"),
    [
        pytest.param("2 bits", bits(5), id="2 bits"),
        pytest.param("one of 3 classes", QuadratureRule(6, ends="mild", apart=True), id="3 classes"),
    ],
)
def test_mixing_samples(problem: str, rule: QuadratureRule) -> None:
    """Two samples whose control variates are averaged; with one sample nothing would be seen."""
    right, wrong = (certificate(problem, e, rule, n=2).bias for e in (RELAX(control), Mixing(control)))
    assert wrong > max(20 * right, 2e-3)
    assert certificate(problem, Mixing(control), rule).bias < 20 * right + 1e-9


def test_an_estimator_that_is_no_sum_is_refused() -> None:
    class Product(RELAX):
        """Multiplies what v and w give: unbiased or not, it cannot be integrated part by part."""

        apart: ClassVar[tuple[str, ...]] = ("v", "w")

        def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
            right = super().draw(d, noise, state)
            term = right.record["term"] * right.record["control"].detach()
            return SiteDraw(right.values, {**right.record, "term": term})

    with pytest.raises(ValueError, match=r"site 'b' declares apart = \('v', 'w'\) and its gradient is not a sum"):
        certificate("2 bits", Product(control), bits(4))


def test_bad_rules() -> None:
    with pytest.raises(ValueError, match="ends is 'rough'; allowed: singular, mild, analytic"):
        QuadratureRule(ends="rough")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="smooth is 0"):
        QuadratureRule(0)
