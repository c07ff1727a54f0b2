"""Policies: every Gaussian kernel, the last step's rule, guidance, prompts; bugs that others have shipped, put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import (
    CosineVP,
    Flow,
    Guided,
    Heun,
    Independent,
    MultistepSolver,
    PixelBasis,
    ReverseKernel,
    WithNoise,
)
from lowvar.process.covariance import Isotropic
from lowvar.process.denoiser import Denoiser, NetworkDenoiser, WithCovariance
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level
from lowvar.reward import (
    Floor,
    Full,
    Last,
    Policy,
    advantages,
    kl_loss,
    pathwise_loss,
    reward_gradient,
    rollout,
    surrogate_loss,
    surrogate_losses,
    x0_baseline,
)
from lowvar.sample import generate
from lowvar.testing.affine import AffineDenoiser, HermiteNoise, exact_affine, linear_policy

SCHEDULE, FLOOR = CosineVP(), Floor(0.2)
GRID = torch.tensor([0.95, 0.6, 0.0], dtype=torch.float64)


def reward(x: Tensor, prompts: Any = None) -> Tensor:
    return -((x[:, 0] - 1.5) ** 2)


reward.differentiable = True  # pyright: ignore[reportFunctionMemberAccess]


def parameters(schedule: Any = SCHEDULE) -> Tensor:
    return exact_affine(schedule, GRID, 0.5, 0.25).clone().requires_grad_()


def scored(policy: Policy, theta: Any, noise: HermiteNoise, **how: Any) -> Any:
    ran = rollout(policy, noise, len(noise.weights), (1,), dtype=torch.float64, **how)
    R, slope = reward_gradient(reward, ran.samples)
    loss = surrogate_loss(policy, ran, advantages(R, baseline=-1.0), reward_gradient=slope)
    return [-g for g in torch.autograd.grad(noise.weights @ loss.each, theta)]


def differentiated(policy: Policy, theta: Any, noise: HermiteNoise, **how: Any) -> Any:
    out = pathwise_loss(
        policy, reward, noise, len(noise.weights), (1,), rule=Full(), checkpoint=0, dtype=torch.float64, **how
    )
    return [-g for g in torch.autograd.grad(noise.weights @ out.each, theta)]


def kernels() -> dict[str, Callable[[], tuple[Policy, Tensor]]]:
    def made(kernel: Any, schedule: Any = SCHEDULE, wrap: Any = None, terminal: Any = FLOOR) -> Any:
        def policy() -> tuple[Policy, Tensor]:
            theta = parameters(schedule)
            inner = AffineDenoiser(theta, schedule, GRID)
            denoiser = inner if wrap is None else WithCovariance(inner, wrap)
            return Policy(denoiser, kernel, GRID, terminal), theta

        return policy

    def C(x: Tensor, level: Level, posterior: Posterior) -> Isotropic:
        return Isotropic(torch.full((1,), 0.15, dtype=torch.float64), x.shape[1:])

    noisy = WithNoise(
        ReverseKernel(0.5, "small"), PixelBasis((1,)), SCHEDULE.at(GRID).logsnr, torch.full((2, 1), 0.1).double()
    )
    return {
        "ddpm": made(ReverseKernel(variance="small")),
        "large": made(ReverseKernel(variance="large")),
        "ddim": made(ReverseKernel(eta=0.4, variance="small")),
        "flow": made(ReverseKernel(variance="small"), Flow()),
        "calibrated": made(ReverseKernel(eta=0.7), wrap=C),
        "decoder": made(ReverseKernel(last="decoder"), wrap=C, terminal=None),
        "with noise": made(noisy),
    }


@pytest.mark.parametrize("name", list(kernels()))
def test_scores_and_paths_of_every_kernel_have_one_expectation(name: str) -> None:
    policy, theta = kernels()[name]()
    noise = HermiteNoise(3, 6)
    assert policy.scored == (0, 1)
    for a, b in zip(scored(policy, theta, noise), differentiated(policy, theta, noise), strict=True):
        assert float(b.abs().min()) > 1e-3
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_states_are_those_of_the_sampler() -> None:
    theta = parameters()
    denoiser, kernel = AffineDenoiser(theta, SCHEDULE, GRID), ReverseKernel(variance="small")
    ran = rollout(Policy(denoiser, kernel, GRID, "pathwise"), Independent(4), 5, (1,), first=7, dtype=torch.float64)
    same = generate(denoiser, kernel, GRID, (1,), 5, Independent(4), first=7, dtype=torch.float64)
    assert torch.equal(ran.samples, same)


@pytest.mark.parametrize("window", [None, [0], [1]])
def test_a_differentiated_last_step_is_never_lost(window: Any) -> None:
    """terminal="pathwise": unbiased for the sampler without noise at the end, whatever the window leaves out."""
    theta = parameters()
    denoiser = AffineDenoiser(theta, SCHEDULE, GRID)
    policy = Policy(denoiser, ReverseKernel(variance="small"), GRID, "pathwise")
    truth = linear_policy(denoiser, [-2.25, 3.0, -1.0]).gradient()
    found = scored(policy, theta, HermiteNoise(3, 6), steps=window)[0].flatten()
    assert torch.allclose(found[2:], truth[2:], rtol=1e-9)
    assert torch.allclose(found, truth, rtol=1e-9) == (window != [1])  # step 1 is the last: step 0 was left out
    mixed = pathwise_loss(
        policy, reward, HermiteNoise(3, 6), 216, (1,), rule=Last(1, "score"), checkpoint=0, dtype=torch.float64,
        advantage=lambda ran, R: advantages(R, baseline="none"),
    )  # fmt: skip
    g = torch.autograd.grad(-(HermiteNoise(3, 6).weights @ mixed.each), theta)[0].flatten()
    assert torch.allclose(g, truth, rtol=1e-9)


@pytest.mark.parametrize(("steps", "share"), [(10, 0.37), (50, 0.20)])
def test_dropping_the_last_step_loses_its_share_and_says_so(steps: int, share: float) -> None:
    """DanceGRPO#99. Along all levels' shifts; the exact chain's figure, and what the code does on two steps."""
    grid = torch.linspace(0.99, 0, steps + 1, dtype=torch.float64)
    denoiser = AffineDenoiser(exact_affine(SCHEDULE, grid, 0.5, 0.25), SCHEDULE, grid)
    chain = linear_policy(denoiser, [-2.25, 3.0, -1.0], floor=0.05)
    whole = chain.gradient()
    lost = float(whole[-2:].abs().sum() / whole.abs().sum())
    assert lost == pytest.approx(share, abs=0.02)
    theta = parameters()
    dropped = Policy(AffineDenoiser(theta, SCHEDULE, GRID), ReverseKernel(variance="small"), GRID, "drop")
    assert dropped.claim.bias == "truncation"
    g = scored(dropped, theta, HermiteNoise(3, 6))[0].flatten()
    truth = linear_policy(AffineDenoiser(theta, SCHEDULE, GRID), [-2.25, 3.0, -1.0]).gradient()
    assert float(g[2:].abs().max()) == 0
    assert torch.allclose(g[:2], truth[:2], rtol=1e-9)


class Detached(Denoiser):
    """A branch without gradient: what Flow-GRPO does to the unconditional one."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.schedule = inner, inner.schedule

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        return Posterior(self.inner(x, level).mean.detach())


def test_gradients_go_through_both_branches_of_guidance() -> None:
    """Guidance is affine in both branches, so the guided chain is a linear one: exact for each; detached is caught."""
    c = exact_affine(SCHEDULE, GRID, 0.8, 0.2).requires_grad_()
    u = exact_affine(SCHEDULE, GRID, 0.3, 0.4).requires_grad_()
    w, noise, kernel = 2.5, HermiteNoise(3, 6), ReverseKernel(variance="small")
    both = [AffineDenoiser(theta, SCHEDULE, GRID) for theta in (c, u)]
    policy = Policy(Guided(both[0], both[1], w), kernel, GRID, Floor(0.2))
    guided = AffineDenoiser((u + w * (c - u)).detach(), SCHEDULE, GRID)
    truth = linear_policy(guided, [-2.25, 3.0, -1.0], floor=0.2).gradient().reshape(2, 2)
    for found in (scored(policy, [c, u], noise), differentiated(policy, [c, u], noise)):
        assert torch.allclose(found[0], w * truth, rtol=1e-9)
        assert torch.allclose(found[1], (1 - w) * truth, rtol=1e-9)
    shared = c.detach().clone().requires_grad_()
    one = AffineDenoiser(shared, SCHEDULE, GRID)
    right = scored(Policy(Guided(one, one, w), kernel, GRID, Floor(0.2)), shared, noise)[0]
    wrong = scored(Policy(Guided(one, Detached(one), w), kernel, GRID, Floor(0.2)), shared, noise)[0]
    assert torch.allclose(wrong, w * right, rtol=1e-9)  # 2.5 times what it should be


def test_prompts_reach_the_network_batch_by_batch() -> None:
    network = torch.nn.Embedding(3, 1).double()

    def denoiser(labels: Tensor) -> NetworkDenoiser:
        return NetworkDenoiser(
            lambda x, t, label: 0.5 * x + network(label), SCHEDULE, "sample", conditioning={"label": labels}
        )

    policy = Policy(denoiser, ReverseKernel(variance="small"), GRID, Floor(0.2))
    prompts = torch.tensor([0, 0, 2, 2])
    grads = []
    for size in (4, 3):
        ran = rollout(
            policy, Independent(0), 4, (1,), prompts=prompts, num_generations=2, batch_size=size, dtype=torch.float64
        )
        loss = surrogate_loss(policy, ran, advantages(ran.samples[:, 0], ran.groups)).loss
        grads.append(torch.autograd.grad(loss, network.weight)[0])
    assert torch.allclose(grads[0], grads[1], atol=1e-14)
    assert float(grads[0][1].abs()) == 0
    assert float(grads[0][[0, 2]].abs().min()) > 0
    with pytest.raises(ValueError, match="this policy is conditional"):
        rollout(policy, Independent(0), 4, (1,))
    plain = Policy(denoiser(prompts), ReverseKernel(variance="small"), GRID, Floor(0.2))
    with pytest.raises(ValueError, match="the denoiser is one for all"):
        rollout(plain, Independent(0), 4, (1,), prompts=prompts)


def test_a_step_at_a_time_adds_up() -> None:
    theta = parameters()
    policy = Policy(AffineDenoiser(theta, SCHEDULE, GRID), ReverseKernel(variance="small"), GRID, Floor(0.2))
    ran = rollout(policy, Independent(0), 16, (1,), dtype=torch.float64)
    A = advantages(reward(ran.samples))
    whole = torch.autograd.grad(surrogate_loss(policy, ran, A).loss, theta)[0]
    for part in surrogate_losses(policy, ran, A):
        part.loss.backward()
    assert theta.grad is not None
    assert torch.allclose(theta.grad, whole, atol=1e-14)
    parts = sum(
        torch.autograd.grad(surrogate_loss(policy, ran.part(i), A.values[i]).loss, theta)[0] / 2
        for i in (torch.arange(8), torch.arange(8, 16))
    )
    assert torch.allclose(torch.as_tensor(parts), whole, atol=1e-14)


def test_branches_share_a_prefix() -> None:
    """Runs that begin from common states are rollouts like others: their scores belong to the steps after."""
    theta = parameters()
    policy = Policy(AffineDenoiser(theta, SCHEDULE, GRID), ReverseKernel(variance="small"), GRID, Floor(0.2))
    trunk = rollout(policy, Independent(0), 3, (1,), until=1, dtype=torch.float64)
    states = trunk.samples.repeat_interleave(4, 0)
    ran = rollout(policy, Independent(1), 12, (1,), begin=(1, states), num_generations=4, dtype=torch.float64)
    assert ran.steps == (1,)
    assert torch.equal(ran.states[0], states)
    g = torch.autograd.grad(surrogate_loss(policy, ran, advantages(reward(ran.samples), ran.groups)).loss, theta)[0]
    assert float(g[0].abs().max()) == 0 < float(g[1].abs().min())


def test_the_x0_baseline_is_near_the_exact_value(make: Callable[..., Any]) -> None:
    """Cross-fitted on 512 runs: no bias that 512 x 30 runs would show, and a variance near that of V itself."""
    world, grads = make(3, 2), []
    for batch in range(30):
        ran = rollout(world.policy, Independent(0), 512, (1,), first=512 * batch, dtype=torch.float64, batch_size=512)
        R = world.reward(ran.samples)
        loss = surrogate_loss(world.policy, ran, advantages(R, baseline=x0_baseline(ran, R))).loss
        grads.append(-torch.autograd.grad(loss, world.theta)[0].flatten())
    g = torch.stack(grads)
    variance, best = 512 * float(g.var(0).sum()), world.exact.values().variance
    assert variance == pytest.approx(best, rel=0.35)
    assert variance < 0.5 * world.exact.leave_one_out(8).variance
    assert float((g.mean(0) - world.exact.gradient()).norm()) < 4 * (variance / 512 / 30) ** 0.5


def test_bad_input() -> None:
    denoiser = AffineDenoiser(parameters(), SCHEDULE, GRID)
    small = ReverseKernel(variance="small")
    with pytest.raises(ValueError, match=r"no log-probability; choose terminal=Floor\(0.05\)"):
        Policy(denoiser, small, GRID)
    with pytest.raises(ValueError, match="adds no noise, so its actions have no probabilities"):
        Policy(denoiser, ReverseKernel(eta=0.0, variance="small"), GRID, Floor(0.1))
    with pytest.raises(ValueError, match="every step has noise"):
        Policy(denoiser, small, torch.tensor([0.9, 0.2]), Floor(0.1))
    with pytest.raises(ValueError, match="terminal is 'skip'; allowed: "):
        Policy(denoiser, small, GRID, "skip")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the floor is 0"):
        Floor(0.0)
    for solver in (MultistepSolver(tau=1.0), Heun(churn=10.0, schedule=SCHEDULE)):
        other = Policy(denoiser, solver, GRID, Floor(0.1))
        with pytest.raises(ValueError, match="give a solver whose steps are Gaussian kernels"):
            rollout(other, Independent(0), 2, (1,), dtype=torch.float64)
    policy = Policy(denoiser, small, GRID, Floor(0.1))
    ran = rollout(policy, Independent(0), 4, (1,), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"advantages have shape \(3,\)"):
        surrogate_loss(policy, ran, torch.zeros(3))
    with pytest.raises(ValueError, match="one bound in two units"):
        surrogate_loss(policy, ran, torch.zeros(4), epsilon=0.1, trust_nats=0.1)
    with pytest.raises(ValueError, match="num_generations is 3 and n 4"):
        rollout(policy, Independent(0), 4, (1,), num_generations=3)
    with pytest.raises(ValueError, match="needs reward_gradient"):
        surrogate_loss(replace(policy, terminal="pathwise"), ran, torch.zeros(4))
    with pytest.raises(ValueError, match="or other times"):
        kl_loss(policy, Policy(denoiser, small, GRID * 0.9, Floor(0.1)), ran)
    with pytest.raises(ValueError, match="the reward has no derivative"):
        pathwise_loss(policy, lambda x, p: x[:, 0], Independent(0), 4, (1,))
