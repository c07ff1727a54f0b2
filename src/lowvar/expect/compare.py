r"""A comparison of two samplers on common noise: the difference with its interval.

    delta = E f(a) - E f(b),      Var(f(a) - f(b)) = Var f(a) + Var f(b) - 2 Cov

Both samplers get the same noise, sample by sample, so that what they share cancels. Independent runs would need
(Var f(a) + Var f(b)) / Var(unit of the difference) times as many samples of each for the same interval. The difference
is a statistic of a sampler like any other, so pairs, nets and features of the noise apply to it, and the planner
chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.expect.estimate import Estimate
from lowvar.expect.integrand import StatisticFunction
from lowvar.expect.loop import Options, estimate
from lowvar.expect.sampler import FunctionSampler, Sampler
from lowvar.process.noise import NoiseSource

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """E f(a) - E f(b).

    Attributes:
        difference: the estimate of the difference; its `vrf` is against independent samples on common noise.
        value_a, value_b: means of both over the samples, of the statistic's shape.
        nfe: evaluations spent on both.
        samples: samples of each.
        samples_independent: samples of each that two independent runs need for the same interval.
        factor: samples_independent / samples.
    """

    difference: Estimate
    value_a: Tensor
    value_b: Tensor
    nfe: int
    samples: int
    samples_independent: float
    factor: float

    @property
    def verdict(self) -> str:
        """Ahead where a is above b by more than the interval (for numbers), behind, or level."""
        if self.difference.value.ndim:
            raise ValueError("a verdict is about one number; read `difference.low` and `difference.high`")
        low, high = float(self.difference.low), float(self.difference.high)
        return "ahead" if low > 0 else "behind" if high < 0 else "level"


def compare(
    sampler_a: Sampler, sampler_b: Sampler, statistic: StatisticFunction, **options: Unpack[Options]
) -> Comparison:
    """The difference of two samplers on common noise; arguments as in `lowvar.expect.estimates`.

    `budget` is of both samplers together.

    Raises:
        UserError: if the samplers' shapes differ; and as `estimates`.

    Example:
        >>> def at(c):
        ...     return FunctionSampler(lambda index, noise: c + noise.normal(index, (2,)), (2,))
        >>> found = compare(at(1.5), at(1.0), lambda x: x[:, 0], tol=0.1)
        >>> round(float(found.difference.value), 6), found.verdict
        (0.5, 'ahead')
    """
    shape = torch.Size(sampler_a.event_shape)
    if shape != torch.Size(sampler_b.event_shape):
        raise UserError(
            f"the samplers' shapes are {tuple(shape)} and {tuple(sampler_b.event_shape)}; compare samplers of one shape"
        )

    def both(index: Tensor, source: NoiseSource) -> Tensor:
        return torch.stack([sampler_a(index, source), sampler_b(index, source)], 1)

    moments = _Moments()

    def watched(x: Tensor) -> Tensor:
        a, b = (torch.as_tensor(statistic(x[:, i])).double() for i in (0, 1))
        moments.add(a, b)
        return a - b

    pair = FunctionSampler(
        both,
        (2, *shape),
        sampler_a.nfe + sampler_b.nfe,
        max(sampler_a.draws, sampler_b.draws),
        noise_shape=shape,
    )
    label = options.get("name") or getattr(statistic, "__name__", "statistic")
    found = estimate(pair, watched, **(options | {"name": f"difference of {label}"}))
    a, b, separate = moments.result()
    var, largest = found.se**2, options.get("norm", "max") == "max"
    top = separate.max() if largest else separate.mean()
    own = var.max() if largest else var.mean()
    needed = float(top / own) if float(own) > 0 else float("inf")
    return Comparison(found, a, b, found.nfe, found.samples, needed, needed / found.samples)


class _Moments:
    """Means and variances of both values over all samples seen."""

    def __init__(self) -> None:
        self.n, self.sums = 0, [torch.zeros(()) for _ in range(4)]

    def add(self, a: Tensor, b: Tensor) -> None:
        self.n += len(a)
        self.sums = [s + v.sum(0) for s, v in zip(self.sums, (a, b, a**2, b**2), strict=True)]

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        a, b, aa, bb = (s / self.n for s in self.sums)
        return a, b, ((aa - a**2) + (bb - b**2)).clamp_min(0) * self.n / max(self.n - 1, 1)
