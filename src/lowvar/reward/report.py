r"""Which estimator? Measured, not guessed.

An estimate g of a batch of n runs is repeated on fresh noise, R times:

    variance   n x sum over parameters of Var g_r: of one run; its interval from the spread of |g_r - mean|^2
    snr        |mean|^2 / variance of a batch, the mean's own noise taken off
    cost       seconds of a batch, or network evaluations a run (`cost="evaluations"`), which are the same on every
               machine and in every run: a loop that has to repeat bit for bit counts those
    work       variance x cost / n: what a fixed accuracy costs, so what ranks

`choose` runs the admissible estimators as a pilot and takes the one of least work; biased ones only where asked. The
answer is of these parameters, reward and batch: ask again when they have moved.

**Rare events.** Where a process decides between modes, the pathwise gradient is nothing for nearly all runs and huge
for a few that a pilot does not meet: its variance then *looks* like zero. But its mean looks like zero too, and
unbiased estimators have one mean. So where two disagree on the common runs, |mean d|^2 > 6.6 sum Var(d) / R with d the
differences (6.6: 1% if one direction has all the variance, less otherwise), one of them is refused: the one that is a
product over steps (`multiplies`), or else the one whose variance is less certain.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.reward.claims import Claim
from lowvar.reward.edges import edges
from lowvar.reward.estimators import Paths, RewardEstimator, RewardProblem, Scores, SurrogateControl
from lowvar.reward.pathwise import Full, Last, Roulette
from lowvar.reward.rewards import is_differentiable

Cost = Literal["seconds", "evaluations"]

__all__ = ["Choice", "GradientReport", "GradientRow", "candidates", "choose", "gradient_report"]


@dataclass(frozen=True, eq=False)
class GradientRow:
    """One estimator.

    Attributes:
        estimator: it.
        mean: of the gradient of E R, all parameters in a row, (P,).
        variance, low, high: of one run, with a 95% interval.
        snr: of a batch.
        seconds: a batch.
        n: runs a batch.
        claim: what it says of itself.
        evaluations: of the network, a run.
        cost: what `work` counts.
        gradients: each batch's, (R, P).
    """

    estimator: RewardEstimator
    mean: Tensor = field(repr=False)
    variance: float
    low: float
    high: float
    snr: float
    seconds: float
    n: int
    claim: Claim
    gradients: Tensor = field(repr=False)
    evaluations: float = 0.0
    cost: Cost = "seconds"

    @property
    def work(self) -> float:
        """Variance x cost a run."""
        return self.variance * (self.evaluations if self.cost == "evaluations" else self.seconds / self.n)

    @property
    def trust(self) -> tuple[bool, float]:
        """What settles a disagreement: no product over steps, then the variance over its interval's half width."""
        half = self.high - self.variance
        return not self.estimator.multiplies, self.variance / half if half > 0 else float("inf")

    def disagrees(self, other: GradientRow) -> bool:
        """Whether the means differ by more than noise, over the common runs (see the module)."""
        d = self.gradients - other.gradients
        spread = float(d.var(0).sum()) / len(d)
        return float(d.mean(0).square().sum()) > 6.6 * spread + 1e-12 * float(other.mean.square().sum())


@dataclass(frozen=True)
class GradientReport:
    """Rows by name, the least work first, biased ones last; `left_out` says why others could not run."""

    rows: Mapping[str, GradientRow]
    left_out: Mapping[str, str]

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| estimator | | variance | 95% | seconds | variance x cost | snr |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, r in self.rows.items():
            lines.append(
                f"| {name} | {r.claim.label} | {r.variance:.3g} | {r.low:.3g} to {r.high:.3g} | {r.seconds:.3g} | "
                f"{r.work:.3g} | {r.snr:.3g} |"
            )
        return "\n".join(lines)


def gradient_report(
    problem: RewardProblem,
    estimators: Sequence[RewardEstimator],
    noise: NoiseSource,
    *,
    n: int = 64,
    repeats: int = 16,
    first: int = 0,
    cost: Cost = "seconds",
) -> GradientReport:
    """Measures estimators on the same runs, in turn.

    Args:
        problem: what is tuned.
        estimators: what to compare; those that cannot run are left out, with the reason.
        noise: batch r has the samples first + r n ... of it.
        n: runs a batch.
        repeats: batches, at least 2; repeats x parameters numbers are held.
        first: number of the first sample.
        cost: what ranks beside the variance.

    Raises:
        ValueError: if repeats is below 2.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, Policy
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> problem = RewardProblem(policy, lambda x, p: x.sum(1), [shift], (2,))
        >>> among = [Scores("none"), Scores("x0"), Paths()]
        >>> report = gradient_report(problem, among, Independent(0), cost="evaluations")
        >>> list(report.rows), report.left_out
        (['scores, x0 baseline', 'scores, none baseline'], {'pathwise, Full()': 'the reward has no derivative'})
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}; a variance needs at least 2")
    rows: dict[str, GradientRow] = {}
    left_out: dict[str, str] = {}
    for estimator in estimators:
        reason = estimator.refusal(problem)
        if reason is not None:
            left_out[estimator.name] = reason
            continue
        rows[estimator.name] = _measured(problem, estimator, noise, n, repeats, first, cost)
    ranked = sorted(rows.items(), key=lambda row: (row[1].claim.label == "biased", row[1].work))
    return GradientReport(dict(ranked), left_out)


def _measured(
    problem: RewardProblem,
    estimator: RewardEstimator,
    noise: NoiseSource,
    n: int,
    repeats: int,
    first: int,
    cost: Cost,
) -> GradientRow:
    parameters, found, seconds, claim = list(problem.parameters), [], [], Claim("none")
    for r in range(repeats):
        begin = time.perf_counter()
        out = estimator(problem, noise, n, first + r * n)
        grads = torch.autograd.grad(out.loss, parameters, allow_unused=True)
        each = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        found.append(-torch.cat([g.flatten().double().cpu() for g in each]))
        seconds.append(time.perf_counter() - begin)
        claim = out.claim
    g = torch.stack(found)
    square = (g - g.mean(0)).square().sum(1) * repeats / (repeats - 1)
    variance, half = float(square.mean()), 1.96 * float(square.std()) / repeats**0.5
    signal = max(float(g.mean(0).square().sum()) - variance / repeats, 0.0)
    return GradientRow(
        estimator,
        g.mean(0),
        n * variance,
        n * max(variance - half, 0.0),
        n * (variance + half),
        signal / variance if variance > 0 else float("inf"),
        sorted(seconds)[repeats // 2],
        n,
        claim,
        g,
        estimator.evaluations(problem),
        cost,
    )


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        estimator: the one of least work.
        why: a sentence for the log.
        report: the pilot's.
    """

    estimator: RewardEstimator
    why: str
    report: GradientReport


def candidates(problem: RewardProblem) -> list[RewardEstimator]:
    """Unbiased estimators that are worth a pilot; of pictures and a black box those on their `edges` too."""
    k = max(problem.policy.steps // 4, 1)
    picture = len(problem.shape) == 3 and min(problem.shape[1:]) >= 4
    own: list[RewardEstimator] = []
    if picture and not is_differentiable(problem.reward):
        own = [Scores("x0", features=edges), SurrogateControl(features=edges)]
    return [
        Scores(),
        Scores("x0"),
        SurrogateControl(),
        Paths(Full()),
        Paths(Last(k, "score"), Scores("x0")),
        Paths(Roulette(0.8)),
        *own,
    ]


def choose(
    problem: RewardProblem,
    noise: NoiseSource,
    *,
    among: Sequence[RewardEstimator] | None = None,
    biased: bool = False,
    n: int = 64,
    repeats: int = 16,
    first: int = 0,
    cost: Cost = "seconds",
) -> Choice:
    """The estimator of least variance x cost in a pilot (`estimator="auto"`).

    Args:
        problem: what is tuned.
        noise, n, repeats, first, cost: as of `gradient_report`; take sample numbers that training does not use.
        among: what to choose from; None: `candidates`.
        biased: whether biased estimators may be chosen.

    Raises:
        ValueError: if none may.

    Example:
        >>> from lowvar.process import CosineVP, GaussianTwin, Independent, PixelBasis, ReverseKernel
        >>> from lowvar.reward import Floor, Policy
        >>> schedule, shift = CosineVP(), torch.zeros(2, requires_grad=True)
        >>> twin = GaussianTwin(shift, PixelBasis((2,)), torch.ones(2))
        >>> policy = Policy(twin.denoiser(schedule), ReverseKernel(), torch.linspace(1, 0, 5), Floor(0.1))
        >>> problem = RewardProblem(policy, lambda x, p: x.sum(1), [shift], (2,))
        >>> among = [Scores("none"), Scores("x0")]
        >>> choose(problem, Independent(0), among=among, cost="evaluations").estimator.name
        'scores, x0 baseline'
    """
    report = gradient_report(
        problem, candidates(problem) if among is None else among, noise, n=n, repeats=repeats, first=first, cost=cost
    )
    allowed = {name: row for name, row in report.rows.items() if biased or row.claim.label == "unbiased"}
    if not allowed:
        raise ValueError(
            f"no estimator may be chosen: biased ones are {list(report.rows)}, and left out were "
            f"{dict(report.left_out)}; allow biased=True or give others"
        )
    truth = [row for row in report.rows.values() if row.claim.label == "unbiased"]
    misses = {
        name: "its mean differs from that of a surer unbiased estimator: it is made of rare events, not in the pilot"
        for name, row in allowed.items()
        if row.claim.label == "unbiased" and any(t.trust > row.trust and row.disagrees(t) for t in truth)
    }
    allowed = {name: row for name, row in allowed.items() if name not in misses}
    name = min(allowed, key=lambda key: allowed[key].work)
    best = allowed.pop(name)
    others = ", ".join(
        f"{other} {row.work:.3g} (variance {row.variance:.3g}, {row.low:.3g} to {row.high:.3g})"
        for other, row in allowed.items()
    )
    refused = "".join(f"; not {other}: {reason}" for other, reason in {**misses, **report.left_out}.items())
    spent = f"{best.evaluations:g} evaluations a run" if cost == "evaluations" else f"{best.seconds:.3g} s for {n} runs"
    why = (
        f"{name}: variance x cost {best.work:.3g} (variance {best.variance:.3g}, {best.low:.3g} to {best.high:.3g}, "
        f"{spent}), against {others or 'nothing else'}{refused}"
    )
    return Choice(best.estimator, why, report)
