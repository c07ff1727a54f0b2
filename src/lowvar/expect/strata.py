r"""Stratification over classes: every class gets its share of the samples, and the variance between classes is gone.

    mu = sum_c p_c mu_c,      Var = sum_c p_c^2 sigma_c^2 / n_c,

with the p_c known. In proportion (n_c = n p_c) the variance of independent sampling loses its part between classes,
sum p_c (mu_c - mu)^2; the allocation of `lowvar.expect.design` (n_c ~ p_c sigma_c: Neyman 1934) gains from unequal
spreads as well.

Source: Neyman 1934.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowvar.expect.design import ManyStreams
from lowvar.expect.integrand import Integrand
from lowvar.expect.sampler import Sampler
from lowvar.expect.streams import sample_stream
from lowvar.expect.units import UnitNoise

__all__ = ["stratified"]


def stratified(
    parts: Sequence[tuple[float, Sampler]], statistic: Integrand, units: UnitNoise, number: int
) -> ManyStreams:
    """The design of a conditional sampler's classes.

    Args:
        parts: (probability, sampler) of each class; probabilities sum to 1.
        statistic: the statistic.
        units: noise of a unit in every class.
        number: of the first stream.
    """
    streams = [
        sample_stream(s, statistic, units, number + c, key=f"class {c} {units.name}") for c, (_, s) in enumerate(parts)
    ]
    return ManyStreams("stratified", tuple(streams), tuple(p for p, _ in parts), classes=True)
