r"""Antithetic pairs: samples from z and from -z, start and every step's noise mirrored.

With rho the correlation of f(G(z)) and f(G(-z)), the mean of n / 2 pairs has

    Var = sigma^2 (1 + rho) / n:

no variance at all where f o G is odd about its mean (rho = -1: a linear statistic of a Gaussian target under a
deterministic chain), and up to twice that of independent sampling where it is even (rho = 1: a squared norm). The
interval comes from pair means.

Source: Hammersley & Morton 1956.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowvar.expect.units import UnitNoise
from lowvar.process.noise import Antithetic, NoiseSource

__all__ = ["AntitheticUnits"]


@dataclass(frozen=True)
class AntitheticUnits(UnitNoise):
    """A unit is a mirrored pair.

    Example:
        >>> AntitheticUnits().size
        2
    """

    name: ClassVar[str] = "antithetic"
    source: ClassVar[str] = "Hammersley & Morton 1956"
    helps: ClassVar[str] = "odd statistics (coordinates, brightness); harms even ones (norms)"

    @property
    def size(self) -> int:
        """See the base class."""
        return 2

    def wrap(self, base: NoiseSource) -> NoiseSource:
        """Sample 2k has the noise of sample k, sample 2k + 1 its mirror image."""
        return Antithetic(base)
