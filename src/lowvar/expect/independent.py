r"""Independent sampling: the baseline that everything else is measured against.

mean_n f(x_i), Var = sigma^2 / n.  A unit is one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowvar.expect.units import UnitNoise
from lowvar.process.noise import NoiseSource

__all__ = ["IndependentUnits"]


@dataclass(frozen=True)
class IndependentUnits(UnitNoise):
    """Every sample is a unit.

    Example:
        >>> IndependentUnits().size
        1
    """

    name: ClassVar[str] = "independent"
    source: ClassVar[str] = "Metropolis & Ulam 1949"
    helps: ClassVar[str] = "any statistic, by nothing"

    @property
    def size(self) -> int:
        """See the base class."""
        return 1

    def wrap(self, base: NoiseSource) -> NoiseSource:
        """The noise as it is."""
        return base
