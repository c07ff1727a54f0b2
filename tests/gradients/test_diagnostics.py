"""Diagnoses against exact variances; comparisons, choices, and pathwise sites without a derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

from lowvar.gradients import (
    ARM,
    DisARM,
    Enumerate,
    Expectation,
    GumbelSoftmax,
    MeasureValued,
    MultiSample,
    Pathwise,
    Score,
    Sites,
    automatic,
    compare,
    diagnose,
)
from lowvar.process import Independent
from lowvar.testing import exact_moments


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bits(estimator: Any) -> Any:
    def program(theta: Tensor, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta), estimator)
        s.cost("f", torch.cos(b @ f64(1.0, -2.0) + b[0] * b[1]))

    return program


def test_variance_is_the_exact_one_within_its_interval() -> None:
    theta = f64(0.4, -0.9)
    for rule in (Score(), DisARM(), MultiSample(2)):
        exact = exact_moments(bits(rule), theta)
        E = Expectation(bits(rule))
        report = diagnose(E, theta, Independent(1), E.init(theta), repeats=2000)
        total = float(exact.variance.sum())
        assert report.low < total < report.high
        assert report.high - report.low < 0.35 * total
        assert report.snr == pytest.approx(float(exact.mean.square().sum()) / total, rel=0.5)


def test_shares_of_sites_are_sobols_total_indices() -> None:
    """g = d/dtheta of theta (x + 3 y): Var = 1 + 9, shares a tenth and nine tenths."""

    def program(theta: Tensor, s: Sites) -> None:
        x = s.sample("x", Normal(0.0, torch.ones((), dtype=torch.float64)), Pathwise())
        y = s.sample("y", Normal(0.0, torch.ones((), dtype=torch.float64)), Pathwise())
        s.cost("f", theta * (x + 3 * y))

    E, theta = Expectation(program), f64(0.7)[0]
    report = diagnose(E, theta, Independent(0), E.init(theta), repeats=3000)
    assert report.variance == pytest.approx(10, rel=0.1)
    assert report.sites["x"] == pytest.approx(0.1, abs=0.02)
    assert report.sites["y"] == pytest.approx(0.9, abs=0.08)


def test_comparison_ranks_by_work_and_puts_biased_ones_last() -> None:
    theta = f64(0.4, -0.9)
    result = compare(
        bits("auto"),
        {"score": Score(), "disarm": DisARM(), "arm": ARM(), "soft": GumbelSoftmax(), "path": Pathwise()},
        theta,
        Independent(0),
        repeats=1000,
    )
    names = list(result.rows)
    assert names[-1] == "soft"
    assert names.index("disarm") < names.index("arm")
    assert "no pathwise derivative" in result.left_out["path"]
    assert result.table().count("\n") == 1 + len(names)
    assert result.rows["disarm"].cost == 2


def test_comparisons_and_choices_on_whole_batches() -> None:
    """The same figures as sample by sample, 1e-12; a program that mixes samples is left out with the reason."""

    def program(theta: Tensor, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta), "auto")
        s.cost("f", torch.cos(b[..., 0] - 2 * b[..., 1] + b[..., 0] * b[..., 1]))

    theta, rules = f64(0.4, -0.9), [Score(), DisARM(), MultiSample(2)]
    one, whole = (compare(program, rules, theta, Independent(0), repeats=20, batched=b) for b in (False, True))
    assert list(one.rows) == list(whole.rows)
    for name, row in one.rows.items():
        assert whole.rows[name].work == pytest.approx(row.work, rel=1e-12)
    found = automatic(program, theta, Independent(0), repeats=20, batched=True)
    assert found.choices == automatic(program, theta, Independent(0), repeats=20).choices

    def mixed(theta: Tensor, s: Sites) -> None:
        b = s.sample("b", Bernoulli(logits=theta), "auto")
        s.cost("f", torch.cos(b[0] - 2 * b[1]))

    refused = compare(mixed, [Score()], theta, Independent(0), repeats=4, batched=True)
    assert not refused.rows
    assert "Score" in next(iter(refused.left_out))


def test_seconds_as_cost_and_enumeration_without_noise() -> None:
    result = compare(bits("auto"), [Enumerate()], f64(0.4, -0.9), Independent(0), repeats=4, cost="seconds")
    (row,) = result.rows.values()
    assert row.variance == 0
    assert row.cost > 0


def test_automatic_chooses_and_says_why() -> None:
    def program(theta: Any, s: Sites) -> None:
        z = s.sample("z", Normal(theta[:2], 1.0), "auto")
        b = s.sample("b", Bernoulli(logits=theta[2:] + z[0]), "auto")
        s.cost("f", (b.sum() - 2.5) ** 2 + z.square().sum())

    theta = f64(0.1, -0.2, *([0.3] * 6))
    with pytest.raises(ValueError, match=r"automatic\(program, theta\)"):
        Expectation(program).init(theta)
    chosen = automatic(program, theta, Independent(0), repeats=100)
    assert isinstance(chosen.choices["z"], Pathwise)
    assert isinstance(chosen.choices["b"], DisARM | MultiSample)
    assert "variance x cost" in chosen.why["b"]
    E = Expectation(chosen, n=4)
    g = torch.func.grad(lambda th: E.surrogate(th, Independent(0), E.init(theta))[0])(theta)
    assert bool(torch.isfinite(g).all())


@pytest.mark.parametrize("kind", ["round", "compare", "detach"])
def test_a_step_function_of_a_pathwise_site_is_refused(kind: str) -> None:
    def of(estimator: Any) -> Any:
        def program(theta: Tensor, s: Sites) -> None:
            x = s.sample("x", Normal(theta, 1.0), estimator)
            y = {"round": torch.round(3 * x), "compare": (x > theta.detach()).to(x), "detach": x.detach()}[kind]
            s.cost("smooth", x**2)
            s.cost("step", y)

        return program

    theta = f64(0.3)[0]
    with pytest.raises(ValueError, match="cost 'step' changes with site 'x'"):
        Expectation(of(Pathwise())).init(theta)
    for rule in (Score(), MeasureValued()):
        Expectation(of(rule)).init(theta)


def test_a_gradient_that_goes_through_a_later_score_site_is_not_refused() -> None:
    def program(theta: Tensor, s: Sites) -> None:
        x = s.sample("x", Normal(theta, 1.0), Pathwise())
        b = s.sample("b", Bernoulli(logits=x), Score())
        s.cost("bit", b)
        s.cost("unused", theta**2, parents=("x",))

    theta, expectation = f64(0.3)[0].requires_grad_(), Expectation(program, n=4)
    loss, _, _ = expectation.surrogate(theta, Independent(0), expectation.init(theta), step=0)
    assert float(torch.autograd.grad(loss, theta)[0]) != 0


def test_bad_input() -> None:
    E, theta = Expectation(bits(Score())), f64(0.4, -0.9)
    with pytest.raises(ValueError, match="repeats is 1"):
        diagnose(E, theta, Independent(0), E.init(theta), repeats=1)
