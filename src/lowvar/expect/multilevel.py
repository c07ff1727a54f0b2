r"""Multilevel: most samples in few steps, few in many, and the sum is exact.

With P_l = f of the chain in K_l = K_0 2^l steps, coupled on common noise (`lowvar.expect.coupled`),

    E P_L = E P_0 + sum_{l=1..L} E (P_l - P_{l-1}),      every expectation from its own independent stream.

The levels telescope because a coarse chain has the same law as the fine chain's partner and as the plain chain of the
next term. If |E (P_l - P_{l-1})| ~ 2^(-alpha l), Var ~ 2^(-beta l) and the cost ~ 2^(gamma l) (gamma = 1: steps), the
cost of an error eps is of order eps^-2 for beta > gamma: as if a sample cost no more than one of few steps.

A first-order ODE chain has alpha = 1, beta = 2 for smooth f. An SDE kernel, whose noise is additive, gets there late:
at 256 ancestral steps on Gaussian data alpha is .83 and beta 1.45, still above gamma. For an
indicator the differences are 0 but for a few samples that cross the edge (beta = 1 at best): their variance is
estimated from rare events, and an interval from few of them covers too little. The design says so and is not chosen.

Source: Giles 2008; for diffusion models Haji-Ali, Hoel & Tempone 2024 (arXiv:2409.15511).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.expect.design import ManyStreams
from lowvar.expect.integrand import Integrand
from lowvar.expect.sampler import Sampler, alone
from lowvar.expect.streams import Stream
from lowvar.expect.units import UnitNoise
from lowvar.process.noise import NoiseSource

__all__ = ["Rates", "fitted_rates", "ladder", "level_stream", "multilevel"]


def ladder(sampler: Sampler, smallest: int = 1) -> list[Sampler]:
    """The sampler and its coarser versions, coarsest first.

    Args:
        sampler: the finest.
        smallest: evaluations below which no level is added.
    """
    found = [sampler]
    while (below := found[-1].coarser) is not None and below.nfe >= smallest:
        found.append(below)
    return found[::-1]


def level_stream(
    fine: Sampler, coarse: Sampler | None, statistic: Integrand, units: UnitNoise, number: int, key: str
) -> Stream:
    """Units of P_l - P_{l-1} on common noise, of P_0 where there is no coarser sampler; P_l beside it."""

    def evaluate(index: Tensor, noise: NoiseSource) -> tuple[Tensor, Tensor | None]:
        f = statistic(fine(index, noise))
        return (f if coarse is None else f - statistic(coarse(index, noise))), f[..., None]

    nfe = (fine.nfe + (0 if coarse is None else coarse.nfe)) * units.size
    return Stream(key, number, units, nfe, ("level value",), evaluate)


def multilevel(
    levels: Sequence[Sampler], statistic: Integrand, units: UnitNoise, number: int, declared: str | None = None
) -> ManyStreams:
    """The multilevel design over samplers, coarsest first.

    Args:
        levels: coupled samplers (`ladder`), at least 2.
        statistic: the statistic.
        units: noise of a unit at every level.
        number: of the first stream.
        declared: see `Design`.

    Raises:
        ValueError: for fewer than 2 levels.
    """
    if len(levels) < 2:
        raise ValueError("a multilevel design needs a sampler with a coarser one: a chain of an even number of steps")
    streams = []
    for l, sampler in enumerate(levels):
        fine = alone(sampler)
        coarse = fine.coarser if l else None
        key = f"level {fine.nfe}" if coarse is None else f"level {fine.nfe} - {coarse.nfe}"
        streams.append(level_stream(fine, coarse, statistic, units, number + l, f"{key} {units.name}"))
    return ManyStreams("multilevel", tuple(streams), (1.0,) * len(streams), declared=declared)


@dataclass(frozen=True)
class Rates:
    """Fitted exponents of |E (P_l - P_{l-1})|, Var and cost per doubling of steps."""

    alpha: float
    beta: float
    gamma: float


def fitted_rates(means: Sequence[float], variances: Sequence[float], costs: Sequence[float]) -> Rates:
    """Least-squares slopes of log2 over levels 1, 2, ..; the first entry of each is level 1.

    Example:
        >>> rates = fitted_rates([0.5, 0.25, 0.125], [0.4, 0.1, 0.025], [3.0, 6.0, 12.0])
        >>> round(rates.alpha, 9), round(rates.beta, 9), round(rates.gamma, 9)
        (1.0, 2.0, 1.0)
    """

    def slope(values: Sequence[float]) -> float:
        y = torch.tensor([math.log2(max(abs(v), 1e-300)) for v in values], dtype=torch.float64)
        x = torch.arange(len(y), dtype=torch.float64)
        x = x - x.mean()
        return float((x * y).sum() / (x**2).sum()) if len(y) > 1 else math.nan

    return Rates(-slope(means), -slope(variances), slope(costs))
