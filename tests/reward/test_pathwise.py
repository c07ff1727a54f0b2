"""Pathwise estimators, mixtures with scores and surrogates: bias and variance to rounding, against the recursion."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import Antithetic, Independent
from lowvar.reward import (
    Full,
    Last,
    LastAveraged,
    RandomTruncation,
    Roulette,
    advantages,
    pathwise_loss,
    rollout,
    surrogate_control,
)
from lowvar.testing.affine import HermiteNoise
from lowvar.testing.polynomial import Polynomial


def loss(world: Any, rule: Any, **how: Any) -> Any:
    how = {"noise": world.noise, "n": world.n, "checkpoint": 0, **how}
    return pathwise_loss(world.policy, world.reward, shape=(1,), rule=rule, dtype=torch.float64, **how)


def plain(ran: Any, rewards: Tensor) -> Any:
    return advantages(rewards, baseline="none")


def check(world: Any, out: Any, exact: Any) -> None:
    mean, variance = world.moments(out.each)
    assert torch.allclose(mean, exact.mean, rtol=1e-9, atol=1e-10)
    assert variance == pytest.approx(exact.variance, rel=1e-8)
    unbiased = torch.allclose(mean, world.exact.gradient(), rtol=1e-9, atol=1e-10)
    assert unbiased == (out.claim.label == "unbiased")


@pytest.mark.parametrize("case", [{"steps": 3, "nodes": 5}, {"tied": True}, {"eta": 0.4}], ids=["3", "tied", "ddim"])
def test_full(make: Callable[..., Any], case: dict[str, Any]) -> None:
    world = make(**case)
    check(world, loss(world, Full()), world.exact.pathwise())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("rest", ["stop", "score"])
def test_last(make: Callable[..., Any], k: int, rest: Any) -> None:
    world = make(3, 5)
    check(world, loss(world, Last(k, rest), advantage=plain), world.exact.last(k, rest))


def test_last_of_all_steps_is_full(world: Any) -> None:
    assert torch.equal(loss(world, Last(2)).each, loss(world, Full()).each)


def test_truncation_is_drawn_once_a_batch(make: Callable[..., Any]) -> None:
    """Over the outcomes of its one number the estimate is the mean of Last(1..3); a number a step (TRL) is not."""
    world = make(3, 5)
    means = []
    for u, k in ((0.1, 1), (0.5, 2), (0.9, 3)):
        noise = HermiteNoise(4, 5, coins=[u] * 5)
        out = loss(world, RandomTruncation(), noise=noise)
        assert out.steps == k
        means.append(world.moments(out.each)[0])
        assert torch.allclose(means[-1], world.exact.last(k, "stop").mean, rtol=1e-9)
    mean = torch.stack(means).mean(0)
    redrawn = [0.0] * 6  # step j is cut with probability (3 - j) / 3, each time anew
    for cuts in itertools.product([True, False], repeat=2):
        p = 1.0
        for j, cut in enumerate(cuts, 1):
            p *= (3 - j) / 3 if cut else j / 3
        gates = ["pass", *("stop" if cut else "pass" for cut in cuts)]
        wrong = world.exact.pathwise(gates=gates).mean
        redrawn = [r + p * float(w) for r, w in zip(redrawn, wrong, strict=True)]
    truth = world.exact.gradient()
    assert 0.01 < float((mean - truth).norm() / truth.norm()) < 0.9
    assert float((mean - torch.tensor(redrawn).double()).norm() / truth.norm()) > 0.01


def test_a_factor_of_the_scores_alone_is_no_step_size(make: Callable[..., Any]) -> None:
    """Half of the score part beside all of the pathwise part points elsewhere, and the claim says so."""
    world = make(2)
    truth = world.exact.gradient()
    out = loss(world, Last(1, "score"), advantage=lambda ran, R: advantages(R, baseline=-1.0))
    half = loss(world, Last(1, "score"), advantage=lambda ran, R: advantages(R, baseline=-1.0).values / 2)
    full, short = (world.moments(one.each)[0] for one in (out, half))
    assert torch.allclose(full, truth, rtol=1e-9)
    assert float(torch.cosine_similarity(short, truth, 0)) < 1 - 1e-4

    def including(ran: Any, R: Tensor) -> Any:
        return advantages(R, baseline="batch-including")

    assert advantages(torch.arange(2.0), baseline="batch-including").claim.bias == "factor"
    assert loss(world, Last(1, "score"), advantage=including).claim.bias == "direction"
    assert loss(world, Last(1, "score"), advantage=plain).claim.bias == "none"


def test_truncations_longer_than_the_chain_are_refused() -> None:
    for rule in (RandomTruncation(5), RandomTruncation(1, 5)):
        with pytest.raises(ValueError, match="k goes up to 5, the chain has 3 steps"):
            rule.drawn(0.5, 3)


def test_roulette(make: Callable[..., Any]) -> None:
    """All outcomes of the coins: unbiased, and the variance of a single run is the recursion's."""
    world, keep = make(3, 5), 0.8
    first, second = torch.zeros(6, dtype=torch.float64), 0.0
    for coins in itertools.product((0.1, 0.9), repeat=2):
        p = keep ** sum(u < keep for u in coins) * (1 - keep) ** sum(u > keep for u in coins)
        noise = HermiteNoise(4, 5, coins=[0.0, 0.0, *coins])
        g, w = world.per_run(loss(world, Roulette(keep), noise=noise).each), noise.weights
        first, second = first + p * (w @ g), second + p * float((w @ g.square()).sum())
    exact = world.exact.pathwise(gates=["pass", keep, keep])
    assert torch.allclose(first, world.exact.gradient(), rtol=1e-9, atol=1e-10)
    assert second - float(first.square().sum()) == pytest.approx(exact.variance, rel=1e-8)


def test_last_averaged(make: Callable[..., Any]) -> None:
    """Has the last step's parameters only, and less variance with more noisings."""
    world = make(3)
    truth = world.exact.gradient()
    spread = []
    for m in (1, 8):
        out = loss(world, LastAveraged(m), noise=Independent(0), n=400)
        g = world.per_run(out.each)
        assert float(g[:, :4].abs().max()) == 0
        assert float((g.mean(0)[4:] - truth[4:]).norm()) > 0
        spread.append(float(g.var(0).sum()))
    assert spread[1] < spread[0]
    assert out.claim.bias == "truncation"  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("coefficients", [[-2.2, 2.9, -0.95], [0.3, -1.0, 0.5]], ids=["near", "wrong"])
def test_a_surrogate_costs_no_bias_even_if_wrong(world: Any, coefficients: list[float]) -> None:
    def h(x: Tensor) -> Tensor:
        return sum(c * x[:, 0] ** i for i, c in enumerate(coefficients))  # pyright: ignore[reportReturnType]

    out = surrogate_control(
        world.policy,
        lambda x, p: world.reward(x),
        world.noise,
        world.n,
        (1,),
        surrogate=h,
        advantage=plain,
        checkpoint=0,
        dtype=torch.float64,
    )
    H = Polynomial(1, {(i,): c for i, c in enumerate(coefficients)})
    exact = world.exact.estimate(world.exact.R - H, H)
    check(world, out, exact)
    if coefficients[1] > 0:
        assert exact.variance < world.exact.score().variance


def test_antithetic_noise(make: Callable[..., Any]) -> None:
    """Pairs of z and -z: the variance of pair means is the recursion's, for scores and for paths."""
    world = make(2)
    pair = Antithetic(world.noise)
    for out, exact in (
        (loss(world, Full(), noise=pair, n=2 * world.n).each, world.exact.pathwise(pair=True)),
        (_scores(world, pair), world.exact.score(-1.0, pair=True)),
    ):
        g, w = world.per_run(out).reshape(world.n, 2, -1).mean(1), world.noise.weights
        mean = w @ g
        assert torch.allclose(mean, world.exact.gradient(), rtol=1e-9)
        assert float((w @ g.square() - mean.square()).sum()) == pytest.approx(exact.variance, rel=1e-8)


def _scores(world: Any, noise: Any) -> Tensor:
    from lowvar.reward import surrogate_loss

    runs = rollout(world.policy, noise, 2 * world.n, (1,), dtype=torch.float64)
    A = advantages(world.reward(runs.samples), baseline=-1.0)
    return surrogate_loss(world.policy, runs, A).each


def test_checkpoints_change_nothing(make: Callable[..., Any]) -> None:
    world = make(3)
    grads = []
    for size in (0, 1, 2):
        out = loss(world, Last(2, "score"), noise=Independent(0), n=16, checkpoint=size)
        grads.append(torch.autograd.grad(out.loss, world.theta)[0])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
