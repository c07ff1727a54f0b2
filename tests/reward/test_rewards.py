"""Rewards: batches, asynchronous ones, failures that name their batch; running values as baselines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import Independent
from lowvar.reward import (
    Advantages,
    History,
    Paths,
    RewardError,
    RewardProblem,
    Ridge,
    RidgeSurrogate,
    Scores,
    SurrogateControl,
    ValueNetwork,
    WeightedSum,
    advantages,
    evaluated,
    linear_and_square,
    reward_gradient,
    rollout,
    surrogate_loss,
    x0_baseline,
)
from lowvar.reward.ridge import spread_folds


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_counts_and_answers_are_rewards(make: Callable[..., Any], kind: torch.dtype) -> None:
    """The gradient of a reward that answers yes or no is that of the same numbers."""
    world = make(2, 2)
    grads = []
    for dtype in (kind, torch.float64):
        problem = RewardProblem(
            world.policy, lambda x, p, to=dtype: (x[:, 0] > 0.5).to(to), [world.theta], (1,), dtype=torch.float64
        )
        for estimator in (Scores(), Scores("x0"), SurrogateControl()):
            grads.append(torch.autograd.grad(estimator(problem, Independent(0), 32).loss, world.theta)[0])
    for a, b in zip(grads[:3], grads[3:], strict=True):
        assert torch.equal(a, b)


def test_asynchronous_rewards_are_waited_for_together() -> None:
    running, most = 0, 0

    def made(factor: float) -> Any:
        async def slow(x: Tensor, prompts: Any, **columns: Any) -> Tensor:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.01)
            running -= 1
            return factor * x[:, 0] + columns["bonus"]

        return slow

    x = torch.tensor([[1.0], [2.0]])
    total = WeightedSum([made(1.0), made(10.0), lambda x, p, bonus: x[:, 0]], [1.0, 2.0, 0.5])
    found = evaluated(total, x, columns={"bonus": torch.tensor([0.0, 1.0])})
    assert found.tolist() == [21.5, 46.0]
    assert most == 2
    assert evaluated(made(3.0), x, columns={"bonus": 0.0}).tolist() == [3.0, 6.0]


def test_asynchronous_rewards_in_a_notebook() -> None:
    """A loop is running there already, and a second one cannot be in the same thread."""

    async def slow(x: Tensor, prompts: Any = None) -> Tensor:
        await asyncio.sleep(0)
        return x.sum(1)

    async def cell() -> Tensor:
        return evaluated(slow, torch.ones(2, 3))

    assert asyncio.run(cell()).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        (lambda x, p: x[:, 0] / 0 * 0, r"batch 3: the rewards of runs \[0, 1\] are not finite \(nan\)"),
        (lambda x, p: x, r"batch 3: the reward returned \(2, 1\); give a tensor of one number a run, \(2,\)"),
        (lambda x, p: 1.0, "batch 3: the reward returned float"),
        (lambda x, p: x.missing, "batch 3: the reward raised AttributeError"),
    ],
    ids=["nan", "shape", "float", "raises"],
)
def test_a_failure_names_its_batch(reward: Any, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        evaluated(reward, torch.ones(2, 1), batch=3)


def test_a_derivative_that_is_promised_and_not_there(make: Callable[..., Any]) -> None:
    """A reward that leaves autograd, say by numpy, and says that it has a derivative: paths name the fault."""

    def left(x: Tensor, prompts: Any = None) -> Tensor:
        return x[:, 0].detach() ** 2

    left.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]
    world = make(2, 2)
    problem = RewardProblem(world.policy, left, [world.theta], (1,), dtype=torch.float64)
    for ask in (lambda: Paths()(problem, Independent(0), 8), lambda: reward_gradient(left, torch.ones(2, 1))):
        with pytest.raises(RewardError, match="says that it is differentiable, and its values do not depend"):
            ask()
    assert Scores()(problem, Independent(0), 8).claim.label == "unbiased"


def test_an_interrupt_is_not_a_failure() -> None:
    def interrupted(x: Tensor, p: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluated(interrupted, torch.ones(2, 1))


def test_sums_are_differentiable_if_all_are() -> None:
    def smooth(x: Tensor, p: Any) -> Tensor:
        return (x**2).sum(1)

    smooth.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]
    both = WeightedSum([smooth, smooth], [1.0, -3.0])
    values, slope = reward_gradient(both, torch.tensor([[2.0]]))
    assert values.tolist() == [-8.0]
    assert slope.tolist() == [[-8.0]]
    with pytest.raises(ValueError, match="has no derivative"):
        reward_gradient(WeightedSum([smooth, lambda x, p: x[:, 0]]), torch.tensor([[2.0]]))
    with pytest.raises(ValueError, match="1 weights for 2 rewards"):
        WeightedSum([smooth, smooth], [1.0])


def test_a_learned_value_lowers_the_variance_without_bias(make: Callable[..., Any]) -> None:
    """Fitted to earlier batches only; the next ones have the true gradient and less variance than a constant."""
    world = make(3, 2)
    value, grads = ValueNetwork(1, 3).double(), []
    optimizer = torch.optim.Adam(value.parameters(), 3e-3)
    for batch in range(50):
        ran = rollout(world.policy, Independent(0), 256, (1,), first=256 * batch, dtype=torch.float64)
        R = world.reward(ran.samples)
        b = value.predict(ran)
        value.fit(ran, R, optimizer)
        if batch >= 20:
            loss = surrogate_loss(world.policy, ran, advantages(R, baseline=b)).loss
            grads.append(-torch.autograd.grad(loss, world.theta)[0].flatten())
    g = torch.stack(grads)
    variance = 256 * float(g.var(0).sum())
    assert variance < 0.6 * world.exact.leave_one_out(256).variance
    assert float((g.mean(0) - world.exact.gradient()).norm()) < 4 * (variance / 256 / 30) ** 0.5


def test_a_run_is_not_in_its_own_fit() -> None:
    """Changing one reward changes the surrogate of runs in other folds, not that of its own."""
    x = Independent(0).normal(range(12), (2,), dtype=torch.float64)
    y = x.sum(1)
    before = RidgeSurrogate.fit(x, y, folds=3)(x)
    y[5] += 1
    after = RidgeSurrogate.fit(x, y, folds=3)(x)
    assert torch.equal(before[4:8], after[4:8])
    assert not torch.equal(before[:4], after[:4])


@pytest.mark.parametrize("baseline", ["leave-one-out", "x0"])
def test_residuals_are_judged_without_the_run_s_own_reward(make: Callable[..., Any], baseline: Any) -> None:
    """One reward is changed: what it is compared with stays, so the run's own advantage moves by as much."""
    world = make(2, 2)
    ran = rollout(world.policy, Independent(0), 12, (1,), dtype=torch.float64)
    R = world.reward(ran.samples)
    scores = Scores(baseline, ridge=0.5)

    def judged(rewards: Tensor) -> Tensor:
        h = RidgeSurrogate.fit(ran.samples, rewards, ridge=1e9)  # a mean: all that a fit can know of a run
        found = h.judged(scores.advantages, ran, rewards)
        assert isinstance(found, Advantages)
        return found.values

    before = judged(R)
    for i in (0, 5, 11):
        more = R.clone()
        more[i] += 1.0
        assert torch.allclose(judged(more)[..., i] - before[..., i], torch.ones(()).double(), atol=1e-12)
    estimator = SurrogateControl(Scores(baseline))
    problem = RewardProblem(world.policy, world.reward, [world.theta], (1,), num_generations=12, dtype=torch.float64)
    assert estimator(problem, Independent(0), 12).claim.label == "unbiased"


@pytest.mark.parametrize("estimator", [Scores("x0"), SurrogateControl()], ids=lambda e: e.name)
def test_two_runs_are_enough(make: Callable[..., Any], estimator: Any) -> None:
    """A fold a run: what one is compared with is the other's reward."""
    world = make(2, 2)
    problem = RewardProblem(world.policy, world.reward, [world.theta], (1,), num_generations=2, dtype=torch.float64)
    found = estimator(problem, Independent(0), 2)
    plain = Scores()(problem, Independent(0), 2)
    a, b = (torch.autograd.grad(out.loss, world.theta)[0] for out in (found, plain))
    assert torch.isfinite(a).all()
    if isinstance(estimator, Scores):
        assert torch.allclose(a, b)


def test_a_surrogate_s_folds_keep_mirrored_runs_together() -> None:
    x = Independent(0).normal(range(20), (2,))
    fold = RidgeSurrogate.fit(x, x.sum(1), streams=torch.arange(20) // 2).fold
    assert torch.equal(fold[::2], fold[1::2])


def test_the_x0_baseline_knows_the_mean_of_every_group(make: Callable[..., Any]) -> None:
    """Neighbours are groups with a mean each, which no state tells: folds of whole groups would know none of them."""
    world = make(2, 2)
    ran = rollout(world.policy, Independent(0), 64, (1,), dtype=torch.float64, num_generations=8)
    R = world.reward(ran.samples) + 50.0 * (ran.groups % 2)
    assert float((R - x0_baseline(ran, R)).var(1).max()) < 2 * float(advantages(R, ran.groups).values.var())
    counts = torch.zeros(ran.n, dtype=torch.int64)
    counts[::3] = 1
    assert torch.allclose(x0_baseline(ran, counts), x0_baseline(ran, counts.double()))


def test_spread_folds() -> None:
    """Every group in every fold, folds of one size, and runs of one stream together."""
    groups = torch.tensor([0, 1, 2, 3] * 6)
    fold = spread_folds(groups, 4)
    assert all(sorted(set(fold[groups == g].tolist())) == [0, 1, 2, 3] for g in range(4))
    assert fold.bincount().tolist() == [6, 6, 6, 6]
    assert spread_folds(torch.arange(8), 4).bincount().tolist() == [2, 2, 2, 2]
    pairs = spread_folds(torch.arange(16) // 8, 4, torch.arange(16) // 2)
    assert torch.equal(pairs[::2], pairs[1::2])
    with pytest.raises(ValueError, match="4 folds of 2 independent parts"):
        spread_folds(torch.zeros(4, dtype=torch.int64), 4, torch.arange(4) // 2)


def test_a_value_network_is_told_the_prompt_and_not_the_group(make: Callable[..., Any]) -> None:
    """Five groups of two prompts: the network has two, and prompts' rewards differ."""
    world = make(2, 2)
    value = ValueNetwork(1, 2, prompts=2)
    history = History(lambda index: index // 2 % 2, value=value)
    problem = RewardProblem(
        world.policy,
        lambda x, p, **c: x[:, 0] + 10.0 * c["prompt"],
        [world.theta],
        (1,),
        num_generations=2,
        dtype=torch.float64,
        columns=lambda index: {"prompt": index // 2 % 2},
    )
    for b in range(60):
        out = Scores("value")(problem, Independent(0), 10, 10 * b, history=history)
        assert out.ran is not None
        history.seen(out.ran, out.rewards)
    ran = rollout(world.policy, Independent(1), 8, (1,), dtype=torch.float64, num_generations=2)
    V = value.predict(history.told(ran))
    assert float((V[:, ran.groups % 2 == 1] - V[:, ran.groups % 2 == 0]).mean()) > 5


def test_features_say_what_a_surrogate_may_be(make: Callable[..., Any]) -> None:
    """A reward that no quadratic predicts: features that hold it leave no residual and unbiased gradients."""
    world = make(2, 2)

    def wave(x: Tensor) -> Tensor:
        return torch.cat([torch.sin(4 * x), torch.cos(4 * x)], 1)

    def black_box(x: Tensor, p: Any) -> Tensor:
        return torch.sin(4 * x[:, 0]).detach()

    x = Independent(0).normal(range(64), (1,), dtype=torch.float64)
    y = black_box(x, None)
    assert float((RidgeSurrogate.fit(x, y, ridge=1e-6, features=wave)(x) - y).abs().max()) < 1e-4
    assert float((RidgeSurrogate.fit(x, y)(x) - y).var() / y.var()) > 0.5
    problem = RewardProblem(world.policy, black_box, [world.theta], (1,), num_generations=64, dtype=torch.float64)
    found = {}
    for features in (wave, linear_and_square):
        estimator = SurrogateControl(features=features)
        grads = [
            -torch.autograd.grad(estimator(problem, Independent(1), 64, 64 * b).loss, world.theta)[0].flatten()
            for b in range(16)
        ]
        found[estimator.name] = torch.stack(grads)
    good, plain = found["surrogate control variate of wave"], found["surrogate control variate"]
    assert float(good.var(0).sum()) < 0.5 * float(plain.var(0).sum())
    assert float((good - plain).mean(0).norm()) < 4 * float(((good - plain).var(0).sum() / 16).sqrt())
    assert Scores("x0", features=wave).name == "scores, x0 baseline of wave"
    assert " at 0x" not in repr(SurrogateControl()) + repr(Scores())  # what a resumed run is compared by


@pytest.mark.parametrize(("n", "p"), [(40, 3), (12, 30)], ids=["primal", "dual"])
@pytest.mark.parametrize("ridge", [0.5, None])
def test_ridge_is_the_minimum_it_says(n: int, p: int, ridge: float | None) -> None:
    """The gradient of the weighted, standardised objective vanishes, by more runs than features and by fewer."""
    x = Independent(0).normal(range(n), (p,), dtype=torch.float64) * torch.linspace(0.1, 5, p)
    y = x @ torch.linspace(-1, 1, p, dtype=torch.float64) + Independent(1).normal(range(n), (), dtype=torch.float64)
    w = Independent(2).uniform(range(n), (), dtype=torch.float64)
    fit = Ridge.fit(x, y, w, ridge)
    w = w * n / w.sum()
    scale = (w @ (x - w @ x / n).square() / n).sqrt()
    residual = y - fit(x)
    slope = (x - w @ x / n).mul(w[:, None]).T @ residual / scale
    chosen = slope / (fit.coefficient * scale)  # the ridge that this is the minimum for
    assert torch.allclose(chosen, torch.full_like(chosen, float(chosen.median())), rtol=1e-5)
    assert float(w @ residual) == pytest.approx(0, abs=1e-9)
    if ridge is not None:
        assert float(chosen.median()) == pytest.approx(ridge, rel=1e-5)


def test_the_ridge_is_chosen_by_what_the_data_say() -> None:
    """Next to none where the features say all, much where they say nothing; better than a fixed one on new runs."""
    x = Independent(0).normal(range(400), (20,), dtype=torch.float64)
    noise = Independent(1).normal(range(400), (), dtype=torch.float64)
    for y, fixed in ((x.sum(1) + 1e-3 * noise, 100.0), (noise, 0.0)):
        errors = [float((Ridge.fit(x[:60], y[:60], None, r)(x[60:]) - y[60:]).square().mean()) for r in (None, fixed)]
        assert errors[0] < 0.9 * errors[1]
