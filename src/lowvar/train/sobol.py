r"""Scrambled Sobol points for times and noises: one net of n points in [0, 1)^(1 + d) a batch.

    (u_i, v_i) = point i of the net,    t_i by the inverse cdf at u_i,    eps_i = Phi^-1(v_i) elementwise

A point is 30 bits a coordinate. The net's generating matrices are scrambled once (random lower triangular, Matousek
1998) and every batch shifts all its points by its own random bits and by one random fraction of the last bit,

    coordinate = (bits XOR shift + fraction) / 2^30,    shift uniform on 0 .. 2^30 - 1, fraction on (0, 1),

so every point alone is exactly uniform on (0, 1), never 0 or 1, and the points remain a net: with n = 2^m, each
interval [k / n, (k + 1) / n) of each coordinate holds one. Elements beyond the first `limit` of a noise are drawn
independently: in high dimensions a net of few points has nothing to give.

Sources: Sobol 1967; Joe & Kuo 2008 (direction numbers); Owen 1998 (scrambling). Label: unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.train.pairs import Pairing
from lowvar.train.stratified import SHARED_DRAW

__all__ = ["SobolPoints"]

_BITS = 30
_MOST = torch.quasirandom.SobolEngine.MAXDIM - 1
_SEED = 0x50B0


@lru_cache(maxsize=4)
def _net(n: int, dimension: int) -> Tensor:
    """Bits of the scrambled net, (n, dimension) int64 in [0, 2^30)."""
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=_SEED)
    return (engine.draw(n, dtype=torch.float64) * 2.0**_BITS).long()


@dataclass(frozen=True)
class SobolPoints(Pairing):
    """Times and noises of `size` consecutive samples from one net.

    Args:
        size: n, samples of a group: the global batch's.
        limit: elements of a noise that the net covers.

    Raises:
        ValueError: if n is below 1 or the limit outside 1 .. 21200.

    Example:
        >>> from lowvar.process import Independent
        >>> u = SobolPoints(8).uniform(Independent(0), torch.arange(8, 16), (3,))
        >>> (8 * u).long().sort().values.tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """

    size: int
    limit: int = 1024
    splits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuses what has no net."""
        if self.size < 1 or not 1 <= self.limit <= _MOST:
            raise ValueError(f"size is {self.size} and limit {self.limit}; need size >= 1 and limit in 1 .. {_MOST}")

    def _points(self, source: NoiseSource, number: Tensor, dimension: int, columns: slice) -> Tensor:
        bits = _net(self.size, dimension)[number % self.size, columns]
        net = number // self.size
        first, which = net.unique(return_inverse=True)
        shift = source.uniform(first, (dimension,), draw=SHARED_DRAW, dtype=torch.float64)[which, columns]
        shift = shift * 2.0**_BITS
        whole = shift.floor()
        points = ((bits ^ whole.long()).double() + (shift - whole)) * 2.0**-_BITS
        return points.clamp(2.0**-53, 1 - 2.0**-53)  # for sources whose numbers have more than 52 bits

    def normal(
        self, source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """See the base class."""
        d = math.prod(shape)
        covered = min(d, self.limit)
        points = self._points(source, number, 1 + covered, slice(1, None)).to(device)
        z = torch.special.ndtri(points).float()
        if covered < d:
            rest = source.normal(number, (d,), draw=0, device=device)[:, covered:]
            z = torch.cat([z, rest], 1)
        return z.reshape(-1, *shape)

    def uniform(self, source: NoiseSource, number: Tensor, shape: Sequence[int]) -> Tensor:
        """The first coordinate of the points, (n,) float64."""
        covered = min(math.prod(shape), self.limit)
        return self._points(source, number, 1 + covered, slice(0, 1))[:, 0]
