"""The certificate itself: against sums written by hand, and against estimators that are wrong."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal

from lowvar.gradients import Enumerate, Expectation, Pathwise, Score, SiteDraw, Sites
from lowvar.gradients.estimator import (
    BaseNoise,
    Estimator,
    GradientLabel,
    OneBranch,
    SiteRecord,
    SiteState,
    Stateless,
    element_sum,
    zero,
)
from lowvar.testing import PROBLEMS, QuadratureRule, certify, exact_gradient, exact_moments
from lowvar.testing.quadrature import hermite, legendre, tanh_sinh


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def cost(b: Tensor, theta: Tensor) -> Tensor:
    return torch.cos(b @ f64(0.4, 1.3, -0.6) + b[0] * b[2]) * (1 + 0.3 * theta[1])


def program(theta: Tensor, s: Sites) -> None:
    s.cost("f", cost(s.sample("b", Bernoulli(logits=theta), Score()), theta))


def test_equals_sums_written_by_hand() -> None:
    theta = f64(0.4, -1.2, 0.9)
    values = f64(*itertools.chain(*itertools.product((0.0, 1.0), repeat=3))).reshape(-1, 3)

    def p(th: Tensor) -> Tensor:
        return torch.exp(Bernoulli(logits=th).log_prob(values).sum(-1))

    f = torch.stack([cost(b, theta) for b in values])
    score = values - torch.sigmoid(theta)
    direct = torch.func.vmap(torch.func.grad(lambda th, b: cost(b, th)), in_dims=(None, 0))(theta, values)
    g = f[:, None] * score + direct
    mean = (p(theta)[:, None] * g).sum(0)
    variance = (p(theta)[:, None] * g**2).sum(0) - mean**2
    truth = torch.func.grad(lambda th: (p(th) * torch.stack([cost(b, th) for b in values])).sum())(theta)
    certificate = exact_moments(program, theta)
    assert torch.allclose(certificate.mean, mean, atol=1e-14)
    assert torch.allclose(certificate.variance, variance, atol=1e-14)
    assert torch.allclose(certificate.truth, truth, atol=1e-14)
    assert torch.allclose(exact_gradient(program, theta), truth, atol=1e-14)
    assert certificate.value == pytest.approx(float((p(theta) * f).sum()), abs=1e-14)
    assert certificate.nodes == 8


def test_variance_of_a_mean_of_n_is_a_share() -> None:
    theta = f64(0.4, -1.2, 0.9)
    one, three = (exact_moments(program, theta, n=n) for n in (1, 3))
    assert torch.allclose(one.variance, 3 * three.variance, atol=1e-12)


def test_data_are_handed_on() -> None:
    def with_data(theta: Tensor, s: Sites, x: Tensor) -> None:
        s.cost("f", (s.sample("z", Normal(theta * x, 1.0), Pathwise()) - 1).square().sum())

    x = f64(2.0, -1.0)
    certificate = exact_moments(with_data, f64(0.3, 0.6), data=(x,))
    assert certificate.holds()
    assert torch.allclose(certificate.mean, 2 * (f64(0.3, 0.6) * x - 1) * x)


class Halved(Score):
    """Wrong: half the score."""

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        return live[..., 0, :] + 0.5 * costs[..., 0, :] * zero(element_sum(record["log_prob"], costs))[..., None]


class Detached(OneBranch, Stateless):
    """Wrong: a sample without any derivative."""

    label = "unbiased"
    source = "none"

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        return {"u": BaseNoise("uniform", d.batch_shape, "constant")}

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        return {"u": (1 - d.mean.detach())[..., None]}

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        return SiteDraw((noise["u"] > 1 - d.mean).to(d.mean.dtype)[None], {})

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        return live[..., 0, :]


@pytest.mark.parametrize("wrong", [Halved(), Detached()])
def test_wrong_estimators_of_a_user_are_caught(wrong: Estimator) -> None:
    with pytest.raises(AssertionError, match="is biased on '1 bits'"):
        certify(wrong)


def test_a_declared_bias_is_measured_not_refused() -> None:
    class Honest(Detached):
        label: GradientLabel = "biased"

    assert certify(Honest(), PROBLEMS[:2])["1 bits"].bias > 0.1


def test_an_estimator_of_nothing_is_refused() -> None:
    class Nothing(Detached):
        def noise(self, d: Distribution) -> dict[str, BaseNoise]:
            raise ValueError("not for me")

    with pytest.raises(ValueError, match="takes none of the problems"):
        certify(Nothing())


def test_quadrature_rules() -> None:
    z, w = hermite(10)
    assert float((w * z**6).sum()) == pytest.approx(15, rel=1e-12)
    for rule, n in ((legendre, 4), (tanh_sinh, 60)):
        u, w = rule(n)
        assert float((w * u**5).sum()) == pytest.approx(1 / 6, rel=1e-10)
    u, w = tanh_sinh(60)
    assert float((w * torch.log(u) ** 2).sum()) == pytest.approx(2, rel=1e-9)


def test_jumps_of_every_branch_are_found() -> None:
    """The second site's probability differs between branches of the first; its noise is split at all of them."""

    def two(theta: Tensor, s: Sites) -> None:
        a = s.sample("a", Bernoulli(logits=theta[0]), Enumerate())
        b = s.sample("b", Bernoulli(logits=theta[1] + 2 * a), Score())
        s.cost("f", torch.cos(a + 2 * b))

    certificate = exact_moments(two, f64(0.3, -0.7), rule=QuadratureRule(4))
    assert certificate.holds()
    assert certificate.nodes == 3
    assert Expectation(two).init(f64(0.3, -0.7)).worlds.full == 2
