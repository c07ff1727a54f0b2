r"""The gradient noise scale, online: how much larger a batch would still pay.

With mu the expected gradient and V = tr Cov g of *one sample's* gradient, a batch of B independent samples has squared
error V / B around ||mu||^2, and the simple noise scale (McCandlish et al. 2018, "An empirical model of large-batch
training", Eq. 2.9) is

    B_simple = V / ||mu||^2:   far below it doubling B nearly halves the updates, far above it is wasted.

McCandlish's estimate, from squared norms at two batch sizes, presumes independent samples. Draws are dependent inside
a stratum, a noise pair (x, +-eps), or a shared reference set; a formula that counts samples is wrong there. So the
batch is cut into k >= 2 *blocks* that are independent of one another and hold whole groups of dependent draws, with n
samples each and mean gradients g_1 .. g_k (one accumulation step or one process each, or two halves of one batch):

    ||mu||^2     from <g_a, g_b>, a != b:       1 / (k (k - 1)) (||sum g_a||^2 - sum ||g_a||^2)
    V            from differences, n / 2 E||g_a - g_b||^2:      n / (k - 1) (sum ||g_a||^2 - ||sum g_a||^2 / k)

Both are unbiased, ||mu||^2 never is the square of a mean (which would hold V / B as well), and V is *effective*: that
of a plain sample which would give the same variance to a batch of these draws. Antithetic pairs that halve the variance
halve V. If strata span the whole batch no two parts of it are independent: draw the halves as two plans, or give
successive updates' gradients as the blocks of one measurement.

Single updates are noisy, so sums over the last updates count, with a decay d an update: S <- d S + s. The ratio's
interval is the delete-one-group jackknife over G groups of updates (round robin in runs of `run` updates), on the log
of the ratio. It speaks of sampling noise; the drift of mu inside the window is averaged, not covered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["NoiseScale", "NoiseScaleEstimate", "block_moments", "moments_of_sums"]

_Number = TypeVar("_Number", float, Tensor)


def block_moments(blocks: Sequence[Tensor] | Tensor, samples: int) -> tuple[float, float]:
    """Unbiased (||mu||^2, V) of one update from the mean gradients of independent blocks.

    Args:
        blocks: k >= 2 flat gradients (k, P).
        samples: n, samples in each block.

    Returns:
        ||mu||^2, which can be negative by noise, and V, of one sample.

    Raises:
        ValueError: for fewer than two blocks or no samples.

    Example:
        >>> block_moments(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), samples=4)
        (3.0, 16.0)
    """
    g = blocks if isinstance(blocks, Tensor) else torch.stack(list(blocks))
    k = len(g)
    if k < 2 or samples < 1:
        raise ValueError(
            f"{k} blocks of {samples} samples; the noise scale needs at least 2 independent blocks: accumulate over "
            "two steps, or take the gradients of two halves"
        )
    g = g.flatten(1).double()
    return moments_of_sums(float((g**2).sum()), float((g.sum(0) ** 2).sum()), k, samples)


def moments_of_sums(each: _Number, whole: _Number, k: int, samples: int) -> tuple[_Number, _Number]:
    """Unbiased (||mu||^2, V) from what several processes can add up, each with blocks of its own.

    Args:
        each: sum ||g_a||^2 over the k blocks; a number, or a tensor of many such sums.
        whole: ||sum g_a||^2, likewise.
        k: number of blocks, at least 2.
        samples: n, samples in each.

    Example:
        >>> moments_of_sums(each=5.0 + 9.0, whole=16.0 + 4.0, k=2, samples=4)
        (3.0, 16.0)
    """
    return (whole - each) / (k * (k - 1)), samples * (each - whole / k) / (k - 1)


@dataclass(frozen=True)
class NoiseScaleEstimate:
    """The noise scale with a 95% interval.

    Attributes:
        value: V / ||mu||^2 in samples; inf where ||mu||^2 is not above 0 by the estimate.
        low, high: interval; high is inf where ||mu||^2 cannot be told from 0.
        square: ||mu||^2.
        variance: V of one sample.
        batch_size: of the updates.
    """

    value: float
    low: float
    high: float
    square: float
    variance: float
    batch_size: int

    @property
    def advice(self) -> str:
        """One sentence: what this says about the batch size.

        Example:
            >>> NoiseScaleEstimate(400.0, 320.0, 500.0, 1.0, 400.0, 64).advice
            'batch 64 is below the noise scale 400 (320 to 500): a doubled batch would need about 0.57 of the updates'
        """
        B = self.batch_size
        if not math.isfinite(self.high) or not math.isfinite(self.value):
            return (
                f"the noise scale is above {self.low:.3g}, and cannot be bounded yet: the gradient drowns in its noise"
            )
        where = f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"
        ratio = (1 + self.value / (2 * B)) / (1 + self.value / B)
        saving = f"a doubled batch would need about {ratio:.2f} of the updates"
        if self.low <= B <= self.high:
            return f"batch {B} is at the noise scale {where}: {saving}"
        return f"batch {B} is {'below' if self.low > B else 'above'} the noise scale {where}: {saving}"


@dataclass(frozen=True, eq=False)
class NoiseScale:
    """Running sums, as a value.

    Args:
        batch_size: samples an update, over all blocks.
        decay: d of the sums, in [0, 1); 0.99 remembers about 100 updates.
        groups: G of the jackknife, at least 4.
        run: successive updates in one group.
        sums: (G, 3) weighted sums of ||mu||^2, V and weights; default zeros.
        updates: updates seen.

    Example:
        >>> scale = NoiseScale(batch_size=8)
        >>> for u in range(64):
        ...     g = torch.tensor([[1.0, 0.5], [1.0, -0.5]]) if u % 2 else torch.tensor([[1.2, 0.5], [0.8, -0.5]])
        ...     scale = scale.updated(g)
        >>> found = scale.estimate()
        >>> 2.8 < found.value < 3.6 and found.low < found.value < found.high
        True
    """

    batch_size: int
    decay: float = 0.99
    groups: int = 16
    run: int = 1
    sums: Tensor = field(default=None)  # type: ignore[assignment]
    updates: int = 0

    def __post_init__(self) -> None:
        """Fills in empty sums; refuses parameters out of range."""
        if self.batch_size < 2 or not 0 <= self.decay < 1 or self.groups < 4 or self.run < 1:
            raise ValueError(
                f"batch_size is {self.batch_size}, decay {self.decay}, groups {self.groups}, run {self.run}; need a "
                "batch of at least 2, a decay in [0, 1), at least 4 groups and runs of at least 1"
            )
        if self.sums is None:
            object.__setattr__(self, "sums", torch.zeros(self.groups, 3, dtype=torch.float64))
        if self.sums.shape != (self.groups, 3):
            raise ValueError(f"the sums are {tuple(self.sums.shape)}, not of {self.groups} groups and 3 numbers each")

    def updated(self, blocks: Sequence[Tensor] | Tensor) -> NoiseScale:
        """With another update's k independent blocks: mean gradients (k, P), batch_size / k samples each.

        An update whose gradients are not finite is left out.

        Raises:
            ValueError: if the batch does not divide into that many blocks, or there are fewer than two.
        """
        k = len(blocks)
        if k < 1 or self.batch_size % k:
            raise ValueError(f"a batch of {self.batch_size} in {k} blocks; the blocks must be of one size")
        return self.counted(*block_moments(blocks, self.batch_size // k))

    def counted(self, square: float, variance: float) -> NoiseScale:
        """With another update's (||mu||^2, V), see `block_moments`; left out where one of them is not finite."""
        if not (math.isfinite(square) and math.isfinite(variance)):
            return self
        sums = self.sums * self.decay
        sums[(self.updates // self.run) % self.groups] += torch.tensor([square, variance, 1.0], dtype=torch.float64)
        return replace(self, sums=sums, updates=self.updates + 1)

    @property
    def ready(self) -> bool:
        """Whether every group has an update, so that there is an estimate."""
        return bool((self.sums[:, 2] > 0).all())

    def estimate(self) -> NoiseScaleEstimate:
        """The noise scale now.

        Raises:
            ValueError: before every group has an update.
        """
        if not self.ready:
            raise ValueError(
                f"{self.updates} updates are too few for {self.groups} groups in runs of {self.run}; "
                f"train for {self.groups * self.run} updates first"
            )
        total, G = self.sums.sum(0), self.groups
        square, variance = float(total[0] / total[2]), float(total[1] / total[2])
        out = total - self.sums
        reach = _quantile(G - 1)
        if square <= 0 or bool((out[:, 0] <= 0).any()):  # the largest ||mu||^2 that the groups allow
            means = self.sums[:, 0] / self.sums[:, 2]
            most = square + reach * float(means.std()) / math.sqrt(G)
            low = variance / most if most > 0 else math.inf
            return NoiseScaleEstimate(
                variance / square if square > 0 else math.inf, low, math.inf, square, variance, self.batch_size
            )
        log_out = torch.log(out[:, 1].clamp_min(1e-300) / out[:, 0])
        log_all = math.log(max(variance, 1e-300) / square)
        se = math.sqrt((G - 1) / G * float(((log_out - log_out.mean()) ** 2).sum()))
        low, high = math.exp(log_all - reach * se), math.exp(min(log_all + reach * se, 700.0))
        return NoiseScaleEstimate(math.exp(log_all), low, high, square, variance, self.batch_size)

    def state(self) -> dict[str, Tensor]:
        """The state as tensors."""
        return {"sums": self.sums, "updates": torch.tensor(self.updates)}

    def restored(self, state: Mapping[str, Tensor]) -> NoiseScale:
        """The value with a state that `state` gave."""
        return replace(self, sums=state["sums"].double(), updates=int(state["updates"]))


def _quantile(df: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, df))
