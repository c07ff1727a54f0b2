"""Advantages: declared biases, exactly; groups without variance; the prompts that a per-group std turns round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import Antithetic, Independent
from lowvar.reward import BASELINES, SCALES, RunningStatistics, advantages, optimal_constant, rollout, surrogate_loss


def integrated(world: Any, noise: Any, *, together: bool = True, **how: Any) -> tuple[Tensor, float]:
    """Mean and variance (times G) of the mean gradient of a group of G runs; or of a batch of G, one at a time."""
    ran = rollout(world.policy, noise, noise.n, (1,), dtype=torch.float64, num_generations=noise.size)
    R = world.reward(ran.samples)
    if together:
        values = advantages(R, ran.groups, **how).values
    else:
        values = torch.cat([advantages(rewards, **how).values for rewards in R.reshape(-1, noise.size)])
    each = surrogate_loss(world.policy, ran, values).each
    g, w = world.per_run(each).reshape(len(noise.weights), noise.size, -1).mean(1), noise.weights
    mean = w @ g
    return mean, noise.size * float((w @ g.square() - mean.square()).sum())


@pytest.mark.parametrize(
    ("name", "factor"),
    [("leave-one-out", 1.0), ("batch", 1.0), ("group-including", 0.5), ("batch-including", 0.5), ("none", 1.0)],
)
def test_expectation_and_variance_of_a_group(
    make: Callable[..., Any], tuples: Callable[..., Any], name: Any, factor: float
) -> None:
    world, noise = make(1), tuples(2, 2, 5)
    mean, variance = integrated(world, noise, together="batch" not in name, baseline=name)
    exact = world.exact.score() if name == "none" else world.exact.leave_one_out(2, including=factor < 1)
    assert torch.allclose(mean, factor * world.exact.gradient(), rtol=1e-9)
    assert torch.allclose(mean, exact.mean, rtol=1e-9)
    assert variance == pytest.approx(exact.variance, rel=1e-9)
    assert BASELINES[name].bias == ("none" if factor == 1 else "factor")


@pytest.mark.parametrize("G", [2, 5, 8])
def test_the_mean_of_all_is_short_by_one_over_G(G: int) -> None:
    R = Independent(0).normal(range(3 * G), (), dtype=torch.float64)
    groups = torch.arange(3 * G) // G
    with_own = advantages(R, groups, baseline="group-including").values
    assert torch.allclose(with_own, (1 - 1 / G) * advantages(R, groups).values, atol=1e-14)
    assert torch.allclose(
        advantages(R, baseline="batch-including").values,
        (1 - 1 / (3 * G)) * advantages(R, baseline="batch").values,
        atol=1e-14,
    )


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8])
def test_counts_and_answers_are_not_rounded(kind: torch.dtype) -> None:
    """A mean of others is no whole number, and the rewards of a reward that counts may still be."""
    R = torch.tensor([1, 0, 0, 1, 1], dtype=kind)
    assert torch.allclose(advantages(R).values, advantages(R.float()).values)
    weights = torch.arange(1.0, 6.0)
    assert torch.allclose(optimal_constant(R, weights, folds=2), optimal_constant(R.float(), weights, folds=2))


@pytest.mark.parametrize("baseline", ["leave-one-out", "batch", "optimal"])
def test_mirrored_runs_are_left_out_of_each_other_s_baseline(
    make: Callable[..., Any], tuples: Callable[..., Any], baseline: Any
) -> None:
    """Two antithetic pairs, integrated: with the partner among the others the gradient would be too long."""
    world = make(1)
    pairs = tuples(2, 2, 5)
    ran = rollout(world.policy, Antithetic(pairs), 2 * pairs.n, (1,), dtype=torch.float64, num_generations=4)
    assert ran.streams is not None
    assert ran.streams.tolist() == [i // 2 for i in range(2 * pairs.n)]
    R = world.reward(ran.samples)
    parts = torch.arange(len(R)).split(4)  # each a batch, one at a time
    found = []
    for streams in (ran.streams, None):
        values = []
        for part in parts:
            shared = None if streams is None else streams[part]
            given: Any = baseline
            if baseline == "optimal":
                zeros = torch.zeros(4, dtype=torch.int64)
                given = optimal_constant(R[part], ran.score2[:, part], groups=zeros, streams=shared)
            values.append(advantages(R[part], baseline=given, streams=shared).values)
        each = surrogate_loss(world.policy, ran, torch.cat(values)).each
        g = world.per_run(each).reshape(len(pairs.weights), 4, -1).mean(1)
        found.append(pairs.weights @ g)
    truth = world.exact.gradient()
    assert torch.allclose(found[0], truth, rtol=1e-8)
    assert float((found[1] - truth).norm()) > 0.02 * float(truth.norm())
    with pytest.raises(ValueError, match="one stream of noise; give num_generations >= 2 streams"):
        advantages(torch.arange(2.0), streams=torch.zeros(2, dtype=torch.int64))


def test_biased_scales_are_biased(make: Callable[..., Any], tuples: Callable[..., Any]) -> None:
    """A std of the group or batch, a clip: the expectation is no multiple of the gradient (by more than rounding)."""
    world, noise = make(1, tied=True), tuples(2, 2, 4)
    truth = world.exact.gradient()
    for how in ({"scale_rewards": "group"}, {"scale_rewards": "batch"}, {"clip": 0.5}):
        mean, _ = integrated(world, noise, together="batch" not in how.values(), **how)
        cosine = float(torch.cosine_similarity(mean, truth, 0))
        assert 0.5 < cosine < 1 - 1e-6
        assert advantages(torch.arange(3.0), **how).claim.bias == "direction"  # pyright: ignore[reportArgumentType]


def test_scaling_by_the_past_is_a_factor(make: Callable[..., Any], tuples: Callable[..., Any]) -> None:
    world, noise = make(1), tuples(2, 2, 5)
    past = RunningStatistics().updated(torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 2.0, 6.0]))
    mean, _ = integrated(world, noise, scale_rewards="running", state=past)
    assert torch.allclose(mean, world.exact.gradient() / past.std, rtol=1e-9)
    assert SCALES["running"].bias == "factor"


def test_two_prompts_with_opposed_preferences(make: Callable[..., Any]) -> None:
    """Rewards of scale 1 and 0.1: divided by each group's std the step goes the wrong way, leave-one-out does not."""
    world = make(2)
    n, G = 16000, 8
    ran = rollout(world.policy, Independent(0), n, (1,), dtype=torch.float64, num_generations=G)
    x, first = ran.samples[:, 0], ran.groups % 2 == 0
    R = torch.where(first, x - 2 * (x - x.mean()) ** 2, -0.1 * x)
    grads = {}
    for name, how in (("loo", {}), ("grpo", {"baseline": "group-including", "scale_rewards": "group"})):
        loss = surrogate_loss(world.policy, ran, advantages(R, ran.groups, **how)).loss  # pyright: ignore[reportArgumentType]
        grads[name] = -torch.autograd.grad(loss, world.theta)[0].flatten()
    halves = [_exact(world, c) for c in ([-2 * float(x.mean()) ** 2, 1 + 4 * float(x.mean()), -2.0], [0.0, -0.1])]
    truth = (halves[0] + halves[1]) / 2
    shift = torch.tensor([False, True, False, True])  # both prompts want opposite shifts
    cosine = {name: float(torch.cosine_similarity(g[shift], truth[shift], 0)) for name, g in grads.items()}
    assert cosine["loo"] > 0.98
    assert cosine["grpo"] < 0


def _exact(world: Any, reward: list[float]) -> Tensor:
    from dataclasses import replace

    return replace(world.exact, reward=reward, _values={}).gradient()


@pytest.mark.parametrize("baseline", list(BASELINES))
@pytest.mark.parametrize("scale", list(SCALES))
def test_groups_without_variance_are_finite(baseline: Any, scale: Any) -> None:
    for rewards in (torch.full((6,), 0.1), torch.tensor([0.1, 0.1, 0.1, 1.0, 2.0, 3.0]), torch.full((6,), 1e8)):
        out = advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), baseline=baseline, scale_rewards=scale)
        assert bool(torch.isfinite(out.values).all())
        if scale == "group":
            assert float(out.values[:3].abs().max()) == 0
        assert out.idle == (0.5 if float(rewards[3]) == 1 else 1.0)


def test_running_statistics_are_those_of_the_paper() -> None:
    """Buffers of 4 with a minimum of 3, by hand; the batch's statistics before that."""
    state = RunningStatistics(buffer=4, minimum=3)
    groups = torch.tensor([5, 5, 9])
    out = advantages(
        torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64),
        groups,
        baseline="running-including",
        scale_rewards="prompt",
        state=state,
    )
    batch = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    assert torch.allclose(out.values, (batch - batch.mean()) / batch.std(correction=0))
    again = advantages(
        torch.tensor([5.0, 7.0, 2.0], dtype=torch.float64),
        groups,
        baseline="running-including",
        scale_rewards="prompt",
        state=out.state,
    )
    own, now = torch.tensor([1.0, 3.0, 5.0, 7.0]).double(), torch.tensor([5.0, 7.0, 2.0]).double()
    assert torch.allclose(again.values[:2], (now[:2] - own.mean()) / own.std(correction=0))
    assert float(again.values[2]) == pytest.approx(float((2 - now.mean()) / now.std(correction=0)))
    unbiased = advantages(now, groups, baseline="running", state=out.state)
    assert float(unbiased.values[0]) == pytest.approx(5 - (7 + 2) / 2)  # two rewards so far: the batch's others


def test_optimal_constant_is_the_recursion_s(make: Callable[..., Any]) -> None:
    world = make(2)
    n = 40000
    ran = rollout(world.policy, Independent(3), n, (1,), dtype=torch.float64)
    z, x = [], []
    for k in range(2):
        x.append(ran.states[k][:, 0])
        mean = world.exact.a[k] * x[k] + world.exact.b[k]
        z.append((ran.actions[k][:, 0] - mean) / world.exact.s[k])
    kappa = [world.exact.q[k][2 * k + 1] for k in range(2)]
    weights = torch.stack([(z[k] * kappa[k] / world.exact.s[k]) ** 2 * (1 + x[k] ** 2) for k in range(2)])
    b = optimal_constant(world.reward(ran.samples), weights, folds=2)
    exact = world.exact.optimal_baseline()
    assert torch.allclose(b, torch.full_like(b, exact), rtol=0.1)
    assert world.exact.score(exact).variance < world.exact.score(world.exact.mean_reward()).variance


def test_bad_input() -> None:
    R = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="'mean'; allowed: none, batch, batch-including"):
        advantages(R, baseline="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'std'; allowed: none, group"):
        advantages(R, scale_rewards="std")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"runs \[1\] are not finite"):
        advantages(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="a group has one run; give num_generations >= 2"):
        advantages(R, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="clip is 0"):
        advantages(R, clip=0)
    with pytest.raises(ValueError, match="minimum 17"):
        RunningStatistics(minimum=17)
