r"""Which expectation designs pay for a statistic of the model's samples.

The planner of `lowvar.expect` draws a pilot and ranks designs by variance x cost for the statistic at hand; a short
estimate by the winner then measures its factor against independent sampling, with an interval, on samples that the
pilot's luck did not choose. Both are parts of an estimate that `lowvar estimate` would make, at its least size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.expect import Candidate, ChainSampler, estimate
from lowvar.process.noise import Independent

__all__ = ["StatisticProfile", "profile_statistic", "seconds_per_sample"]

PILOT = 64
_LEAST, _WHOLE = 4 * PILOT, 16 * PILOT  # samples of the estimate


@dataclass(frozen=True)
class StatisticProfile:
    """What sampling a statistic takes.

    Attributes:
        name: the statistic's.
        value, half_width: the estimate and the half width of its interval (norm, where it is no number).
        design: the chosen design.
        vrf, low, high: its factor against independent sampling at equal evaluations.
        candidates: all designs of the pilot.
        samples, nfe: spent.
    """

    name: str
    value: float
    half_width: float
    design: str
    vrf: float
    low: float
    high: float
    candidates: tuple[Candidate, ...]
    samples: int
    nfe: int


def seconds_per_sample(chain: ChainSampler, statistic: Callable[[Tensor], Tensor], n: int = 8) -> float:
    """The time of a sample with its statistic, from one batch of n.

    Args:
        chain: the sampler.
        statistic: of its samples.
        n: samples, beside those of the estimate.
    """
    begun = time.perf_counter()
    statistic(chain(torch.arange(n), Independent(2**30)))
    return (time.perf_counter() - begun) / n


def profile_statistic(
    chain: ChainSampler,
    statistic: Callable[[Tensor], Tensor],
    name: str,
    *,
    seconds: float,
    seed: int = 0,
    batch_size: int = 256,
) -> StatisticProfile | float:
    """The planner's choice for a statistic, and what it brings.

    Args:
        chain: the sampler.
        statistic: f(samples) -> one value a sample, or more.
        name: of the statistic.
        seconds: budget.
        seed: of the noise.
        batch_size: samples a batch.

    Returns:
        The profile, or, where the budget is below the least that a choice takes, the seconds that it would take.

    Example:
        >>> from lowvar.process import CosineVP, NetworkDenoiser, ReverseKernel
        >>> from lowvar.process.grid import trailing
        >>> denoiser = NetworkDenoiser(lambda x, t: torch.zeros_like(x), CosineVP(), "v_prediction")
        >>> chain = ChainSampler(denoiser, ReverseKernel(0.0, "small"), trailing(denoiser.schedule, 4), (3,))
        >>> found = profile_statistic(chain, lambda x: x.mean(1), "mean", seconds=1.0)
        >>> found.low > 10
        True
    """
    each = seconds_per_sample(chain, statistic)
    if each * _LEAST > 2 * seconds:
        return each * _LEAST
    n = int(min(max(seconds / max(each, 1e-9), _LEAST), _WHOLE))
    budget = (n + _LEAST) * chain.nfe + chain.nfe  # exploring costs evaluations that are no samples
    found = estimate(
        chain, statistic, budget=budget, noise=Independent(seed), batch_size=batch_size, pilot=PILOT, name=name
    )
    value = found.value.double()
    return StatisticProfile(
        name,
        float(value) if value.ndim == 0 else float(value.square().mean().sqrt()),
        float(found.half_width),
        found.design,
        found.vrf,
        found.vrf_low,
        found.vrf_high,
        tuple(found.decision.candidates),
        found.samples,
        found.nfe,
    )
