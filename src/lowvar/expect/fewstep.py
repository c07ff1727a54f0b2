r"""A few-step sampler as control variate on common noise.

With P the sampler's value and Q that of a coarser chain on the same noise (`lowvar.expect.coupled`), correlation rho,
and c = (cost of Q) / (cost of P),

    mu^ = mean_n (P - b Q) + b mean_N Q,       N independent samples of Q alone,

has at the best split of a budget the variance-reduction factor

    1 / (sqrt((1 - rho^2) (1 + c)) + |rho| sqrt(c))^2,

below 1 unless rho is large and c small: then it is declined. (Where the coarse values that are drawn with P also count
towards the mean of Q the factor is 1 / (sqrt(1 - rho^2) + |rho| sqrt(c))^2; here both streams are independent, which
keeps b cross-fitted and the interval honest.) The coefficient b is cross-fitted (`lowvar.expect.sums`).

Source: Peherstorfer, Willcox & Gunzburger 2016, for two models.
"""

from __future__ import annotations

import math

from torch import Tensor

from lowvar.expect.design import OneStream
from lowvar.expect.integrand import Integrand
from lowvar.expect.sampler import Sampler
from lowvar.expect.streams import Stream
from lowvar.expect.units import UnitNoise
from lowvar.process.noise import NoiseSource

__all__ = ["expected_factor", "few_step"]


def expected_factor(rho: float, c: float) -> float:
    """The variance-reduction factor at the best split.

    Args:
        rho: correlation of fine and coarse values.
        c: cost of a coarse sample over that of a fine one.

    Example:
        >>> round(expected_factor(0.99, 0.05), 2), round(expected_factor(0.5, 0.5), 2)
        (7.47, 0.5)
    """
    root = math.sqrt(max(1 - rho**2, 0) * (1 + c)) + abs(rho) * math.sqrt(c)
    return 1 / root**2 if root > 0 else math.inf


def few_step(fine: Sampler, coarse: Sampler, statistic: Integrand, units: UnitNoise, number: int) -> OneStream:
    """The design of a sampler and a coarser one.

    Args:
        fine, coarse: coupled samplers; `coarse` is `fine.coarser` or coarser still.
        statistic: the statistic.
        units: noise of a unit.
        number: of the first of two streams.
    """

    def both(index: Tensor, noise: NoiseSource) -> tuple[Tensor, Tensor | None]:
        return statistic(fine(index, noise)), statistic(coarse(index, noise))[..., None]

    def alone(index: Tensor, noise: NoiseSource) -> tuple[Tensor, Tensor | None]:
        return statistic(coarse(index, noise)), None

    m, name = units.size, f"{fine.nfe} with {coarse.nfe} {units.name}"
    main = Stream(name, number, units, (fine.nfe + coarse.nfe) * m, ("coarse",), both)
    other = Stream(f"{coarse.nfe} alone {units.name}", number + 1, units, coarse.nfe * m, (), alone)
    return OneStream("few-step", (main, other), ("coarse",))
