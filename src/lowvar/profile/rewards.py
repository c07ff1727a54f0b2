r"""Which estimator of a reward's gradient, and how many runs an update.

Every estimator that `lowvar.reward.choose` would consider, and the plain score function with a leave-one-out baseline,
is repeated on fresh batches at the model's weights (`lowvar.reward.report`): variance of one run, seconds, and

    signal to noise   |E g|^2 / (variance of a batch's mean),      the mean's own noise taken off,

from which the batch follows as it does in training: with n runs an update the squared error of the gradient is N / n
of its square, N = variance of one run / |E g|^2. N is what a batch is compared with; where |E g|^2 cannot be told from
0 it is not known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowvar.process.noise import Independent
from lowvar.reward import GradientRow, RewardEstimator, RewardProblem, Scores, candidates, choose

__all__ = ["EstimatorRow", "RewardProfile", "profile_reward"]

_REPEATS, _FEW, _MOST = 16, 8, 64  # batches: usually at least, in little time, at most
_PLAIN = Scores()


@dataclass(frozen=True)
class EstimatorRow:
    """An estimator.

    Attributes:
        name: its name.
        claim: unbiased, or how not.
        variance, low, high: of one run.
        seconds: a batch.
        snr: of a batch.
        factor, factor_low, factor_high: variance x seconds of the plain score function over its own.
    """

    name: str
    claim: str
    variance: float
    low: float
    high: float
    seconds: float
    snr: float
    factor: float
    factor_low: float
    factor_high: float


@dataclass(frozen=True)
class RewardProfile:
    """What tuning for a reward takes.

    Attributes:
        reward: its name.
        rows: estimators, least variance x cost first.
        plain: name of what factors are over.
        recommended: name of the estimator.
        why: in a sentence.
        batch: runs of a measured batch.
        runs: N of the recommended estimator; NaN where it is not known.
        left_out: estimators that cannot run, and why.
        repeats: batches.
    """

    reward: str
    rows: tuple[EstimatorRow, ...]
    plain: str
    recommended: str
    why: str
    batch: int
    runs: float
    left_out: dict[str, str]
    repeats: int


def profile_reward(
    problem: RewardProblem,
    name: str,
    *,
    seconds: float,
    among: Sequence[RewardEstimator] | None = None,
    n: int = 32,
    seed: int = 0,
    memory: float = 4e9,
) -> RewardProfile | float:
    """Measures estimators of a reward's gradient.

    Args:
        problem: what is tuned; its `num_generations` divides n.
        name: of the reward.
        seconds: budget.
        among: estimators (default: `lowvar.reward.candidates`); the plain score function is always with them.
        n: runs a batch; where 16 batches of each do not fit the budget half as many or a quarter, then 8 batches.
        seed: of the noise.
        memory: bytes that gradients may take.

    Returns:
        The profile, or, where the budget is below what 8 such small batches of each take, the seconds that they take.

    Raises:
        ValueError: if the gradients of 16 batches of each estimator do not fit the memory.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, Policy
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> problem = RewardProblem(policy, lambda x, p: x.sum(1), [shift], (2,))
        >>> found = profile_reward(problem, "sum", seconds=5.0, among=[Scores("x0")])
        >>> found.plain, sorted(row.name for row in found.rows)
        ('scores, leave-one-out baseline', ['scores, leave-one-out baseline', 'scores, x0 baseline'])
    """
    chosen = list(candidates(problem) if among is None else among)
    if all(e.name != _PLAIN.name for e in chosen):
        chosen.insert(0, _PLAIN)
    size = sum(p.numel() for p in problem.parameters)
    if 8 * size * _REPEATS * len(chosen) > memory:
        needed = 8e-9 * size * _REPEATS * len(chosen)
        raise ValueError(
            f"the gradients of {len(chosen)} estimators in {_REPEATS} batches take {needed:.2g} gigabytes and --memory "
            f"gives {memory / 1e9:.2g}; give more memory"
        )
    noise = Independent(seed)
    begun = 0.0
    for _ in range(2):  # the first pays for what torch sets up once
        begun = time.perf_counter()
        out = _PLAIN(problem, noise, n, 0)
        torch.autograd.grad(out.loss, list(problem.parameters), allow_unused=True)
    each = (time.perf_counter() - begun) * (2 * len(chosen) - 1)  # pathwise ones cost about twice
    fitting = memory / (8 * size * len(chosen))
    first, batches = n, _batches(each, n, problem.num_generations, seconds, fitting)
    if not isinstance(batches, tuple):
        return batches
    n, repeats = batches
    choice = choose(problem, noise, among=chosen, n=n, repeats=repeats, first=first)
    report = choice.report.rows
    plain = report[_PLAIN.name]
    rows = [_row(key, row, plain) for key, row in report.items()]
    best = report[choice.estimator.name]
    runs = best.n / best.snr if 0 < best.snr < math.inf else math.nan
    return RewardProfile(
        name,
        tuple(rows),
        _PLAIN.name,
        choice.estimator.name,
        choice.why,
        n,
        runs,
        dict(choice.report.left_out),
        repeats,
    )


def _batches(each: float, n: int, group: int, seconds: float, most: float) -> tuple[int, int] | float:
    """Runs a batch and number of batches that a budget allows; the seconds of the least, where it allows none.

    Args:
        each: seconds of a batch of n runs by every estimator.
        n: runs that are wanted, in whole groups of `group`, at least two of them.
        group: runs of a group.
        seconds: budget, of which twice is spent rather than nothing.
        most: batches that fit the memory.
    """
    shares = [k for k in (1, 2, 4) if n % (k * group) == 0 and n >= 2 * k * group] or [1]
    sizes = [(n // k, _REPEATS) for k in shares] + [(n // shares[-1], _FEW)]
    for runs, least in sizes:
        one = each * runs / n
        if one * least <= 2 * seconds:
            return runs, int(min(max(seconds / one, least), _MOST, most))
    return each * sizes[-1][0] / n * _FEW


def _row(name: str, row: GradientRow, plain: GradientRow) -> EstimatorRow:
    """An estimator beside the plain one."""
    half = 0.0 if row is plain else math.hypot(*(_log_reach(r.variance, r.high) for r in (row, plain)))
    equal = row.work == plain.work  # both 0 where the reward is the same for all runs
    factor = 1.0 if equal else plain.work / row.work if row.work > 0 else math.inf
    return EstimatorRow(
        name,
        row.claim.label,
        row.variance,
        row.low,
        row.high,
        row.seconds,
        row.snr,
        factor,
        factor / math.exp(half),
        factor * math.exp(half),
    )


def _log_reach(value: float, high: float) -> float:
    """Half the width of the logarithm's interval, from its upper half."""
    return math.log(high / value) if value > 0 else 0.0
