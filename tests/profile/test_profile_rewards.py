"""Reward gradients in a profile: a small budget gets smaller and fewer batches, and says what it got."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowvar.process import CosineVP, GaussianTwin, PixelBasis, ReverseKernel
from lowvar.profile import EstimatorRow, RewardProfile, profile_reward, reward_gain, rewards
from lowvar.reward import Floor, Policy, RewardProblem, Scores


def problem() -> RewardProblem:
    schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
    twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
    policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
    return RewardProblem(policy, lambda x, p: x.sum(1), [shift], (2,))


class Ticking:
    """A clock in which everything takes a second."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self.ticks))


@pytest.mark.parametrize(("seconds", "batch", "repeats"), [(48.0, 32, 16), (12.0, 16, 16), (6.0, 16, 8)])
def test_a_budget_chooses_the_batches(
    seconds: float, batch: int, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two estimators take 3 seconds a batch of 32: 16 of them 48, of 16 runs 24; twice the budget may be spent."""
    clock: Any = Ticking()
    monkeypatch.setattr(rewards, "time", clock)
    found = profile_reward(problem(), "sum", seconds=seconds, among=[Scores("x0")])
    assert isinstance(found, RewardProfile)
    assert (found.batch, found.repeats) == (batch, repeats)
    plain = next(row for row in found.rows if row.name == found.plain)
    best = next(row for row in found.rows if row.name == "scores, x0 baseline")
    assert 0 < best.low < best.variance < best.high < plain.variance


def test_a_budget_below_the_least_is_answered_by_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = Ticking()
    monkeypatch.setattr(rewards, "time", clock)
    assert profile_reward(problem(), "sum", seconds=5.0, among=[Scores("x0")]) == 12.0


def test_a_reward_that_is_the_same_for_all_runs_recommends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variance anywhere: every factor is 1, and the plain estimator stays."""
    clock: Any = Ticking()
    monkeypatch.setattr(rewards, "time", clock)
    flat = replace(problem(), reward=lambda x, p: torch.ones(len(x)))
    found = profile_reward(flat, "flat", seconds=48.0, among=[Scores("x0")])
    assert isinstance(found, RewardProfile)
    assert [(row.variance, row.factor, row.factor_low) for row in found.rows] == [(0.0, 1.0, 1.0)] * 2
    line = reward_gain(found)
    assert (line.worth, line.do) == (False, f"another estimator than {found.plain} for reward flat")


def test_the_words_that_tune_can_be_typed() -> None:
    """A sum has a star in it, which shells read."""
    rows = [
        EstimatorRow(name, "unbiased", 1.0, 0.9, 1.1, 1.0, 1.0, factor, 0.9 * factor, 1.1 * factor)
        for name, factor in (("plain", 1.0), ("better", 3.0))
    ]
    found = RewardProfile("2*a+b", tuple(rows), "plain", "better", "", 32, 10.0, {}, 16)
    assert shlex.split(reward_gain(found, "lowvar tune --model m").command) == [
        *("lowvar", "tune", "--model", "m", "--reward", "2*a+b", "--estimator", "auto")
    ]
