r"""Branching rollouts: several ends of one beginning, so that credit goes to the steps that earned it.

A trunk runs to step k; from its state there m branches run on, each with noise of its own. With R_ji the reward of
branch i of trunk j, R_j their mean, and S the scores of the steps before and after the fork,

    g = 1/J sum_j [ S_j^before (R_j - mean of the other trunks)  +  1/m sum_i S_ji^after (R_ji - mean of the other i) ].

Unbiased: siblings share everything before the fork and nothing after it, so the mean of the others is a baseline that
knows the state and not the run's noise; for the trunk's steps R_j is an estimate of E[R | x_k], whose noise is 1/m of
one run's. A trunk with its branches costs k + m (K - k) steps and m reward calls.

The idea of resampling the rest of a run to find its value is old (Kearns, Mansour, Ng, "Approximate planning in large
POMDPs via reusable trajectories", 2000; "vine" rollouts in Schulman et al., "Trust region policy optimization", 2015);
the estimator above, with leave-one-out at both levels, is this package's own derivation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowvar.process.noise import NoiseSource
from lowvar.reward.advantages import advantages
from lowvar.reward.claims import Claim, combined
from lowvar.reward.estimators import RewardEstimator, RewardProblem
from lowvar.reward.history import History
from lowvar.reward.pathwise import RewardLoss
from lowvar.reward.policy import rows
from lowvar.reward.rewards import evaluated
from lowvar.reward.rollout import rollout
from lowvar.reward.surrogate import surrogate_loss

__all__ = ["Branches"]


@dataclass(frozen=True)
class Branches(RewardEstimator):
    """Scores with m ends a run. A batch of n runs is n / m trunks of neighbouring sample numbers.

    Args:
        fork: k, the step that branches begin with, at least 1.
        width: m, branches of a trunk, at least 2.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> Branches(3, width=4).name
        'scores, 4 branches from step 3'
    """

    multiplies: ClassVar[bool] = False

    fork: int
    width: int = 4

    def __post_init__(self) -> None:
        """Checks both."""
        if self.fork < 1 or self.width < 2:
            raise ValueError(f"fork is {self.fork}, width {self.width}; need a fork from 1 and a width from 2")

    @property
    def name(self) -> str:
        """See the base class."""
        return f"scores, {self.width} branches from step {self.fork}"

    def refusal(self, problem: RewardProblem) -> str | None:
        """See the base class."""
        policy = problem.policy
        if self.fork >= policy.steps:
            return f"the fork is at step {self.fork} of {policy.steps}"
        if policy.terminal == "pathwise":
            return "the last step is differentiated, and branches are of scores"
        if problem.num_generations % self.width:
            return f"{self.width} branches do not fill a group of {problem.num_generations}"
        return None

    def evaluations(self, problem: RewardProblem) -> float:
        """See the base class."""
        K = problem.policy.steps
        return 4.0 * (self.fork / self.width + K - self.fork)

    def __call__(
        self,
        problem: RewardProblem,
        noise: NoiseSource,
        n: int,
        first: int = 0,
        *,
        history: History | None = None,
    ) -> RewardLoss:
        """See the base class."""
        k, m, policy = self.fork, self.width, problem.policy
        reason = self.refusal(problem)
        if reason is not None or n % m or n < 2 * m:
            raise ValueError(reason or f"n is {n}; give a multiple of {m} branches, at least two trunks")
        index = first + torch.arange(n)
        prompts, columns = problem.given(index)
        how = {"x0_hat": False, "dtype": problem.dtype, "device": problem.device}
        stems = torch.arange(0, n, m)
        groups = torch.arange(n) // problem.num_generations
        # Trunk j takes the draws up to k of sample first + j, branch i those after k of first + i: no two are one.
        trunk = rollout(
            policy,
            noise,
            n // m,
            problem.shape,
            first=first,
            prompts=rows(prompts, stems),
            until=k,
            groups=groups[stems],
            **how,
        )
        at = trunk.samples.repeat_interleave(m, 0)
        ends = rollout(policy, noise, n, problem.shape, first=first, prompts=prompts, begin=(k, at), **how)
        R = evaluated(problem.reward, ends.samples, prompts, columns).detach()
        mean = R.reshape(-1, m).mean(1)
        alone = bool((trunk.groups.bincount() < 2).any())  # a group of one trunk: all trunks are compared
        before = advantages(mean, None if alone else trunk.groups, streams=trunk.streams)
        after = advantages(R, torch.arange(n) // m, streams=ends.streams)
        early = surrogate_loss(policy, trunk, before)
        late = surrogate_loss(policy, ends, after)
        each = early.each.repeat_interleave(m) + late.each
        claim = combined(Claim("none", source="own derivation"), policy.claim)
        return RewardLoss(each.mean(), each, R, ends.samples, 0, claim)
