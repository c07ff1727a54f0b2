"""Coefficients a parameter: exactly unbiased, equal to regressions written by hand, and ahead of one for all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from lowvar.gradients import (
    Baseline,
    Constant,
    Expectation,
    LeaveOneOut,
    Optimal,
    PerParameter,
    Regression,
    Score,
    Sites,
    Taylor,
    automatic,
    compare,
    diagnose,
)
from lowvar.gradients.estimator import SiteRecord, SiteState
from lowvar.process import Independent
from lowvar.testing import PROBLEMS, certify, exact_moments
from lowvar.testing.quadrature import hermite

BITS = [p for p in PROBLEMS if p.name in ("1 bits", "2 bits", "two dependent bits")]
NORMAL = [p for p in PROBLEMS if p.name == "normal"]


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def h(x: Tensor) -> Tensor:
    return torch.stack([x.sum(), (x * x).sum()])


def mean_h(d: Any) -> Tensor:
    return torch.stack([d.mean.sum(), (d.mean**2 + d.variance).sum()])


@pytest.mark.parametrize(
    ("baseline", "n", "problems"),
    [
        (PerParameter(), 3, BITS),
        (PerParameter(Regression(h, mean_h)), 3, BITS),
        (LeaveOneOut() + PerParameter(Regression(h, mean_h), ridge=0.2), 3, BITS),
        (PerParameter(Regression(h, mean_h)), 2, NORMAL),
        (Constant(1.0) + PerParameter(Taylor(lambda x: (x**3).sum())), 2, NORMAL),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", str(value))[:60],
)
def test_unbiased(baseline: Baseline, n: int, problems: list[Any]) -> None:
    assert len(certify(Score(baseline), problems, n=n)) == len(problems)


class Own(PerParameter):
    """The known bug: coefficients fitted to all samples, the own one included."""

    def subtracted(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Any:
        b = self.predict({k: x[None] for k, x in record.items()}, record, costs, state)
        return type(b)(b.value[0], b.known[0])


class Forgotten(Regression):
    """The other one: the mean's derivative is left out."""

    def deviation(self, d: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        deviation, mean = super().deviation(d, x)
        return deviation, mean.detach() * 0


def test_bugs_are_caught() -> None:
    with pytest.raises(AssertionError, match="biased"):
        certify(Score(Own()), BITS[:2], n=3)
    with pytest.raises(AssertionError, match="biased"):
        certify(Score(PerParameter(Forgotten(h, mean_h, ridge=0.0), ridge=0.1)), BITS[:2], n=3)


def _left(baseline: Baseline) -> Tensor:
    """(x - 3)^2 of a normal number: variance of d/dmu and d/dsigma over x, with 4,000 others to fit to."""
    mu, sigma = f64(1.3)[0].requires_grad_(), f64(0.7)[0].requires_grad_()
    others = 1.3 + 0.7 * Independent(0).normal(range(4000), (), dtype=torch.float64)
    z, chance = hermite(12)

    def records(x: Tensor) -> dict[str, Tensor]:
        return torch.func.vmap(lambda v: baseline.record(Normal(mu, sigma), v, {}))(x)

    fitted = {k: v.detach()[:, None] for k, v in records(others).items()}
    rows = []
    for x in 1.3 + 0.7 * z:
        own = {k: v[None] for k, v in records(x[None]).items()}
        b = baseline.predict(own, fitted, ((others - 3) ** 2)[:, None], {})
        surrogate = ((x - 3) ** 2 - b.value.detach()).sum() * Normal(mu, sigma).log_prob(x) + b.known.sum()
        rows.append(torch.stack(torch.autograd.grad(surrogate, (mu, sigma))))
    g = torch.stack(rows)
    return (chance[:, None] * (g - (chance[:, None] * g).sum(0)) ** 2).sum(0)


def test_every_parameter_has_less_variance_than_with_one_coefficient() -> None:
    """A location and a scale want other baselines, and other multiples of a variate."""

    def linear(ridge: float = 1.0) -> Regression:
        return Regression(lambda x: x, lambda d: d.mean, ridge=ridge)

    for each, one, share in (
        (PerParameter(ridge=0.0), Optimal(), 0.995),
        (PerParameter(linear(), ridge=0.0), Optimal() + linear(0.0), 0.95),
    ):
        mine, theirs = _left(each), _left(one)
        assert bool((mine < theirs).all())
        assert float(mine.sum()) < share * float(theirs.sum()), (mine, theirs)


def test_coefficient_is_the_one_of_theory() -> None:
    """One parameter: E[f s^2] / E[s^2]; one bit has no variance left then."""
    logits = f64(-1.5)
    d, rule = Bernoulli(logits=logits), PerParameter(ridge=0.0)
    x = (Independent(0).uniform(range(500), (1,), dtype=torch.float64) < d.probs).double()
    record = torch.func.vmap(lambda v: rule.record(d, v, {}))(x)
    f = 0.4 + 1.7 * x[:, 0]
    phi = logits.clone().requires_grad_()
    own = {k: v[None] for k, v in torch.func.vmap(lambda v: rule.record(Bernoulli(logits=phi), v, {}))(x[:1]).items()}
    (slope,) = torch.autograd.grad(
        rule.predict(own, {k: v.detach()[:, None] for k, v in record.items()}, f[:, None], {}).known.sum(), phi
    )
    s = (x - d.probs)[:, 0]
    centred = s - s.mean()
    beta = (centred * (f * s)).sum() / (centred * s).sum()
    assert float(slope) == pytest.approx(float(-beta * s[0]), rel=1e-9)


def test_sum_of_the_costs_baselines_is_the_baseline_of_the_sum() -> None:
    """Why no cost has a baseline of its own."""
    f, g = f64(0.3, 1.2, -0.4, 2.0), f64(1.0, 0.0, 3.0, -1.0)
    d = Normal(f64(0.2)[0], f64(1.1)[0])
    x = f64(0.1, -0.7, 1.9, 0.4)
    for rule in (LeaveOneOut(), Optimal(), Regression(lambda v: v, lambda d: d.mean), PerParameter()):
        record = torch.func.vmap(lambda v, rule=rule: rule.record(d, v, {}))(x)
        apart = [rule.subtracted(record, c, {}) for c in (f, g)]
        together = rule.subtracted(record, f + g, {})
        assert torch.allclose(apart[0].value + apart[1].value, together.value, atol=1e-12)
        assert torch.allclose(apart[0].known + apart[1].known, together.known, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="ridge is -1"):
        PerParameter(ridge=-1.0)
    with pytest.raises(ValueError, match="PerParameter is fitted to the other samples and n is 1"):
        exact_moments(BITS[0].program(Score(PerParameter())), BITS[0].theta)


# ------------------------------------------------------------------------------------------------ a module as theta


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = torch.nn.Linear(2, 3, dtype=torch.float64)
        self.register_buffer("shift", f64(0.1, 0.2, 0.3))


def test_a_module_as_theta_in_diagnoses() -> None:
    def program(net: Net, s: Sites, x: Tensor) -> None:
        b = s.sample("b", Bernoulli(logits=net.encode(x) + net.shift), "auto")
        s.cost("f", torch.cos(b.sum() + b[0] * b[1]))

    def of_dict(weights: dict[str, Tensor], s: Sites, x: Tensor) -> None:
        logits = weights["encode.weight"] @ x + weights["encode.bias"] + f64(0.1, 0.2, 0.3)
        b = s.sample("b", Bernoulli(logits=logits), "auto")
        s.cost("f", torch.cos(b.sum() + b[0] * b[1]))

    net, data = Net(), (f64(0.3, -1.0, 0.5, 0.2).reshape(2, 2),)
    weights = {name: w.detach() for name, w in net.named_parameters()}
    one = compare(program, [Score()], net, Independent(0), data=data, repeats=20).rows["Score(baseline=Nothing())"]
    two = compare(of_dict, [Score()], weights, Independent(0), data=data, repeats=20).rows["Score(baseline=Nothing())"]
    assert one.variance == pytest.approx(two.variance, rel=1e-12)
    assert list(one.parameters) == ["encode.weight", "encode.bias"]
    assert torch.allclose(one.mean["encode.weight"], two.mean["encode.weight"])
    chosen = automatic(program, net, Independent(0), data=data, repeats=10)
    E = Expectation(chosen)
    report = diagnose(E, net, Independent(0), E.init(net, data), data=data, repeats=10)
    assert report.variance == pytest.approx(0, abs=1e-20)  # enumerated
    loss, _, _ = E.surrogate(net, Independent(0), E.init(net, data), data=data)
    loss.backward()
    assert net.encode.weight.grad is not None
    assert torch.allclose(net.encode.weight.grad, report.mean["encode.weight"])
