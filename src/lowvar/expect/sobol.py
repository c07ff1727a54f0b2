r"""Randomised quasi-Monte Carlo: a unit is one scrambled Sobol net of n = 2^m points, mapped to noise.

    u = point,    s = Phi^-1(u),    noise along the covered directions from s, all else independent.

**Scrambling.** Each net has its own random lower triangular bit matrix for every coordinate (Matousek 1998) and its own
random shift of all 30 bits; below the last bit a random fraction is added. So each point is uniform on the open
interval (0, 1): no 0 or 1 reaches Phi^-1. Nets are independent, and the interval comes from the means of nets only;
within a net nothing is independent. For smooth f of few effective dimensions a net's mean has variance about n^-3.

**Which directions.** Nets of few points are worth their dimensions only if few directions matter. For chains with step
noise the sample of the twin (`lowvar.expect.shadow`) is b + B sum_k F_k (B^T z_k), so along direction i it moves with
one number only, W_i = sum_k F_ki z_ki. The net's coordinates are therefore the nodes of a Brownian bridge of that sum
in its own clock sum F^2 (Moskowitz & Caflisch 1996): first W_i itself for the directions of largest spread, then the
halves of the path, and so on. With v_b the unit vector of node b,

    z_ki  =  zeta_ki + sum_b v_bi,k (s_bi - sum_l v_bi,l zeta_li),       zeta independent:

the components along the covered nodes are replaced, the rest kept, and z stays exactly standard normal.

**Limits.** torch's direction numbers reach 21,201 dimensions (Joe & Kuo 2008); at most `limit` coordinates are covered.

Sources: Sobol 1967; Owen 1998; Matousek 1998; Joe & Kuo 2008; the bridge in the clock of the twin's gains is this
package's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.expect.shadow import Shadow
from lowvar.expect.units import UnitNoise
from lowvar.process.basis import Basis, DCTBasis, PixelBasis
from lowvar.process.noise import NoiseSource

__all__ = ["Bridge", "SobolNoise", "SobolUnits", "bridge_of", "net_points"]

_BITS = 30
_MOST = torch.quasirandom.SobolEngine.MAXDIM
SCRAMBLE_DRAW = 0x50B01


@lru_cache(maxsize=8)
def _directions(dimension: int) -> Tensor:
    """Unscrambled direction numbers, (dimension, 30) int64; bit 29 is the most significant."""
    state: Tensor = torch.quasirandom.SobolEngine(dimension).sobolstate  # type: ignore[assignment]
    return state.long()


def _parity(v: Tensor) -> Tensor:
    for shift in (16, 8, 4, 2, 1):
        v = v ^ (v >> shift)
    return v & 1


def net_points(source: NoiseSource, nets: Tensor, size: int, dimension: int) -> Tensor:
    """Points of independently scrambled nets, (nets, size, dimension) float64, all in the open interval (0, 1).

    Args:
        source: of the scrambling, by the net's number.
        nets: their numbers (R,).
        size: n, a power of two.
        dimension: coordinates.

    Raises:
        ValueError: if the size is no power of two up to 2^30 or the dimension is beyond the direction numbers.

    Example:
        >>> from lowvar.process import Independent
        >>> u = net_points(Independent(0), torch.arange(2), 8, 3)
        >>> (8 * u[1]).long().sort(0).values.T.tolist()[0]
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if size < 1 or size & (size - 1) or size > 1 << _BITS:
        raise ValueError(f"a net has {size} points; give a power of two up to 2^{_BITS}")
    if not 1 <= dimension <= _MOST:
        raise ValueError(f"{dimension} coordinates; the direction numbers reach from 1 to {_MOST}")
    m = size.bit_length() - 1
    words = source.uniform(nets, (dimension, _BITS + 1), draw=SCRAMBLE_DRAW, dtype=torch.float64)
    words = words * 2.0**_BITS
    whole = words.long()
    i = torch.arange(_BITS)
    own = torch.ones_like(i) << (_BITS - 1 - i)
    masks = (whole[..., 1:] & ~(2 * own - 1)) | own  # row i: random bits above bit i, and bit i itself
    V = _directions(dimension)[:, :m]
    bits = _parity(masks[..., :, None] & V[:, None, :])  # (R, dimension, 30, m)
    scrambled = (bits << (_BITS - 1 - i)[:, None]).sum(2)  # (R, dimension, m)
    points = whole[..., 0][:, None].expand(-1, size, -1)
    k = torch.arange(size)
    for b in range(m):
        points = points ^ (((k >> b) & 1)[:, None] * scrambled[:, None, :, b])
    fraction = (words[..., 0] - whole[..., 0])[:, None]
    return ((points.double() + fraction) * 2.0**-_BITS).clamp(2.0**-53, 1 - 2.0**-53)


@dataclass(frozen=True, eq=False)
class Bridge:
    """Which combinations of noise a net covers.

    Attributes:
        basis: B.
        direction: the direction of each covered coordinate, (r,) int64, index into the flattened coefficients.
        node: v, its unit vector over draws 0 .. K, (r, K + 1) float64.
    """

    basis: Basis
    direction: Tensor
    node: Tensor


def _nodes(gains: Tensor, count: int) -> list[Tensor]:
    """The first `count` Haar vectors of a path with increments gains (K + 1,): all of it, its halves, ..."""
    total = gains.norm()
    if float(total) == 0:
        return []
    found, queue = [gains / total], [(0, len(gains))]
    while queue and len(found) < count:
        low, high = queue.pop(0)
        if high - low < 2:
            continue
        clock = (gains[low:high] ** 2).cumsum(0)
        cut = int((clock - clock[-1] / 2).abs()[:-1].argmin()) + 1
        left, right = gains[low : low + cut].norm(), gains[low + cut : high].norm()
        if float(left) > 0 and float(right) > 0:
            v = torch.zeros_like(gains)
            whole = torch.hypot(left, right)
            v[low : low + cut] = gains[low : low + cut] * right / left / whole
            v[low + cut : high] = -gains[low + cut : high] * left / right / whole
            found.append(v)
        queue += [(low, low + cut), (low + cut, high)]
    return found


def bridge_of(shape: torch.Size, draws: int, shadow: Shadow | None, limit: int = 64) -> Bridge:
    """The coordinates worth covering: whole paths of the leading directions first, then their halves.

    Without a shadow the directions are those of a DCT, lowest frequencies first (numbers in a row: as they come), and
    every draw counts alike.

    Args:
        shape: of an event.
        draws: step noises of a sample.
        shadow: the sampler's.
        limit: largest number of coordinates.

    Example:
        >>> bridge = bridge_of(torch.Size((3,)), 2, None, limit=6)
        >>> bridge.direction.tolist(), tuple(bridge.node.shape)
        ([0, 1, 2, 0, 1, 2], (6, 3))
    """
    d = shape.numel()
    if shadow is not None:
        basis, gains = shadow.basis, shadow.gains.reshape(draws + 1, d).double().cpu()
        order = torch.argsort(gains.norm(dim=0), descending=True, stable=True)
    else:
        basis: Basis = DCTBasis(shape) if len(shape) > 1 else PixelBasis(shape)
        gains = torch.ones(draws + 1, d, dtype=torch.float64)
        frequency = torch.zeros(shape, dtype=torch.float64)
        for axis, n in enumerate(shape):
            frequency += (torch.arange(n) / n).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        order = torch.argsort(frequency.flatten(), stable=True) if len(shape) > 1 else torch.arange(d)
    order = order[: min(d, limit)]
    count = max(1, min(draws + 1, limit // max(len(order), 1)))
    paths = [_nodes(gains[:, i], count) for i in order.tolist()]
    direction, node = [], []
    for b in range(count):
        for i, path in zip(order.tolist(), paths, strict=True):
            if b < len(path):
                direction.append(i)
                node.append(path[b])
    if not node:
        direction, node = [0], [torch.eye(draws + 1, dtype=torch.float64)[0]]
    return Bridge(basis, torch.tensor(direction), torch.stack(node))


@dataclass(frozen=True, eq=False)
class SobolNoise(NoiseSource):
    """Noise of nets: sample i is point i mod size of net i // size.

    Args:
        base: independent noise, which also scrambles.
        size: points a net, a power of two.
        bridge: what the net covers.
    """

    base: NoiseSource
    size: int
    bridge: Bridge

    def __post_init__(self) -> None:
        """A place for what all draws of a batch share."""
        object.__setattr__(self, "_last", {})

    def _change(self, index: Tensor, shape: Sequence[int]) -> Tensor:
        """s_b - sum_l v_b,l zeta_l for each sample, (n, r) float64; the last batch's is kept for its other draws."""
        key = index.numpy().tobytes()
        last: dict[object, Tensor] = self._last  # type: ignore[attr-defined]
        if key not in last:
            nets, which = torch.unique(index // self.size, return_inverse=True)
            u = net_points(self.base, nets, self.size, len(self.bridge.direction))
            change = torch.special.ndtri(u[which, index % self.size])
            for k in range(self.bridge.node.shape[1]):
                z = self.base.normal(index, shape, draw=k, dtype=torch.float64)
                c = self.bridge.basis.forward(z).flatten(1)[:, self.bridge.direction]
                change = change - self.bridge.node[:, k] * c
            last.clear()
            last[key] = change
        return last[key]

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers, dependent within a net."""
        index = torch.as_tensor(index, dtype=torch.int64).reshape(-1).cpu()
        z = self.base.normal(index, shape, draw=draw, dtype=torch.float64)
        if draw < self.bridge.node.shape[1] and len(index):
            moved = torch.zeros(len(index), z[0].numel(), dtype=torch.float64)
            moved.index_add_(1, self.bridge.direction, self._change(index, shape) * self.bridge.node[:, draw])
            z = z + self.bridge.basis.inverse(moved.reshape(z.shape))
        return z.to(device=device, dtype=dtype)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Independent uniform numbers: nets cover normal noise only."""
        return self.base.uniform(index, shape, draw=draw, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class SobolUnits(UnitNoise):
    """A unit is a scrambled net.

    Args:
        points: n, a power of two.
        bridge: what it covers.

    Raises:
        ValueError: if n is no power of two.

    Example:
        >>> SobolUnits(64, bridge_of(torch.Size((2,)), 0, None)).size
        64
    """

    name: ClassVar[str] = "sobol"
    source: ClassVar[str] = "Owen 1998; Joe & Kuo 2008; Moskowitz & Caflisch 1996"
    helps: ClassVar[str] = "smooth statistics of few effective dimensions"

    points: int
    bridge: Bridge

    def __post_init__(self) -> None:
        """Checks the size."""
        if self.points < 2 or self.points & (self.points - 1):
            raise ValueError(f"a net has {self.points} points; give a power of two, at least 2")

    @property
    def size(self) -> int:
        """See the base class."""
        return self.points

    def wrap(self, base: NoiseSource) -> NoiseSource:
        """The nets' noise."""
        return SobolNoise(base, self.points, self.bridge)
