r"""Units: groups of `size` consecutive samples whose noise is chosen together, independent of all other units.

An interval for a mean comes from the spread of independent things. Where noise is not independent between samples
(mirrored pairs, nets) the group is what is independent, so every estimate of this package averages over *units*, and
unit u consists of samples u size .. u size + size - 1. A `UnitNoise` says how large a unit is and turns a source of
independent noise into the unit's; each sample of it alone is still standard normal, which is what keeps it unbiased.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource

__all__ = ["Shifted", "UnitNoise"]

STREAM = 1 << 44


class UnitNoise(ABC):
    """How the noise of a unit is chosen.

    Attributes:
        name: the design's name.
        source: where it is from.
        unbiased: whether the mean over units has the statistic's expectation at any number of units.
        helps: the statistics it reduces the variance of, in words.
        size: samples a unit.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    unbiased: ClassVar[bool] = True
    helps: ClassVar[str]

    @property
    @abstractmethod
    def size(self) -> int:
        """Samples a unit."""

    @abstractmethod
    def wrap(self, base: NoiseSource) -> NoiseSource:
        """The noise of units from independent noise."""


@dataclass(frozen=True)
class Shifted(NoiseSource):
    """The noise of other sample numbers: stream k of an estimate uses the numbers from k 2^44 on.

    Example:
        >>> from lowvar.process import Independent
        >>> a, b = Independent(0), Shifted(Independent(0), 1)
        >>> bool(torch.equal(b.normal([3], (2,)), a.normal([3 + 2**44], (2,))))
        True
    """

    base: NoiseSource
    stream: int

    def _moved(self, index: Tensor | Sequence[int]) -> Tensor:
        return torch.as_tensor(index, dtype=torch.int64).reshape(-1) + self.stream * STREAM

    def normal(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers of the moved sample numbers."""
        return self.base.normal(self._moved(index), shape, draw=draw, dtype=dtype, device=device)

    def uniform(
        self,
        index: Tensor | Sequence[int],
        shape: Sequence[int],
        *,
        draw: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers of the moved sample numbers."""
        return self.base.uniform(self._moved(index), shape, draw=draw, dtype=dtype, device=device)
