r"""A comparison of two samplers on common noise: the difference with its interval.

    delta = E f(a) - E f(b),      Var(f(a) - f(b)) = Var f(a) + Var f(b) - 2 Cov

Both samplers get the same noise, sample by sample, so that what they share cancels. Independent runs would need
(Var f(a) + Var f(b)) / Var(unit of the difference) times as many samples of each for the same interval. The difference
is a statistic of a sampler like any other, so pairs and nets apply to it, and the planner chooses. Where both samplers
have twins, the difference of the twins' values on the same noise is a control as well (under the name "mixture"); two
checkpoints with one twin and one solver have a difference of 0 there, which the regression leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Unpack

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.expect.estimate import Estimate, Progress, RunState
from lowvar.expect.integrand import StatisticFunction, named
from lowvar.expect.loop import Options, estimates
from lowvar.expect.sampler import FunctionSampler, Sampler
from lowvar.process.noise import NoiseSource

__all__ = ["Comparison", "Pair", "compare"]


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
    pair = Pair(sampler_a, sampler_b, statistic)
    last = None
    for record in pair.records(**options):
        last = record.estimate
    assert last is not None
    return pair.result(last, largest=options.get("norm", "max") == "max")


class Pair:
    """Two samplers on common noise and a statistic: `records` runs, `result` sums up; `compare` is both.

    Args:
        sampler_a, sampler_b: samplers of one event shape.
        statistic: as of `estimates`.

    Raises:
        UserError: if the samplers' shapes differ.

    Example:
        >>> normal = FunctionSampler(lambda index, noise: noise.normal(index, (2,)), (2,))
        >>> pair = Pair(normal, normal, lambda x: x[:, 0])
        >>> *_, last = pair.records(budget=400)
        >>> float(pair.result(last.estimate).difference.value)
        0.0
    """

    def __init__(self, sampler_a: Sampler, sampler_b: Sampler, statistic: StatisticFunction) -> None:
        self.a, self.b, self.statistic = sampler_a, sampler_b, named(statistic)
        self.shape = torch.Size(sampler_a.event_shape)
        if self.shape != torch.Size(sampler_b.event_shape):
            raise UserError(
                f"the samplers' shapes are {tuple(self.shape)} and {tuple(sampler_b.event_shape)}; compare samplers of "
                "one shape"
            )
        self.moments: Tensor | None = None  # n, and sums of a, b, a^2 and b^2, (5, *shape)
        self._drawn: Tensor | None = None

    def records(self, *, state: RunState | None = None, **options: Unpack[Options]) -> Iterator[Progress]:
        """Runs the comparison, a record a batch; `state` is of an earlier record, to go on from there."""
        self.moments = None
        if state is not None:
            tensors = dict(state.tensors)
            self.moments = tensors.pop(_MOMENTS, None)
            state = RunState(tensors, state.plain)
        twins = [s.surrogate or s.shadow for s in (self.a, self.b)]
        twin = None if None in twins else FunctionSampler(_both(*twins), (2, *self.shape), 0)
        pair = FunctionSampler(
            self._draw,
            (2, *self.shape),
            self.a.nfe + self.b.nfe,
            max(self.a.draws, self.b.draws),
            noise_shape=self.a.noise_shape or self.shape,
            surrogate=twin,
        )
        label = options.get("name") or self.statistic.name
        for record in estimates(pair, self._difference, state=state, **(options | {"name": f"difference of {label}"})):
            held = {} if self.moments is None else {_MOMENTS: self.moments}
            yield replace(record, state=RunState({**record.state.tensors, **held}, record.state.plain))

    def result(self, found: Estimate, *, largest: bool = True) -> Comparison:
        """The comparison that an estimate of the difference ends.

        Args:
            found: of the last record.
            largest: whether independent runs are compared by the largest variance of a number, or by their mean.
        """
        assert self.moments is not None
        n = float(self.moments[0].flatten()[0])
        a, b, aa, bb = self.moments[1:] / n
        separate = ((aa - a**2) + (bb - b**2)).clamp_min(0) * n / max(n - 1, 1)
        var = found.se**2
        top, own = (v.max() if largest else v.mean() for v in (separate, var))
        needed = float(top / own) if float(own) > 0 else float("inf")
        return Comparison(found, a, b, found.nfe, found.samples, needed, needed / found.samples)

    def _draw(self, index: Tensor, noise: NoiseSource) -> Tensor:
        self._drawn = _both(self.a, self.b)(index, noise)
        return self._drawn

    def _difference(self, x: Tensor) -> Tensor:
        values: Callable[[Tensor], Tensor] = self.statistic.anywhere  # a twin's samples may lie anywhere
        if x is self._drawn:
            values = self.statistic if len(x) > 2 else self.statistic.check  # two: those that it is checked on
        a, b = (values(x[:, i]).to("cpu", torch.float64) for i in (0, 1))
        if x is self._drawn and len(x) > 2:
            sums = torch.stack([torch.full_like(a[0], len(a)), *(v.sum(0) for v in (a, b, a**2, b**2))])
            self.moments = sums if self.moments is None else self.moments + sums
        return a - b


_MOMENTS = "values/moments"


def _both(a: Callable[..., Tensor], b: Callable[..., Tensor]) -> Callable[[Tensor, NoiseSource], Tensor]:
    return lambda index, noise: torch.stack([a(index, noise), b(index, noise)], 1)
