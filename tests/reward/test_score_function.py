"""Score-function estimators on the linear-Gaussian policy: noise integrated, so bias and variance to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowvar.process import CosineVP, Flow, GaussianTwin, Independent, PixelBasis, ReverseKernel
from lowvar.reward import Floor, Policy, advantages, rollout, surrogate_loss


def ran(world: Any, **how: Any) -> Any:
    return rollout(world.policy, world.noise, world.n, (1,), dtype=torch.float64, **how)


@pytest.mark.parametrize(
    "case",
    [{}, {"steps": 1}, {"eta": 0.5}, {"tied": True}, {"schedule": Flow()}],
    ids=["2", "1", "ddim", "tied", "flow"],
)
@pytest.mark.parametrize("baseline", [0.0, -1.3])
def test_bias_and_variance_are_exact(make: Callable[..., Any], case: dict[str, Any], baseline: float) -> None:
    world = make(**case)
    runs = ran(world)
    A = advantages(world.reward(runs.samples), baseline=baseline)
    mean, variance = world.moments(surrogate_loss(world.policy, runs, A).each)
    truth = world.exact.score(baseline)
    assert A.claim.label == "unbiased"
    assert torch.allclose(mean, world.exact.gradient(), rtol=1e-10, atol=1e-10)
    assert variance == pytest.approx(truth.variance, rel=1e-9)


def test_log_probabilities_are_those_of_the_actions(world: Any) -> None:
    runs = ran(world)
    z = torch.stack([world.noise.points[:, k + 1] for k in range(2)])
    s = torch.tensor(world.exact.s)[:, None]
    normal = torch.distributions.Normal(torch.zeros_like(z), s)
    assert torch.allclose(runs.log_prob, normal.log_prob(s * z), atol=1e-12)
    assert torch.allclose(runs.score2, z.square(), atol=1e-10)
    assert torch.equal(runs.actions[0], runs.states[1])
    assert torch.equal(runs.actions[1], runs.samples)


def test_rollouts_do_not_depend_on_batches_or_windows(world: Any) -> None:
    whole, parts = ran(world), ran(world, batch_size=7)
    one = ran(world, steps=[1], x0_hat=False)
    for name in ("samples", "states", "log_prob", "x0_hat"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert torch.equal(one.states[0], whole.states[1])
    assert one.x0_hat is None
    assert one.weight == 2.0
    assert torch.equal(whole.part(torch.tensor([3, 5])).actions, whole.actions[:, [3, 5]])


def test_windows_of_steps_are_unbiased(world: Any) -> None:
    """Every window of one step, with equal probability: the mean is the gradient of all."""
    total = torch.zeros(4, dtype=torch.float64)
    for k in range(2):
        runs = ran(world, steps=[k])
        loss = surrogate_loss(world.policy, runs, world.reward(runs.samples))
        total += world.moments(loss.each)[0] / 2
    assert torch.allclose(total, world.exact.gradient(), rtol=1e-10)


def test_at_ratio_one_clipping_changes_nothing(world: Any) -> None:
    runs = rollout(world.policy, Independent(1), 32, (1,), num_generations=4, dtype=torch.float64)
    A = advantages(world.reward(runs.samples), runs.groups)
    grads = []
    for epsilon, nats in ((None, None), (0.1, None), (None, 1e-3)):
        out = surrogate_loss(world.policy, runs, A, epsilon=epsilon, trust_nats=nats)
        assert out.claim.label == "unbiased"
        assert out.clipped == 0
        grads.append(torch.autograd.grad(out.loss, world.theta)[0])
    R = world.reward(runs.samples).reshape(8, 4)
    loo = R - (R.sum(1, keepdim=True) - R) / 3
    by_hand = -(surrogate_loss(world.policy, runs, torch.ones(32, dtype=torch.float64)).each * -loo.flatten()).mean()
    grads.append(torch.autograd.grad(by_hand, world.theta)[0])
    for other in grads[1:]:
        assert torch.allclose(grads[0], other, atol=1e-12)


def test_moved_parameters_are_clipped_in_nats_and_say_so(make: Callable[..., Any]) -> None:
    world = make(nodes=9)
    runs = ran(world)
    A = torch.ones(world.n, dtype=torch.float64)
    with torch.no_grad():
        world.theta.add_(0.05)
    free = surrogate_loss(world.policy, runs, A)
    bound = surrogate_loss(world.policy, runs, A, trust_nats=0.05)
    assert free.claim.label == "biased"
    assert 0 < bound.clipped < 1
    above = free.log_ratio > 0.05
    assert bound.clipped == pytest.approx(float(above.double().mean()))
    g = world.per_run(bound.each)
    assert float(g[above.all(0)].abs().max()) == 0  # nothing left to gain where every step is out of bounds
    # the ratio has mean 1 under the old policy, exactly
    mean = world.noise.weights @ free.log_ratio[1].exp()
    assert float(mean) == pytest.approx(1.0, abs=1e-6)


def test_a_small_move_in_many_dimensions_is_no_rounding() -> None:
    """log p is summed over 4,096 numbers; a tenth of a nat is still a move, and says so."""
    schedule, d = CosineVP(), 4096
    shift = torch.zeros(d, requires_grad=True)
    twin = GaussianTwin(shift, PixelBasis((d,)), torch.ones(d))
    grid = torch.linspace(0.9, 0, 4, dtype=torch.float64)
    policy = Policy(twin.denoiser(schedule), ReverseKernel(), grid, Floor(0.1))
    ran = rollout(policy, Independent(0), 8, (d,))
    A = torch.ones(8)
    assert surrogate_loss(policy, ran.part(torch.arange(3)), A[:3]).claim.label == "unbiased"
    with torch.no_grad():
        shift.add_(0.003)
    out = surrogate_loss(policy, ran, A)
    assert 0.01 < float(out.log_ratio.abs().max()) < 1
    assert out.claim.bias == "direction"
