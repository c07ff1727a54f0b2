r"""Sliced 2-Wasserstein distance.

    SW2^2 = mean_k W2^2(u_k . X, u_k . Y),     SW2 = (SW2^2)^{1/2},

over K = 128 directions u_k, uniform on the sphere and fixed by a seed. In one dimension W2^2 is the integral over
q in (0, 1) of (F_X^{-1}(q) - F_Y^{-1}(q))^2. For n and m samples both quantile functions are steps, so the integral is
an exact sum over the at most n + m - 1 intervals between the points i/n and l/m; sizes need not agree.

Two finite samples of one law have SW2^2 > 0 of order 1/n + 1/m: read it against the floor at equal n. Replicates
without a block use the sorted order of all samples; nothing is sorted twice.

Source: N. Bonneel et al., "Sliced and Radon Wasserstein barycenters of measures", JMIV 51, 2015, Section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.metrics.intervals import Replicates, block_bounds, block_numbers
from lowvar.metrics.pairwise import flat
from lowvar.process.noise import Independent

__all__ = ["SlicedStatistic", "directions", "sliced_wasserstein", "sliced_wasserstein_squared"]


def directions(d: int, count: int = 128, seed: int = 0) -> Tensor:
    """Unit vectors (d, count) in float64, uniform on the sphere; column k depends on (seed, k) only."""
    u = Independent(seed).normal(range(count), (d,), dtype=torch.float64)
    return (u / u.norm(dim=1, keepdim=True)).mT.contiguous()


def _coupling(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices i and l and weights of the monotone coupling of n and m equal weights; the weights add to 1."""
    cuts = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1 / (n m)
    start = torch.cat([torch.zeros(1, dtype=cuts.dtype), cuts[:-1]])
    return start // m, start // n, (cuts - start).to(torch.float64) / (n * m)


def _mean_square(x: Tensor, y: Tensor) -> Tensor:
    """mean_k W2^2 of the sorted rows x (K, n) and y (K, m)."""
    i, j, weight = _coupling(x.shape[1], y.shape[1])
    return (torch.square(x[:, i] - y[:, j]) @ weight).mean()


@dataclass(frozen=True)
class SlicedStatistic:
    """SW2 against fixed samples whose sorted projections are held once.

    Args:
        u: directions (d, K).
        y: sorted projections (K, m).
    """

    u: Tensor
    y: Tensor

    @classmethod
    def against(cls, y: Tensor, *, projections: int = 128, seed: int = 0) -> SlicedStatistic:
        """Holds the samples `y` (m, ...), m >= 2."""
        y = flat(y)
        u = directions(y.shape[1], projections, seed)
        return cls(u, (y @ u).mT.sort(dim=1).values)

    def squared(self, x: Tensor) -> float:
        """SW2^2 of the samples `x` (n, ...), n >= 2."""
        return _mean_square((flat(x) @ self.u).mT.sort(dim=1).values, self.y).item()

    def replicates(self, x: Tensor, blocks: int = 32) -> Replicates:
        """SW2 (not squared) and its leave-one-block-out replicates."""
        bounds = block_bounds(len(x), blocks)
        values, order = (flat(x) @ self.u).mT.sort(dim=1)
        owner = block_numbers(bounds)[order]
        leave_out = [_mean_square(values[owner != j].reshape(len(values), -1), self.y) for j in range(blocks)]
        return Replicates(_mean_square(values, self.y).sqrt().item(), torch.stack(leave_out).sqrt(), bounds.diff())


def sliced_wasserstein_squared(x: Tensor, y: Tensor, *, projections: int = 128, seed: int = 0) -> float:
    """SW2^2 of two sets of samples, in the samples' unit squared.

    Args:
        x: samples (n, ...), n >= 2.
        y: samples (m, ...), m >= 2, of the same shape but for m.
        projections: number K of directions.
        seed: of the directions.

    Returns:
        A number >= 0.

    Raises:
        ValueError: for fewer than 2 samples, different shapes or values that are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(sliced_wasserstein_squared(x, torch.tensor([[3.0], [3.0], [4.0], [4.0]])), 9)
        9.0
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"the samples have shapes {tuple(x.shape[1:])} and {tuple(y.shape[1:])}; give equal shapes")
    return SlicedStatistic.against(y, projections=projections, seed=seed).squared(x)


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 128, seed: int = 0) -> float:
    """SW2, the square root of `sliced_wasserstein_squared`, in the samples' unit; same arguments and errors.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> round(sliced_wasserstein(x, x + 2), 9)
        2.0
    """
    return sliced_wasserstein_squared(x, y, projections=projections, seed=seed) ** 0.5
