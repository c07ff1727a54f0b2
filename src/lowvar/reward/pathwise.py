r"""Gradients of a differentiable reward through the reverse process, in full or in part.

    grad E R(x_0) = E [dR/dx_0 . dx_0/dtheta],     x_0 a function of theta and of the noise.

    Full()                  every step. Unbiased; its variance explodes where the chain expands (see below)
    Last(k)                 the last k steps (DRaFT-K). Biased by what the earlier ones contribute
    Last(k, rest="score")   the last k pathwise, the rest by scores: unbiased, and no derivative crosses the early steps
    RandomTruncation()      the last k, k drawn once a batch (AlignProp). Biased, less than a fixed k of the same cost
    Roulette(keep)          goes on to the step before with probability `keep`, divided by it. Unbiased; one coin a
                            batch and step, so what the coins add does not average over the batch
    LastAveraged(m)         the last step, at m fresh noisings of the sample (DRaFT-LV). Biased like Last(1), less noise

Neither family is safe unmeasured. Where the reverse process decides between modes, dx_0/dtheta is a product of large
factors and the pathwise variance exceeds the score function's by orders of magnitude; on unimodal data it is the other
way round. `gradient_report` measures it.

A step is not differentiated at the price of its memory: `checkpoint` steps are computed again in the backward pass
(`lowvar.gradients.chain`), and steps without gradient keep nothing.

Sources: K. Clark, P. Vicol, K. Swersky, D. Fleet, "Directly fine-tuning diffusion models on differentiable rewards",
2024 (DRaFT-K, DRaFT-LV); M. Prabhudesai, A. Goyal, D. Pathak, K. Fragkiadaki, "Aligning text-to-image diffusion models
with reward backpropagation", 2023 (random truncation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lowvar.gradients import Roulette
from lowvar.gradients.chain import ReverseChain, StepRule
from lowvar.process.noise import NoiseSource
from lowvar.reward.advantages import Advantages, advantages
from lowvar.reward.claims import Claim, beside_paths, combined
from lowvar.reward.policy import Policy
from lowvar.reward.rewards import Reward, evaluated, is_differentiable
from lowvar.reward.rollout import Rollout, rollout
from lowvar.reward.surrogate import surrogate_loss

__all__ = [
    "AdvantageRule",
    "Full",
    "Last",
    "LastAveraged",
    "PathwiseRule",
    "RandomTruncation",
    "RewardLoss",
    "Roulette",
    "leave_one_out",
    "pathwise_loss",
]

AdvantageRule = Callable[[Rollout, Tensor], Advantages | Tensor]


def leave_one_out(ran: Rollout, rewards: Tensor) -> Advantages:
    """Rewards less the mean of the others of the group: the usual advantage rule."""
    return advantages(rewards, ran.groups, streams=ran.streams)


@dataclass(frozen=True)
class Full:
    """Every step."""

    @property
    def claim(self) -> Claim:
        """Unbiased."""
        return Claim("none")


@dataclass(frozen=True)
class Last:
    """The last k steps, the one to clean data among them.

    Args:
        k: at least 1.
        rest: what happens to those before: nothing ("stop"), or "score".

    Raises:
        ValueError: if k is below 1 or the rest unknown.
    """

    k: int
    rest: Literal["stop", "score"] = "stop"

    def __post_init__(self) -> None:
        """Checks both."""
        if self.k < 1 or self.rest not in ("stop", "score"):
            raise ValueError(f"Last(k={self.k}, rest={self.rest!r}); allowed: k >= 1, rest 'stop' or 'score'")

    @property
    def claim(self) -> Claim:
        """Unbiased with scores."""
        if self.rest == "score":
            return Claim("none", source="own derivation")
        return Claim("truncation", f"the last {self.k} steps only", "Clark et al. 2024")


@dataclass(frozen=True)
class RandomTruncation:
    """The last k steps, k uniform from `low` to `high` and drawn once a batch.

    Args:
        low: least k, at least 1.
        high: greatest k; None: all steps.

    Raises:
        ValueError: if the range is empty.
    """

    low: int = 1
    high: int | None = None

    def __post_init__(self) -> None:
        """Checks the range."""
        if self.low < 1 or (self.high is not None and self.high < self.low):
            raise ValueError(f"k from {self.low} to {self.high}; need 1 <= low <= high")

    @property
    def claim(self) -> Claim:
        """Biased."""
        return Claim("truncation", "early steps are left out with positive probability", "Prabhudesai et al. 2023")

    def drawn(self, u: float, steps: int) -> int:
        """The k of a uniform number u.

        Raises:
            ValueError: if the range is longer than the chain.
        """
        high = steps if self.high is None else self.high
        if max(self.low, high) > steps:
            raise ValueError(f"k goes up to {max(self.low, high)}, the chain has {steps} steps")
        return self.low + min(int(u * (high - self.low + 1)), high - self.low)


@dataclass(frozen=True)
class LastAveraged:
    """The last step, averaged over `m` noisings of the sample.

    Args:
        m: at least 1.

    Raises:
        ValueError: if it is not.
    """

    m: int = 2

    def __post_init__(self) -> None:
        """Checks the number."""
        if self.m < 1:
            raise ValueError(f"m is {self.m}; give at least 1 noising")

    @property
    def claim(self) -> Claim:
        """Biased."""
        return Claim("truncation", "the last step only, at states noised anew", "Clark et al. 2024")


PathwiseRule = Full | Last | RandomTruncation | Roulette | LastAveraged


@dataclass(frozen=True, eq=False)
class RewardLoss:
    """Of a batch of runs.

    Attributes:
        loss: to be minimised: its gradient is minus the estimate of grad E R.
        each: the runs' terms, (n,); loss is their mean.
        rewards: R, (n,), without gradient.
        samples: x_0, (n, *shape), without gradient.
        steps: how many steps were differentiated.
        claim: what holds for the estimate.
        ran: the rollout of the steps by scores, where there are any.
    """

    loss: Tensor
    each: Tensor
    rewards: Tensor
    samples: Tensor
    steps: int
    claim: Claim
    ran: Rollout | None = None


def pathwise_loss(
    policy: Policy,
    reward: Reward,
    noise: NoiseSource,
    n: int,
    shape: Sequence[int],
    *,
    rule: PathwiseRule | None = None,
    advantage: AdvantageRule = leave_one_out,
    first: int = 0,
    prompts: Any = None,
    columns: Mapping[str, Any] | None = None,
    groups: Tensor | None = None,
    num_generations: int | None = None,
    checkpoint: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> RewardLoss:
    """Runs the policy and differentiates the reward through it.

    A policy whose last step is "drop" or "pathwise" is differentiated there, as by any of these rules.

    Args:
        policy: the policy.
        reward: differentiable.
        noise: source of the noise; the number of a random truncation is draw K + 1 of the first sample.
        n, shape, first, prompts, groups, num_generations, dtype, device: as of `rollout`.
        rule: how far the derivative goes; None: `Full()`.
        advantage: for the steps by scores.
        columns: further arguments of the reward.
        checkpoint: steps that are computed again together; 0 keeps the graph.

    Raises:
        ValueError: if the reward is not differentiable or the rule does not fit the policy.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> def total(x, prompts):
        ...     return x.sum(1)
        >>> total.differentiable = True
        >>> out = pathwise_loss(policy, total, Independent(0), 8, (2,), rule=Last(2))
        >>> out.loss.backward()
        >>> out.steps, out.claim.bias, bool((shift.grad < 0).all())
        (2, 'truncation', True)
    """
    if not is_differentiable(reward):
        raise ValueError("the reward has no derivative; set reward.differentiable = True if it has, or use scores")
    rule = Full() if rule is None else rule
    K, index = policy.steps, first + torch.arange(n)
    run = {"first": first, "prompts": prompts, "dtype": dtype, "device": device}
    how = {"checkpoint": checkpoint, "dtype": dtype, "device": device}

    def cost(x: Tensor) -> Tensor:
        return -evaluated(reward, x, prompts, columns)

    chain = policy.chain(prompts)
    if isinstance(rule, LastAveraged):
        ran = rollout(policy, noise, n, shape, steps=[K - 1], x0_hat=False, **run)
        each = _averaged(chain, ran.samples, cost, noise, index, rule.m)
        rewards = evaluated(reward, ran.samples, prompts, columns)
        return RewardLoss(each.mean(), each, rewards, ran.samples, 1, rule.claim)
    k, claim = K, Claim("none", source="own derivation") if isinstance(rule, Roulette) else rule.claim
    if isinstance(rule, RandomTruncation):
        k = rule.drawn(float(noise.uniform(index[:1], (), draw=K + 1, dtype=torch.float64)), K)
    if isinstance(rule, Last):
        if rule.k > K:
            raise ValueError(f"the last {rule.k} steps of a chain of {K}")
        k = rule.k
    every: StepRule | list[StepRule] = "pathwise"
    if isinstance(rule, Roulette):
        every = ["pathwise", *[rule] * (K - 1)]
    if k == K:
        out = chain.surrogate(cost, noise, index, shape, rules=every, **how)
        return RewardLoss(out.loss, out.each, -out.costs, out.samples, K, claim)
    scores = isinstance(rule, Last) and rule.rest == "score"
    early = range(K - k) if scores else [K - k - 1]
    ran = rollout(
        policy, noise, n, shape, steps=early, until=K - k, groups=groups, num_generations=num_generations, **run
    )
    out = chain.surrogate(cost, noise, index, shape, rules=every, begin=(K - k, ran.samples), **how)
    each = out.each
    if scores:
        given = advantage(ran, -out.costs)
        claim = combined(claim, beside_paths(given.claim)) if isinstance(given, Advantages) else claim
        early_policy = replace(policy, terminal="drop") if policy.terminal == "pathwise" else policy
        each = each + surrogate_loss(early_policy, ran, given).each
    return RewardLoss(each.mean(), each, -out.costs, out.samples, k, claim)


def _averaged(
    chain: ReverseChain, x0: Tensor, cost: Callable[[Tensor], Tensor], noise: NoiseSource, index: Tensor, m: int
) -> Tensor:
    """Mean over noisings x = alpha x_0 + sigma eps at the last level of the cost of x0_hat(x) (Clark et al. 2024)."""
    K = chain.steps
    level = chain.levels[K - 1]
    total = x0.new_zeros(len(x0))
    for i in range(m):
        eps = noise.normal(index, x0.shape[1:], draw=K + 2 + i, dtype=x0.dtype, device=x0.device)
        x = float(level.alpha) * x0 + float(level.sigma) * eps
        total = total + cost(chain.law(K - 1, x).mean)
    return total / m
