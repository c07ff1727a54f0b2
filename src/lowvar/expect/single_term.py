r"""Randomised multilevel, single term: one random level a unit, and no bias of step count at all.

    Z = (P_l - P_{l-1}) / p_l,     l drawn with probability p_l,      E Z = sum_l E (P_l - P_{l-1}) = lim E P_l.

Over the levels of a given sampler it has that sampler's expectation; over levels without end it has the limit's: the
expectation of the process in infinitely many steps, for a finite cost a sample if p_l decays faster than cost grows.
With p_l ~ 2^(-r l), gamma < r < beta, variance and cost are finite (r = (beta + gamma) / 2 is the best).

Deep levels are rare and heavily weighted, so Z has heavy tails and an interval from few units covers too little: the
design declares it, and is used only where it is named.

Source: Rhee & Glynn 2015, Theorem 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvar.expect.design import OneStream
from lowvar.expect.independent import IndependentUnits
from lowvar.expect.integrand import Integrand
from lowvar.expect.sampler import Sampler, alone
from lowvar.expect.streams import Stream
from lowvar.process.noise import NoiseSource

__all__ = ["HEAVY", "level_probabilities", "single_term"]

HEAVY = "deep levels are rare and heavily weighted: the interval covers too little until all of them were drawn often"
_LEVEL_DRAW = 0x1E7E1


def level_probabilities(levels: int, decay: float = 1.5) -> Tensor:
    """p_l ~ 2^(-decay l), (levels,) float64.

    Example:
        >>> level_probabilities(3, 1.0).tolist()
        [0.5714285714285714, 0.2857142857142857, 0.14285714285714285]
    """
    p = 2.0 ** (-decay * torch.arange(levels, dtype=torch.float64))
    return p / p.sum()


def single_term(levels: Sequence[Sampler], statistic: Integrand, number: int, decay: float = 1.5) -> OneStream:
    """The design over samplers, coarsest first.

    Args:
        levels: coupled samplers (`lowvar.expect.multilevel.ladder`); each has the one before as its `coarser`.
        statistic: the statistic.
        number: of the stream.
        decay: r, of the levels' probabilities.

    Raises:
        ValueError: for fewer than 2 levels.
    """
    if len(levels) < 2:
        raise ValueError("a randomised multilevel design needs a sampler with a coarser one")
    p = level_probabilities(len(levels), decay)
    own = [alone(s) for s in levels]
    pairs = [(s, s.coarser if l else None) for l, s in enumerate(own)]
    costs = torch.tensor([fine.nfe + (0 if coarse is None else coarse.nfe) for fine, coarse in pairs])

    def drawn(index: Tensor, noise: NoiseSource) -> Tensor:
        u = noise.uniform(index, (1,), draw=_LEVEL_DRAW, dtype=torch.float64)[:, 0]
        return torch.searchsorted(p.cumsum(0), u).clamp_max(len(p) - 1)

    def evaluate(index: Tensor, noise: NoiseSource) -> tuple[Tensor, Tensor | None]:
        which = drawn(index, noise)
        out = value = None
        for l, (fine, coarse) in enumerate(pairs):
            chosen = which == l
            if not bool(chosen.any()):
                continue
            g = statistic(fine(index[chosen], noise))
            f = g if coarse is None else g - statistic(coarse(index[chosen], noise))
            out = f.new_zeros(len(index), f.shape[1]) if out is None else out
            value = torch.zeros_like(out) if value is None else value
            out[chosen.to(f.device)], value[chosen.to(f.device)] = f / float(p[l]), g
        assert out is not None
        assert value is not None
        return out, value[..., None]

    def spent(source: NoiseSource, numbers: Tensor) -> int:
        return int(costs[drawn(numbers, source)].sum())

    stream = Stream(
        "single term", number, IndependentUnits(), float((p * costs).sum()), ("level value",), evaluate, spent
    )
    return OneStream("single-term", (stream,), (), HEAVY)
