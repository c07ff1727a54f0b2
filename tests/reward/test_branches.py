"""Branching rollouts on the linear-Gaussian chain: no bias, less variance at equal cost, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.process import Independent
from lowvar.process.noise import NoiseSource
from lowvar.reward import Branches, RewardProblem, Scores, gradient_report
from lowvar.testing.affine import HermiteNoise


class Trees(NoiseSource):
    """Trees of two trunks and two branches each, integrated: a step before the fork, one after it.

    A tree is a point of the rule: start and first step of its trunks, then the last steps of its four branches. Trunk j
    of all is in tree j // 2, branch i in tree i // 4.
    """

    def __init__(self, nodes: int) -> None:
        self.rule = HermiteNoise(8, nodes)
        self.weights = self.rule.weights
        self.n = 4 * len(self.weights)

    def normal(self, index: Any, shape: Any, *, draw: int = 0, dtype: Any = None, device: Any = "cpu") -> Tensor:
        index = torch.as_tensor(index)
        if draw < 2:
            return self.rule.points[index // 2, 2 * (index % 2) + draw].reshape(-1, *shape)
        return self.rule.points[index // 4, 4 + index % 4].reshape(-1, *shape)

    def uniform(self, index: Any, shape: Any, *, draw: int = 0, dtype: Any = None, device: Any = "cpu") -> Tensor:
        raise AssertionError("nothing here is uniform")


def test_the_expectation_is_the_gradient(make: Callable[..., Any]) -> None:
    """Every tree of the rule by its weight. A term is of degree 3 in each noise at most: 2 nodes integrate it."""
    world, noise = make(2), Trees(2)
    problem = RewardProblem(world.policy, world.reward, [world.theta], (1,), num_generations=4, dtype=torch.float64)
    out = Branches(1, width=2)(problem, noise, noise.n)
    mean = -torch.autograd.grad(noise.weights @ out.each.reshape(-1, 4).mean(1), world.theta)[0].flatten()
    assert out.claim.label == "unbiased"
    assert torch.allclose(mean, world.exact.gradient(), rtol=1e-9, atol=1e-9)


def test_less_variance_at_equal_evaluations(make: Callable[..., Any]) -> None:
    """A longer chain: variance x evaluations below leave-one-out's, by more than both intervals."""
    world = make(6)
    problem = RewardProblem(world.policy, world.reward, [world.theta], (1,), num_generations=8, dtype=torch.float64)
    among = [Scores(), Branches(3, width=4)]
    rows = gradient_report(problem, among, Independent(0), n=256, repeats=48, cost="evaluations").rows
    plain, forked = (rows[e.name] for e in among)
    assert forked.evaluations == 4 * (3 / 4 + 3) < plain.evaluations == 24
    assert forked.high * forked.evaluations < plain.low * plain.evaluations
    assert not forked.disagrees(plain)


def test_refusals(world: Any) -> None:
    problem = RewardProblem(world.policy, world.reward, [world.theta], (1,), num_generations=4, dtype=torch.float64)
    assert Branches(2).refusal(problem) == "the fork is at step 2 of 2"
    assert Branches(1, width=3).refusal(problem) == "3 branches do not fill a group of 4"
    with pytest.raises(ValueError, match="n is 6; give a multiple of 4"):
        Branches(1)(problem, Independent(0), 6)
    with pytest.raises(ValueError, match="fork is 0"):
        Branches(0)
