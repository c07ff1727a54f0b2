r"""Scores that are no means: Frechet, kernel and energy distance of a sampler, with an interval and their bias.

    theta = T(law of the samples; reference),     theta_n = T(n samples; reference),

T not linear in the law, so E theta_n is not theta. Samples come in b independent blocks, and the block jackknife
(`lowvar.metrics.intervals`) leaves one out at a time:

    score     E theta_n - theta                          at_n covers    corrected covers
    frechet   above 0, c / n + O(1 / n^2)                E theta_n      theta
    kernel    0 (U-statistic over pairs)                 theta          theta
    energy    0 (U-statistic over pairs)                 theta          theta

`corrected` takes the jackknife's estimate of the bias off: it is the value to compare between different n. Where
sampler and reference agree, kernel and energy distance degenerate (their spread falls as 1/n, not 1/sqrt n) and the
intervals are too wide; the corrected Frechet distance then scatters around 0. The reference is held fixed: none of this
covers how another reference set would move the score.

Kernel distance undercovers with few samples, since a cubic kernel has heavy tails: with one Gaussian feature of
standard deviation 1.3 its intervals held theta in 90% (n = 320) and 92% (n = 1280) of the replicates instead of 95%.

Blocks have to be independent of each other, not the samples within: mirrored pairs and scrambled nets are allowed where
a block holds whole ones. No promise of less variance is made for these scores.

Sources: Busing et al. 1999 (`intervals`); M. Chong, D. Forsyth, "Effectively unbiased FID and Inception score", CVPR
2020 (the bias of Frechet distances in n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.metrics.energy import energy_statistic
from lowvar.metrics.frechet import FrechetStatistic
from lowvar.metrics.intervals import MIN_BLOCKS, Interval, Replicates
from lowvar.metrics.kernel import kernel_statistic
from lowvar.metrics.pairwise import TwoSample
from lowvar.process.noise import Independent, NoiseSource

__all__ = ["BIAS", "UNDERCOVERS", "ScoreEstimate", "ScoreName", "score_estimate"]

ScoreName = Literal["frechet", "kernel", "energy"]

BIAS: Mapping[ScoreName, str] = {
    "frechet": "upwards, of order 1/n",
    "kernel": "none",
    "energy": "none",
}
"""What each score declares of E theta_n - theta; the tests hold it to that."""

UNDERCOVERS: Mapping[ScoreName, str] = {
    "kernel": "a cubic kernel has heavy tails: of 95% intervals 90% held the distance at 320 samples, 92% at 1280",
}
"""Why a score's interval may cover less than it says, where it may."""


class _Sampler(Protocol):
    """Samples as a function of their numbers and of noise; `lowvar.expect.Sampler` is one."""

    @property
    def nfe(self) -> int: ...
    def __call__(self, index: Tensor, noise: NoiseSource) -> Tensor: ...


@dataclass(frozen=True)
class ScoreEstimate:
    """A score of a sampler.

    Attributes:
        score: its name.
        replicates: the value, and the values without a block.
        samples: n.
        nfe: network evaluations spent.
    """

    score: ScoreName
    replicates: Replicates
    samples: int
    nfe: int

    @property
    def at_n(self) -> Interval:
        """theta_n with its 95% interval for E theta_n: compare it with scores of equal n."""
        return self.replicates.interval()

    @property
    def corrected(self) -> Interval:
        """theta_n less its estimated bias, with the 95% interval for theta."""
        return self.replicates.corrected()

    @property
    def bias(self) -> float:
        """The jackknife's estimate of E theta_n - theta."""
        return self.replicates.bias

    @property
    def declared_bias(self) -> str:
        """What the score is known to do."""
        return BIAS[self.score]

    @property
    def undercovers(self) -> str | None:
        """Why the intervals may cover less than they say, or None."""
        return UNDERCOVERS.get(self.score)

    def minus(self, other: ScoreEstimate) -> Interval:
        """The difference to another sampler's score on the same noise and blocks, biases taken off.

        Raises:
            ValueError: for different scores or blocks.
        """
        if self.score != other.score:
            raise ValueError(f"the scores are {self.score!r} and {other.score!r}; compare one score")
        return self.replicates.minus(other.replicates).corrected()


def _statistic(score: ScoreName, reference: Tensor) -> FrechetStatistic | TwoSample:
    if score == "frechet":
        return FrechetStatistic.against(reference)
    return kernel_statistic(reference) if score == "kernel" else energy_statistic(reference)


@torch.no_grad()
def score_estimate(
    sampler: _Sampler,
    reference: Tensor,
    score: ScoreName = "frechet",
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    blocks: int = 32,
    block_size: int = 256,
    noise: NoiseSource | None = None,
    progress: Callable[[int], object] | None = None,
) -> ScoreEstimate:
    """A nonlinear score of a sampler against reference samples.

    Memory is that of the features of all samples (for Frechet and kernel distance in an extractor's 32 to 64 numbers a
    sample), not of the samples.

    Args:
        sampler: called as sampler(index, noise).
        reference: data (m, *event_shape), m >= 2.
        score: "frechet", "kernel" or "energy".
        features: samples (n, *event_shape) -> (n, d), for example an `Extractor`; None: the samples themselves.
        blocks: b, at least 16.
        block_size: samples a block, even; a multiple of what the noise couples.
        noise: source (default `Independent(0)`).
        progress: called with the number of samples after each block.

    Raises:
        UserError: for an unknown score, too few blocks, an odd block, a reference of another shape, or samples,
            reference or features that are not finite.

    Example:
        >>> from lowvar.expect.jackknife import score_estimate
        >>> class Shifted:
        ...     nfe = 1
        ...     def __call__(self, index, noise):
        ...         return 0.5 + noise.normal(index, (2,))
        >>> data = Independent(1).normal(range(4000), (2,))
        >>> found = score_estimate(Shifted(), data, "energy", block_size=64)
        >>> found.samples, found.declared_bias, found.at_n.excludes(0.0)
        (2048, 'none', True)
    """
    if score not in get_args(ScoreName):
        raise UserError(f"score is {score!r}; allowed: {', '.join(get_args(ScoreName))}")
    if blocks < MIN_BLOCKS:
        raise UserError(f"blocks is {blocks}; an interval needs at least {MIN_BLOCKS}")
    if block_size < 2 or block_size % 2:
        raise UserError(f"block_size is {block_size}; give an even number, so that mirrored pairs stay together")
    source = Independent(0) if noise is None else noise
    described = (lambda x: x) if features is None else features
    against = described(reference)
    if not bool(torch.isfinite(against).all()):
        raise UserError("the reference holds values that are not finite (NaN or infinite); leave those samples out")
    statistic = _statistic(score, against)
    parts = []
    for index in torch.arange(blocks * block_size).split(block_size):
        f = described(sampler(index, source))
        bad = int((~torch.isfinite(f)).flatten(1).any(1).sum())
        if bad:
            raise UserError(
                f"{bad} of the samples {int(index[0])} to {int(index[-1])} are not finite (NaN or infinite); the "
                "sampler diverged: give it more steps or another solver"
            )
        if f[0].numel() != against[0].numel():
            raise UserError(
                f"the samples have shape {tuple(f.shape[1:])} and the reference {tuple(against.shape[1:])}; give "
                "reference samples of the sampler's shape"
            )
        parts.append(f.detach().to("cpu", torch.float64))
        if progress is not None:
            progress(len(index))
    n = blocks * block_size
    return ScoreEstimate(score, statistic.replicates(torch.cat(parts), blocks), n, n * sampler.nfe)
