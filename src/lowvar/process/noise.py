r"""Noise as an argument: one counter-based stream per sample.

Every random number of a reverse process is a function of four integers,

    z = f(seed; sample, draw, element),

with f a keyed bijection (Philox4x32-10, Salmon et al. 2011) followed by a Box-Muller transform. There is no state to
advance, so the noise of sample i does not depend on the batch size, on the order in which samples are drawn or on the
number of processes, and any draw can be replayed. `draw` numbers the uses within one sample: by convention 0 is the
initial noise x_1 and k + 1 the noise of reverse step k.

A `NoiseSource` maps sample numbers to streams. `Independent` gives each sample its own; `Antithetic` negates the stream
of the neighbour (z, -z), which leaves every marginal standard normal and correlates pairs; `Common` shares one stream
between the samples of a group, for comparisons on common random numbers; `TorchGenerators` draws in the order of given
`torch.Generator` objects, for parity with libraries that work so.

Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Antithetic", "Common", "Independent", "NoiseSource", "TorchGenerators", "philox"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32 with 10 rounds: a keyed bijection on 128-bit counters.

    Args:
        counter: int64 tensor (4, ...) of 32-bit words.
        key: two 32-bit words.

    Returns:
        int64 tensor (4, ...) of 32-bit words, uniform on [0, 2^32).

    Example:
        >>> [hex(w) for w in philox(torch.zeros(4, 1, dtype=torch.int64), (0, 0)).flatten().tolist()]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter.unbind(0)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # wraps modulo 2^64, as intended
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3])


def _words(seed: int, purpose: int, index: Tensor, draw: int, blocks: int) -> Tensor:
    """128 random bits for each (sample, block): int64 (4, n, blocks)."""
    block = torch.arange(blocks, dtype=torch.int64, device=index.device)
    n = index.shape[0]
    counter = torch.stack(
        [
            block.expand(n, blocks),
            torch.full((n, blocks), draw & _MASK, dtype=torch.int64, device=index.device),
            (index & _MASK)[:, None].expand(n, blocks),
            ((((index >> 32) & 0xFFFFFF) << 8) | purpose)[:, None].expand(n, blocks),
        ]
    )
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK))


class NoiseSource(ABC):
    """Standard normal and uniform numbers as a function of the sample's number and the draw's number."""

    @abstractmethod
    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers (n, *shape) for the samples `index` (n,) at draw number `draw`."""

    @abstractmethod
    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers in the open interval (0, 1), (n, *shape), for the samples `index` at draw number `draw`."""


def _as_index(index: Tensor | Sequence[int], device: torch.device | str) -> Tensor:
    return torch.as_tensor(index, dtype=torch.int64, device=device).reshape(-1)


@dataclass(frozen=True)
class Independent(NoiseSource):
    """Independent noise for every sample and draw.

    Args:
        seed: any integer; its lower 64 bits are the key.

    Example:
        >>> source = Independent(seed=7)
        >>> all_at_once = source.normal(range(8), (2, 3), draw=1)
        >>> torch.equal(all_at_once[5:6], source.normal([5], (2, 3), draw=1))
        True
    """

    seed: int = 0

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers by Box-Muller in float64, rounded to `dtype`."""
        index = _as_index(index, device)
        d = math.prod(shape)
        words = _words(self.seed, 0, index, draw, -(-d // 4)).to(torch.float64)
        u = (words + 0.5) * 2.0**-32
        radius = torch.sqrt(-2.0 * torch.log(u[0::2]))
        angle = (2.0 * math.pi) * u[1::2]
        z = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])  # (4, n, blocks)
        return z.permute(1, 2, 0).reshape(index.shape[0], -1)[:, :d].to(dtype).reshape(-1, *shape)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers (w + 1/2) / 2^m, m = 52 bits (float64) or 23 (else): 0 and 1 are excluded."""
        index = _as_index(index, device)
        d = math.prod(shape)
        words = _words(self.seed, 1, index, draw, -(-d // 2))
        if dtype == torch.float64:
            u = (((words[0::2] >> 6) << 26) | (words[1::2] >> 6)).to(torch.float64).add_(0.5).mul_(2.0**-52)
        else:
            u = (words[0::2] >> 9).to(torch.float64).add_(0.5).mul_(2.0**-23)
        return u.permute(1, 2, 0).reshape(index.shape[0], -1)[:, :d].to(dtype).reshape(-1, *shape)


@dataclass(frozen=True)
class Antithetic(NoiseSource):
    """Pairs of mirrored samples: sample 2k has the noise z of `base`'s sample k, sample 2k + 1 has -z (and 1 - u).

    Every sample alone is standard normal; only pairs are dependent, so a statistic's interval must come from pair
    means.

    Example:
        >>> z = Antithetic(Independent(3)).normal(range(4), (5,))
        >>> torch.equal(z[0], -z[1]) and not torch.equal(z[0], z[2])
        True
    """

    base: NoiseSource = field(default_factory=Independent)

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers, mirrored for odd sample numbers."""
        index = _as_index(index, device)
        z = self.base.normal(index // 2, shape, draw=draw, dtype=dtype, device=device)
        sign = (1 - 2 * (index % 2)).to(z.dtype)
        return z * sign.reshape(-1, *([1] * len(shape)))

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers, reflected (1 - u) for odd sample numbers."""
        index = _as_index(index, device)
        u = self.base.uniform(index // 2, shape, draw=draw, dtype=dtype, device=device)
        odd = (index % 2).bool().reshape(-1, *([1] * len(shape)))
        return torch.where(odd, 1 - u, u)


@dataclass(frozen=True)
class Common(NoiseSource):
    """Groups of `size` consecutive samples share one stream; `size=None` gives all samples the same.

    Two samplers that are to be compared on common noise need no such source: giving both the same source and the same
    sample numbers is enough. `Common` is for branches and conditions *within* one batch.

    Example:
        >>> z = Common(Independent(0), size=2).normal(range(4), (3,))
        >>> torch.equal(z[0], z[1]) and not torch.equal(z[1], z[2])
        True
    """

    base: NoiseSource = field(default_factory=Independent)
    size: int | None = None

    def __post_init__(self) -> None:
        """Refuses a group size below 1."""
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}; a group has at least 1 sample (None: all samples are one group)")

    def _group(self, index: Tensor) -> Tensor:
        return torch.zeros_like(index) if self.size is None else index // self.size

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers, equal within a group."""
        return self.base.normal(self._group(_as_index(index, device)), shape, draw=draw, dtype=dtype, device=device)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers, equal within a group."""
        return self.base.uniform(self._group(_as_index(index, device)), shape, draw=draw, dtype=dtype, device=device)


@dataclass(frozen=True)
class TorchGenerators(NoiseSource):
    """Draws from `torch.Generator` objects in the order of the calls; `index` and `draw` are ignored.

    Args:
        generators: one generator for the whole batch (numbers then depend on the batch size, as in the libraries that
            work so), or a list with one a sample.

    Raises:
        ValueError: if a list has another length than the batch.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> z = TorchGenerators(g).normal(range(2), (3,))
        >>> torch.equal(z, torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
        True
    """

    generators: torch.Generator | list[torch.Generator] | None = None

    def _draw(self, n: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, kind: str) -> Tensor:
        def one(rows: int, generator: torch.Generator | None) -> Tensor:
            where = device if generator is None else generator.device
            draw = torch.randn if kind == "normal" else torch.rand
            return draw((rows, *shape), generator=generator, dtype=dtype, device=where).to(device)

        if not isinstance(self.generators, list):
            return one(n, self.generators)
        if len(self.generators) != n:
            raise ValueError(f"{len(self.generators)} generators for {n} samples; give one a sample, or a single one")
        return torch.cat([one(1, g) for g in self.generators])

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers from the generators, in the order of the calls."""
        return self._draw(len(index), shape, dtype, device, "normal")

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers in (0, 1): an exact 0 is moved to the smallest positive number of `dtype`."""
        u = self._draw(len(index), shape, dtype, device, "uniform")
        return u.clamp_min(torch.finfo(dtype).tiny)
