"""The KL to a reference: exact value and gradient of the linear-Gaussian chain; what each estimator is unbiased for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from lowvar.process import Independent
from lowvar.process.kernel import step_coefficients
from lowvar.reward import KL_ESTIMATORS, BetaController, kl_loss, rollout
from lowvar.testing.affine import AffineDenoiser

MOVED = 0.1


def reference(world: Any) -> Any:
    denoiser = world.policy.denoiser
    other = AffineDenoiser(denoiser.theta.detach() - MOVED, denoiser.schedule, denoiser.grid)
    return replace(world.policy, denoiser=other)


def exact_kl(world: Any, theta: Tensor, states: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """E sum_t KL_t by the recursion of moments; with `states` the states are those of these parameters, held."""
    denoiser, steps = world.policy.denoiser, world.policy.steps
    levels, old = denoiser.schedule.at(denoiser.grid), denoiser.theta.detach() - MOVED
    mean, var, total = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64), 0.0
    for k in range(steps):
        c = step_coefficients(levels[k], levels[k + 1])
        s2 = c.lambda2 + (world.floor**2 if k + 1 == steps else 0.0)
        g, h = theta[k] - old[k]
        total = total + c.kappa**2 * (g**2 * (var + mean**2) + 2 * g * h * mean + h**2) / (2 * s2)
        g, h = (theta if states is None else states)[k]
        mean, var = (c.a + c.kappa * g) * mean + c.kappa * h, (c.a + c.kappa * g) ** 2 * var + s2
    assert isinstance(total, Tensor)
    return total


def gradient(world: Any, noise: Any, n: int, estimator: Any) -> tuple[Tensor, Tensor, Any]:
    ran = rollout(world.policy, noise, n, (1,), dtype=torch.float64, num_generations=noise.size)
    out = kl_loss(world.policy, reference(world), ran, estimator=estimator)
    each = out.each.reshape(-1, noise.size).mean(1)
    value = noise.weights @ each
    return value.detach(), torch.autograd.grad(value, world.theta)[0], out


@pytest.mark.parametrize("estimator", ["exact", "direct", "k1", "k2"])
def test_expectation_of_each_estimator(make: Callable[..., Any], tuples: Callable[..., Any], estimator: Any) -> None:
    """Pairs of runs, integrated: unbiased exactly where it says so, and exactly the direct part where it does not."""
    world = make(2)
    noise = tuples(2, 3, 4)
    value, found, out = gradient(world, noise, noise.n, estimator)
    theta = world.theta.detach()
    truth = grad(lambda th: exact_kl(world, th))(theta)
    direct = grad(lambda th: exact_kl(world, th, theta))(theta)
    assert float(value) == pytest.approx(float(exact_kl(world, theta)), rel=1e-10)
    unbiased = KL_ESTIMATORS[estimator].label == "unbiased"
    assert torch.allclose(found, truth if unbiased else direct, rtol=1e-9, atol=1e-11)
    assert float((truth - direct).norm() / truth.norm()) > 0.01
    assert out.claim.label == KL_ESTIMATORS[estimator].label


def test_k3_is_the_other_way_round(make: Callable[..., Any], tuples: Callable[..., Any]) -> None:
    """Its expectation is grad KL(q || p) at each state; for one variance that is the direct part, in a single step."""
    world = make(1)
    noise = tuples(1, 2, 40)
    _, found, _ = gradient(world, noise, noise.n, "k3")
    theta = world.theta.detach()
    direct = grad(lambda th: exact_kl(world, th, theta))(theta)
    assert torch.allclose(found, direct, rtol=1e-5)


def test_a_kl_without_gradient_is_caught(make: Callable[..., Any], tuples: Callable[..., Any]) -> None:
    """Flow-Factory#122: the KL computed under no_grad. The loss is right, the gradient is nothing."""
    world = make(2)
    noise = tuples(2, 3, 4)
    ran = rollout(world.policy, noise, noise.n, (1,), dtype=torch.float64, num_generations=2)
    with torch.no_grad():
        wrong = kl_loss(world.policy, reference(world), ran, estimator="direct")
    right = kl_loss(world.policy, reference(world), ran)
    assert wrong.loss.item() == pytest.approx(right.loss.item(), rel=1e-12)
    assert not wrong.loss.requires_grad
    assert float(torch.autograd.grad(right.loss, world.theta)[0].abs().min()) > 0


def test_exact_has_the_least_variance_of_the_unbiased(make: Callable[..., Any]) -> None:
    world = make(2)
    ran = rollout(world.policy, Independent(0), 500, (1,), dtype=torch.float64)
    spread = {}
    for name in ("exact", "k1"):
        out = kl_loss(world.policy, reference(world), ran, estimator=name)  # pyright: ignore[reportArgumentType]
        spread[name] = float(world.per_run(out.each).var(0).sum())
    assert 3 * spread["exact"] < spread["k1"]


def test_at_the_reference_there_is_nothing_to_pay(world: Any) -> None:
    ran = rollout(world.policy, Independent(0), 8, (1,), dtype=torch.float64)
    out = kl_loss(world.policy, world.policy, ran)
    assert out.loss.item() == 0
    assert float(torch.autograd.grad(out.loss, world.theta)[0].abs().max()) == 0


def test_beta_finds_its_target() -> None:
    """A KL that falls as 1 / beta is steered to the target from both sides."""
    for start in (0.01, 10.0):
        control = BetaController(start, target=2.0)
        for _ in range(600):
            control = control.updated(1 / control.beta)
        assert 1 / control.beta == pytest.approx(2.0, rel=0.02)
    assert BetaController(0.3).updated(100.0).beta == 0.3


def test_bad_input(world: Any) -> None:
    ran = rollout(world.policy, Independent(0), 1, (1,), dtype=torch.float64)
    with pytest.raises(ValueError, match="'k4'; allowed: exact, direct, k1"):
        kl_loss(world.policy, world.policy, ran, estimator="k4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least 2 runs"):
        kl_loss(world.policy, world.policy, ran)
    with pytest.raises(ValueError, match="a target needs both above 0"):
        BetaController(0.0, target=1.0)
    window = rollout(world.policy, Independent(0), 4, (1,), steps=[1], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"kept steps \(1,\) and lacks \(0,\)"):
        kl_loss(world.policy, world.policy, window)
