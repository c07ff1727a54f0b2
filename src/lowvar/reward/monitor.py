r"""What the tuned sampler is worth, on runs that training never sees: reward, KL and held-out quality.

A reward that rises says little: a policy finds what the reward forgot (reward hacking). So three numbers stand side by
side, each with a 95% interval, on the same runs at every check:

    reward    mean of R over the sampler as it will be used: without the noise that a `Floor` adds to the last step
    kl        mean over runs of the exact KL of the steps to the reference, nats
    quality   a distance to held-out data (`lowvar.metrics.Scorer`); smaller is better

Since the noise is common, differences between checks are far surer than the intervals of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowvar.metrics.intervals import Interval
from lowvar.process.noise import NoiseSource
from lowvar.reward.estimators import RewardProblem
from lowvar.reward.policy import Floor, Policy
from lowvar.reward.rewards import evaluated

__all__ = ["HELD_OUT", "Check", "Monitor", "changed", "mean_interval"]

HELD_OUT = 2**41  # first run of checks; neither training nor pilots get there


def mean_interval(values: Tensor) -> Interval:
    """The mean of independent values (n,) with its 95% interval.

    Example:
        >>> found = mean_interval(torch.tensor([1.0, 3.0]))
        >>> found.value, found.se
        (2.0, 1.0)
    """
    x = values.detach().double()
    mean, se = float(x.mean()), float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Interval(mean, mean - 1.96 * se, mean + 1.96 * se, se)


@dataclass(frozen=True, eq=False)
class Check:
    """Of the parameters as they were.

    Attributes:
        reward, kl, quality: see the module; quality is None where nothing scores it.
        rewards: of each run, (n,): differences of checks are paired.
        samples: x_0, (n, *shape), on the CPU.
    """

    reward: Interval
    kl: Interval
    quality: Interval | None
    rewards: Tensor = field(repr=False)
    samples: Tensor = field(repr=False)

    def plain(self) -> dict[str, Any]:
        """The numbers, for a record."""
        found: dict[str, Any] = {}
        for name in ("reward", "kl", "quality"):
            i: Interval | None = getattr(self, name)
            found[name] = None if i is None else {"value": i.value, "low": i.low, "high": i.high}
        return found


@dataclass(frozen=True, eq=False)
class Monitor:
    """Checks the policy of a problem.

    Args:
        problem: whose policy, reward and prompts.
        noise: of the runs `HELD_OUT` ...
        n: runs, at least 2.
        reference: the policy that the KL is to; None: KL is not measured.
        quality: from samples (n, *shape) to a distance with its interval; None: none.
        batch_size: runs at once.

    Raises:
        ValueError: if n is below 2.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> problem = RewardProblem(policy, lambda x, p: x.sum(1), [shift], (2,))
        >>> found = Monitor(problem, Independent(0), 64, reference=policy)()
        >>> found.kl.value, abs(found.reward.value) < 4 * found.reward.se
        (0.0, True)
    """

    problem: RewardProblem
    noise: NoiseSource
    n: int = 512
    reference: Policy | None = None
    quality: Callable[[Tensor], Interval] | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        """Checks the number."""
        if self.n < 2:
            raise ValueError(f"n is {self.n}; an interval needs at least 2 runs")

    @torch.no_grad()
    def __call__(self, progress: Callable[[int], object] | None = None) -> Check:
        """Runs the policy; `progress` is told the runs done."""
        samples, kl, rewards = [], [], []
        for part in torch.arange(self.n).split(self.batch_size):
            index = HELD_OUT + part
            x, nats = self._run(index)
            prompts, columns = self.problem.given(index)
            samples.append(x.float().cpu())
            kl.append(nats.cpu())
            rewards.append(evaluated(self.problem.reward, x, prompts, columns).detach().cpu())
            if progress is not None:
                progress(len(part))
        x = torch.cat(samples)
        R = torch.cat(rewards)
        return Check(
            mean_interval(R), mean_interval(torch.cat(kl)), None if self.quality is None else self.quality(x), R, x
        )

    def _run(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Samples without the floor's noise, and each run's KL."""
        problem, policy = self.problem, self.problem.policy
        prompts, _ = problem.given(index)
        chain = policy.chain(prompts)
        q = None if self.reference is None else self.reference.chain(prompts)
        x = chain.start(self.noise, index, problem.shape, dtype=problem.dtype, device=problem.device)
        kl = x.new_full((len(index),), math.nan if q is None else 0.0)
        for k in range(policy.steps):
            law = chain.law(k, x)
            if q is not None and k in policy.scored:
                kl = kl + law.kl(q.law(k, x))
            last = k + 1 == policy.steps and isinstance(policy.terminal, Floor)
            y = law.mean
            if chain.noisy(k) and not last:
                y = law.sample(self.noise.normal(index, x.shape[1:], draw=k + 1, dtype=x.dtype, device=x.device))
            x = y
        return x, kl


def changed(before: Check, after: Check) -> Mapping[str, float]:
    """The paired rise of the reward with its interval."""
    i = mean_interval(after.rewards - before.rewards)
    return {"value": i.value, "low": i.low, "high": i.high}
