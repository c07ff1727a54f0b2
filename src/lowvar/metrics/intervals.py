r"""Intervals by the block jackknife, and paired differences on common noise.

The n samples are cut into b contiguous blocks of n_j. With theta the score of all samples and theta_(-j) the score
without block j, h_j = n / n_j, the delete-a-group jackknife with unequal groups (Busing et al. 1999, Eq. 8 and 9) has

    theta~_j = h_j theta - (h_j - 1) theta_(-j),     theta_J = mean_j theta~_j,
    se^2 = 1/b sum_j (theta~_j - theta_J)^2 / (h_j - 1),     interval = theta -+ t_{b-1, .975} se.

Blocks rather than single samples allow dependence inside a block: blocks start at even sample numbers, so an antithetic
pair (2k, 2k + 1) is never cut. For the difference of two samplers that were given the same noise the same blocks are
left out of both, and the jackknife of theta^a - theta^b keeps the covariance that common noise creates.

What the interval covers. The held-out set is held fixed: the interval speaks of new samples against the same images.
It is centred on theta, so for a nonlinear score it covers E[theta_n], the score's mean *at this n*: Frechet and
Wasserstein distances of finite samples are biased upwards by O(1/n), and rows are comparable at equal n only.
`Replicates.bias` is the jackknife's estimate of that bias, theta - theta_J; `interval` reports it beside the value,
`corrected` takes it off, which leaves O(1/n^2) and is for the score of infinitely many samples. Energy and
kernel distance (U-statistics) have none; where sampler and data agree they degenerate and the interval is conservative.

Source: F. Busing, E. Meijer, R. van der Leeden, "Delete-m jackknife for unequal m", Statistics and Computing 9, 1999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MIN_BLOCKS", "Interval", "Replicates", "block_bounds", "block_numbers", "jackknife"]

MIN_BLOCKS = 16


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval [low, high] and standard error; a paired one that `excludes(0.0)` is "beats"."""

    value: float
    low: float
    high: float
    se: float

    def excludes(self, x: float) -> bool:
        """Whether x lies outside the interval."""
        return x < self.low or x > self.high


@dataclass(frozen=True)
class Replicates:
    """A score and its leave-one-block-out replicates: all that intervals and paired differences need.

    Attributes:
        value: the score of all samples.
        leave_out: float64 (b,), the score without block j.
        sizes: int64 (b,), samples in block j.

    Raises:
        ValueError: for fewer than 16 blocks.
    """

    value: float
    leave_out: Tensor
    sizes: Tensor

    def __post_init__(self) -> None:
        """Refuses too few blocks."""
        if len(self.leave_out) < MIN_BLOCKS or self.leave_out.shape != self.sizes.shape:
            raise ValueError(f"{len(self.leave_out)} blocks; an interval needs at least {MIN_BLOCKS}, each with a size")

    def _pseudo(self) -> tuple[Tensor, Tensor]:
        h = self.sizes.sum() / self.sizes.to(torch.float64)
        return h * self.value - (h - 1) * self.leave_out, h

    @property
    def bias(self) -> float:
        """The jackknife's estimate of the score's bias at this n (reported, never subtracted)."""
        pseudo, _ = self._pseudo()
        return self.value - pseudo.mean().item()

    def interval(self, confidence: float = 0.95) -> Interval:
        """value -+ t se with b - 1 degrees of freedom: for the score's mean at this n.

        Raises:
            ValueError: if `confidence` is outside (0, 1).
        """
        return self._about(self.value, confidence)

    def corrected(self, confidence: float = 0.95) -> Interval:
        """theta_J -+ t se: for the score of infinitely many samples, its bias of order 1/n taken off.

        Raises:
            ValueError: if `confidence` is outside (0, 1).
        """
        return self._about(self.value - self.bias, confidence)

    def _about(self, centre: float, confidence: float) -> Interval:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; give a number between 0 and 1, for example 0.95")
        from scipy.stats import t

        pseudo, h = self._pseudo()
        se = math.sqrt(((pseudo - pseudo.mean()).square() / (h - 1)).mean().item())
        reach = float(t.ppf(0.5 + confidence / 2, len(h) - 1)) * se
        return Interval(centre, centre - reach, centre + reach, se)

    def minus(self, other: Replicates) -> Replicates:
        """The paired difference self - other of two samplers given the same noise sample by sample.

        Raises:
            ValueError: if the blocks differ.
        """
        if not torch.equal(self.sizes, other.sizes):
            raise ValueError("the two scores have different blocks; score as many samples of one as of the other")
        return Replicates(self.value - other.value, self.leave_out - other.leave_out, self.sizes)


def block_bounds(n: int, blocks: int) -> Tensor:
    """Bounds (blocks + 1,) of contiguous blocks of nearly equal size that start at even numbers.

    Raises:
        ValueError: for fewer than 16 blocks or fewer than 2 samples a block.

    Example:
        >>> block_bounds(71, 16).tolist()
        [0, 4, 8, 12, 16, 22, 26, 30, 34, 38, 44, 48, 52, 56, 62, 66, 71]
    """
    if blocks < MIN_BLOCKS:
        raise ValueError(f"{blocks} blocks; an interval needs at least {MIN_BLOCKS}")
    if n < 2 * blocks:
        raise ValueError(f"{n} samples for {blocks} blocks; draw at least {2 * blocks} samples")
    bounds = torch.arange(blocks + 1) * n // (2 * blocks) * 2
    bounds[-1] = n
    return bounds


def block_numbers(bounds: Tensor) -> Tensor:
    """The block (n,) of each sample."""
    return torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())


def jackknife(values: Tensor, blocks: int = 32) -> Replicates:
    """Replicates of the mean of `values` (n,): the interval of any statistic that averages over samples.

    Args:
        values: one number a sample, (n,).
        blocks: number of blocks, at least 16.

    Raises:
        ValueError: for fewer than 16 blocks or fewer than 2 samples a block.

    Example:
        >>> i = jackknife(torch.arange(64.0), blocks=16).interval()
        >>> i.value, i.low < 31.5 < i.high
        (31.5, True)
    """
    bounds = block_bounds(len(values), blocks)
    sums = torch.zeros(blocks, dtype=torch.float64).index_add_(0, block_numbers(bounds), values.to(torch.float64))
    sizes = bounds.diff()
    return Replicates((sums.sum() / len(values)).item(), (sums.sum() - sums) / (len(values) - sizes), sizes)
