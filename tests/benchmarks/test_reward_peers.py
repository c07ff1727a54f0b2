"""The comparators of benchmarks/reward.py: DDPO's published settings and sums, AWM's loss, and the shared gradient."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from reward_curves import TUNING_SEED, chosen, name_of, reached, settings  # type: ignore[import-not-found]
from reward_peers import AWM, DDPO, Optimiser, PromptStatistics  # type: ignore[import-not-found]
from reward_setting import (  # type: ignore[import-not-found]
    SCHEDULE,
    SHAPE,
    FlatMLP,
    policy_of,
    weighted_gradients,
)

from lowvar.process import Independent
from lowvar.reward import Policy, Rollout, RunningStatistics, advantages, rollout, surrogate_loss

PUBLISHED = {  # kvablack/ddpo-pytorch, config/base.py and config/dgx.py
    "learning_rate": 3e-5,
    "clip_range": 1e-4,
    "adv_clip_max": 10,
    "inner_epochs": 1,
    "minibatches": 4,  # 8 x 4 samples a device and epoch, 4 x 2 of them an update
}


@pytest.fixture(scope="module")
def world() -> tuple[Policy, Rollout, list[Tensor]]:
    network = FlatMLP(width=8, blocks=1)
    with torch.no_grad():  # its blocks begin at 0, where half of all gradients are
        for i, p in enumerate(network.parameters()):
            p.add_(0.1 * Independent(9).normal([i], p.shape)[0])
    labels = torch.arange(20) % 10
    policy = policy_of(network, steps=4)
    return (
        policy,
        rollout(policy, Independent(0), 20, SHAPE, prompts=labels, groups=labels),
        list(network.parameters()),
    )


def flat(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def test_ddpo_has_the_published_settings() -> None:
    made = DDPO()
    assert {name: getattr(made, name) for name in PUBLISHED} == PUBLISHED
    assert (made.statistics.size, made.statistics.minimum) == (16, 16)
    assert made.optimiser == Optimiser(0.9, 0.999, 1e-4, 1e-8, 1.0)


def test_its_statistics_by_hand_and_as_the_package_has_them() -> None:
    """Below 16 rewards a prompt takes the batch's mean and std, then its own last 16, this batch's among them."""
    groups, tracker, state = torch.arange(24) % 2, PromptStatistics(), RunningStatistics(buffer=16, minimum=16)
    R = own = torch.zeros(24)
    for batch in range(3):
        R = Independent(batch).normal(range(24), ()) * (1 + groups)
        own = tracker.advantages(groups, R)
        theirs = advantages(R, groups, baseline="running-including", scale_rewards="prompt", state=state)
        state = theirs.state
        torch.testing.assert_close(own, theirs.values, rtol=1e-4, atol=1e-4)
    kept = torch.tensor(list(tracker.seen[0]))
    assert len(kept) == 16
    assert float((own[0] - (R[0] - kept.mean()) / (kept.std(correction=0) + 1e-6)).abs()) < 1e-5


def test_before_it_moves_ddpo_is_the_score_function(world: Any) -> None:
    """Ratio 1: the minibatches' gradients add up to the scores', over pixels and steps; after a move they are cut."""
    policy, ran, parameters = world
    R = ran.samples.flatten(1).mean(1)
    made = DDPO()
    g = sum(flat(loss, parameters) for loss in made.losses(policy, ran, R, Independent(1), 0)) / made.minibatches
    A = PromptStatistics().advantages(ran.prompts, R)
    wanted = flat(surrogate_loss(policy, ran, A).loss, parameters) / 64 / policy.steps
    assert float((g - wanted).norm() / wanted.norm()) < 1e-3
    with torch.no_grad():
        parameters[-1].add_(0.1)
    moved = [flat(loss, parameters) for loss in DDPO().losses(policy, ran, R, Independent(1), 0)]
    loose = [flat(loss, parameters) for loss in DDPO(clip_range=10.0).losses(policy, ran, R, Independent(1), 0)]
    with torch.no_grad():
        parameters[-1].sub_(0.1)
    assert all(float(a.norm()) < float(b.norm()) for a, b in zip(moved, loose, strict=True))


def test_awm_is_the_pretraining_loss_by_advantages(world: Any) -> None:
    """Advantages of one make it the v loss itself; means of groups are 0, and one std is of all."""
    policy, ran, _ = world
    R = ran.samples.flatten(1).mean(1)
    A = AWM().advantages(ran.groups, R)
    assert all(abs(float(A[ran.groups == k].mean())) < 1e-5 for k in range(10))

    class Plain(AWM):
        def advantages(self, groups: Tensor, rewards: Tensor) -> Tensor:
            return torch.ones_like(rewards)

    found = Plain().loss(policy, ran, R, Independent(2))
    levels, total = policy.chain(ran.prompts).levels, 0.0
    for k in range(policy.steps):
        level = levels[k]
        eps = Independent(2).normal(ran.index, SHAPE, draw=1000 + k)
        alpha, sigma = float(level.alpha), float(level.sigma)
        x = alpha * ran.samples + sigma * eps
        network: Any = policy.bound(ran.prompts)
        out = network.network(
            x, torch.full((ran.n,), float(SCHEDULE.timestep(float(level.t)))), class_labels=ran.prompts
        )
        total += float((out.detach() - (alpha * eps - sigma * ran.samples)).square().mean()) / policy.steps
    assert abs(float(found.detach()) - total) < 2e-3 * total


def test_one_evaluation_of_all_steps_gives_the_package_gradients(world: Any) -> None:
    policy, ran, parameters = world
    R = ran.samples.flatten(1).mean(1)
    given = [advantages(R, ran.groups).values, (R + torch.arange(policy.steps)[:, None])]
    found = weighted_gradients(policy, ran, given, parameters)
    for A, g in zip(given, found, strict=True):
        wanted = -flat(surrogate_loss(policy, ran, A).loss, parameters)
        assert float((g - wanted).norm() / wanted.norm()) < 1e-3


def test_what_a_curve_needs_to_the_fixed_reward() -> None:
    """One standard deviation of the reward before tuning, linear between judgements; None where it is not reached."""

    def at(calls: int, reward: float, kl: float) -> dict[str, float]:
        return {"calls": calls, "reward": reward, "std": 2.0, "kl": kl, "energy": kl / 10, "right": 0.5}

    curve = [at(0, 1.0, 0.0), at(30, 2.0, 1.0), at(60, 4.0, 4.0)]
    assert reached(curve) == {"calls": 45, "kl": 2.5, "energy": 0.25, "right": 0.5}
    assert reached(curve[:2]) is None


def test_ours_is_chosen_under_the_kl_of_ddpo() -> None:
    """By the tuning seed alone: a setting of ours with fewer calls and more KL than DDPO's is not taken."""

    def run(calls: int, kl: float) -> dict[str, Any]:
        start = {"calls": 0, "reward": 0.0, "std": 1.0, "kl": 0.0, "energy": 0.0, "right": 1.0}
        return {"curve": [start, start | {"calls": calls, "reward": 1.0, "kl": kl, "energy": kl}]}

    slow, fast = settings("ddpo", "jpeg")[:2]
    near, far = settings("ours", "jpeg")[:2]
    given = {slow: (600, 5.0), fast: (100, 20.0), near: (50, 4.0), far: (10, 30.0)}
    runs = {name_of("jpeg", setting, TUNING_SEED): run(*point) for setting, point in given.items()}
    found = chosen(runs, "jpeg")
    assert found == {"fast": {"ddpo": fast, "ours": near}, "careful": {"ddpo": slow, "ours": near}}
