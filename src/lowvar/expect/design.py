r"""A design: which streams of units are drawn, and how their means make one estimate.

    mu^ = sum_k w_k mean_k,      Var = sum_k v_k / n_k,      v_k = w_k^2 Var(unit of stream k)

covers all of them: one stream (independent, antithetic, nets), a corrected stream and the mean of its control
(`OneStream`), and sums of streams (`ManyStreams`: levels of a multilevel estimate, classes). With c_k evaluations a
unit, the cheapest way to a variance V, and the variance for a budget, are

    n_k = sqrt(v_k / c_k) sum_j sqrt(v_j c_j) / V,      cost = (sum_j sqrt(v_j c_j))^2 / V         (Giles 2008, Eq. 4).

The interval is t-distributed with the degrees of freedom of Satterthwaite, (sum u_k)^2 / sum (u_k^2 / f_k),
u_k = v_k / n_k, where f_k is what the jackknife says that v_k is worth (`lowvar.expect.sums.effective_freedom`).

A stream that costs no evaluation (the twin alone) is charged a thousandth of a sample, so that it is not drawn without
end.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowvar.expect.streams import Stream
from lowvar.expect.sums import Fit, Sums, effective_freedom, fit

__all__ = ["Combined", "Design", "ManyStreams", "OneStream", "Part", "Pooled", "allocation"]

FREE = 1e-3  # of a sample's evaluations: what a sample of the twin is charged in planning


@dataclass(frozen=True, eq=False)
class Part:
    """A stream's share of the variance.

    Attributes:
        stream: the stream.
        variance: v, w^2 times the variance of a unit, (D,).
        n: units so far.
        freedom: degrees of freedom of `variance` for normal units.
        leave_out: `variance` without fold j, (J, D).
    """

    stream: Stream
    variance: Tensor
    n: int
    freedom: float
    leave_out: Tensor

    @property
    def share(self) -> Tensor:
        """v / n, (D,)."""
        return self.variance / self.n


@dataclass(frozen=True, eq=False)
class Combined:
    """An estimate: mean (D,) and the parts of its variance."""

    mean: Tensor
    parts: tuple[Part, ...]

    @property
    def var(self) -> Tensor:
        """Variance of the mean, (D,)."""
        return torch.stack([p.share for p in self.parts]).sum(0)

    def freedom(self, focus: Tensor) -> float:
        """Satterthwaite's degrees of freedom of the variance in `focus` (D,), from the parts' effective ones."""
        u = [float((p.share * focus).sum()) for p in self.parts]
        own = [float(effective_freedom(p.leave_out @ focus, p.freedom)) for p in self.parts]
        below = sum(x**2 / f for x, f in zip(u, own, strict=True))
        return sum(u) ** 2 / below if below > 0 else min(p.freedom for p in self.parts)


class Design(ABC):
    """How streams make an estimate.

    Attributes:
        name: the design's name.
        streams: what it draws.
        unbiased: whether the estimate has the sampler's expectation at any n.
        declared: why its interval may not cover, or None; such a design is never chosen unless it is named.
    """

    name: str
    streams: tuple[Stream, ...]
    unbiased: bool = True
    declared: str | None = None

    @abstractmethod
    def combined(self, sums: Mapping[str, Sums]) -> Combined | None:
        """The estimate from the streams' sums; None as long as a stream has fewer than 2 units."""

    @abstractmethod
    def planning(self, sums: Mapping[str, Sums], variance: float, focus: Tensor) -> tuple[Combined, float] | None:
        """What is still drawn, and the variance it has to reach for the whole to reach `variance` in `focus`."""

    @abstractmethod
    def spread(self, sums: Mapping[str, Sums]) -> tuple[Tensor, Tensor]:
        """Variance of the statistic of one sample, (D,), and the same without fold j, (J, D)."""


@dataclass(frozen=True, eq=False)
class OneStream(Design):
    """The mean of a stream, corrected by some of its controls.

    Attributes:
        name, streams: the stream, and (where a control's mean is itself estimated) the stream of that control alone.
        columns: the controls used, by name; the first is the one whose mean the second stream estimates.
        declared: see `Design`.
    """

    name: str
    streams: tuple[Stream, ...]
    columns: tuple[str, ...] = ()
    declared: str | None = None

    @property
    def least(self) -> int:
        """Units below which the interval is not believed: 32, and 32 for each control but the first.

        With fewer the residual of a regression on several features has too few units for its tails: measured coverage
        was 89% at 16 units a feature.
        """
        return 32 * max(1, len(self.columns))

    def fit(self, sums: Mapping[str, Sums]) -> tuple[Fit, Fit | None] | None:
        """The corrected mean, and the control's own."""
        main = sums.get(self.streams[0].key)
        if main is None or main.units < 2:
            return None
        main = main.only([self.streams[0].columns.index(c) for c in self.columns])
        if len(self.streams) == 1:
            return fit(main), None
        alone = sums.get(self.streams[1].key)
        if alone is None or alone.units < 2:
            return None
        other = fit(alone)
        mu = torch.zeros_like(main.shift_h)
        mu[:, 0] = other.mean
        return fit(main, mu), other

    def combined(self, sums: Mapping[str, Sums]) -> Combined | None:
        """See the base class."""
        found = self.fit(sums)
        if found is None:
            return None
        main, other = found
        parts = [Part(self.streams[0], main.variance, sums[self.streams[0].key].units, main.freedom, main.leave_out)]
        if other is not None:
            b2 = main.beta[:, 0] ** 2
            n = sums[self.streams[1].key].units
            parts.append(Part(self.streams[1], b2 * other.variance, n, other.freedom, b2 * other.leave_out))
        return Combined(main.mean, tuple(parts))

    def planning(self, sums: Mapping[str, Sums], variance: float, focus: Tensor) -> tuple[Combined, float] | None:
        """See the base class."""
        found = self.combined(sums)
        return None if found is None else (found, variance)

    def spread(self, sums: Mapping[str, Sums]) -> tuple[Tensor, Tensor]:
        """See the base class."""
        main = sums[self.streams[0].key]
        main = main.of_control(0) if self.streams[0].columns == ("level value",) else main
        return main.variance, main.leaving_out()


@dataclass(frozen=True, eq=False)
class ManyStreams(Design):
    """A weighted sum of streams' means.

    Attributes:
        name, streams: one stream a term.
        weights: w, one a term.
        classes: whether the terms are classes and the weights their probabilities; else they are levels, and the last
            one's first control is the sampler's own value.
        declared: see `Design`.
    """

    name: str
    streams: tuple[Stream, ...]
    weights: tuple[float, ...]
    classes: bool = False
    declared: str | None = None

    def combined(self, sums: Mapping[str, Sums]) -> Combined | None:
        """See the base class."""
        if any(s.key not in sums or sums[s.key].units < 2 for s in self.streams):
            return None
        mean, parts = None, []
        for stream, w in zip(self.streams, self.weights, strict=True):
            found = fit(sums[stream.key].only([]))
            mean = w * found.mean if mean is None else mean + w * found.mean
            leave = w**2 * found.leave_out
            parts.append(Part(stream, w**2 * found.variance, sums[stream.key].units, found.freedom, leave))
        assert mean is not None
        return Combined(mean, tuple(parts))

    def planning(self, sums: Mapping[str, Sums], variance: float, focus: Tensor) -> tuple[Combined, float] | None:
        """See the base class."""
        found = self.combined(sums)
        return None if found is None else (found, variance)

    def spread(self, sums: Mapping[str, Sums]) -> tuple[Tensor, Tensor]:
        """See the base class."""
        every = [sums[s.key] for s in self.streams]
        if not self.classes:
            last = every[-1].of_control(0)
            return last.variance, last.leaving_out()
        means = torch.stack([s.shift + s.s.sum(0) / s.m.sum() for s in every])
        p = torch.tensor(self.weights, dtype=means.dtype, device=means.device)[:, None]
        between = (p * (means - (p * means).sum(0)) ** 2).sum(0)
        inside = torch.stack([s.variance for s in every])
        leave = torch.stack([s.leaving_out() for s in every])
        return (p * inside).sum(0) + between, (p[..., None] * leave).sum(0) + between


@dataclass(frozen=True, eq=False)
class Pooled(Design):
    """A design and what was drawn before it was chosen, weighted by precision.

    Every estimate is unbiased, so weights that do not depend on the means keep the sum unbiased; those that minimise
    its variance are 1 / Var, and a variance of a skewed statistic does depend on the mean: a pilot that saw no rare
    value would claim to be exact. All streams sample one law, so the variance sigma^2 of a sample is one number, and
    what is compared is the efficiency e = sigma^2 / (variance of a unit x its samples), both read off the same stream,
    which rise and fall together:

        1 / Var = m e / sigma^2 for m samples,      e = 1 where all of them have one value.

    An efficiency from few units is lowered by 1 + 8 / f, so that one estimated too high does not dominate.

    Attributes:
        main: the design that is drawn.
        others: designs of one stream each that were drawn before.
    """

    main: Design
    others: tuple[OneStream, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of the main design."""
        return self.main.name

    @property
    def streams(self) -> tuple[Stream, ...]:  # type: ignore[override]
        """Those of the main design."""
        return self.main.streams

    @property
    def declared(self) -> str | None:  # type: ignore[override]
        """That of the main design."""
        return self.main.declared

    def combined(self, sums: Mapping[str, Sums]) -> Combined | None:
        """See the base class."""
        fits = [(d, *f) for d in self.others if (f := d.fit(sums)) is not None]
        first = self.main.fit(sums) if isinstance(self.main, OneStream) else None
        several = None if isinstance(self.main, OneStream) else self.main.combined(sums)
        if isinstance(self.main, OneStream) and first is not None:
            fits.append((self.main, *first))
        elif several is None:
            return None
        samples = [_samples(sums[d.streams[0].key], f) / (1 + 8 / f.freedom) for d, f, _ in fits]
        means = [f.mean for _, f, _ in fits]
        if several is not None:
            single, _ = self.main.spread(sums)
            worth = single / several.var.clamp_min(1e-280) / (1 + 8 / min(p.freedom for p in several.parts))
            samples.append(torch.where(single > 0, worth, torch.full_like(worth, sum(p.n for p in several.parts))))
            means.append(several.mean)
        weight = torch.stack(samples) / torch.stack(samples).sum(0)
        mean = (weight * torch.stack(means)).sum(0)
        parts, slope, alone = [], torch.zeros_like(mean), None
        if several is not None:
            w2 = weight[-1] ** 2
            parts += [replace(p, variance=w2 * p.variance, leave_out=w2 * p.leave_out) for p in several.parts]
        for w, (design, f, other) in zip(weight, fits, strict=False):
            n = sums[design.streams[0].key].units
            parts.append(Part(design.streams[0], w**2 * f.variance, n, f.freedom, w**2 * f.leave_out))
            if other is not None:
                slope = slope + w * f.beta[:, 0]
                alone = (design.streams[1], other)
        if alone is not None:
            stream, other = alone
            b2 = slope**2
            n = sums[stream.key].units
            parts.append(Part(stream, b2 * other.variance, n, other.freedom, b2 * other.leave_out))
        return Combined(mean, tuple(parts))

    def planning(self, sums: Mapping[str, Sums], variance: float, focus: Tensor) -> tuple[Combined, float] | None:
        """See the base class."""
        found = self.main.combined(sums)
        known, single = 0.0, self.spread(sums)[0] if found is not None else None
        for design in self.others:
            if single is not None and (other := design.fit(sums)) is not None:
                var = single / _samples(sums[design.streams[0].key], other[0])
                known += 1 / max(float((var * focus).sum()), 1e-280)
        left = 1 / variance - known if variance > 0 else math.inf
        return None if found is None else (found, 1 / left if left > 0 else math.inf)

    def spread(self, sums: Mapping[str, Sums]) -> tuple[Tensor, Tensor]:
        """See the base class; over all samples drawn, each of which alone has the sampler's law."""
        if not isinstance(self.main, OneStream):
            return self.main.spread(sums)
        total: Sums | None = None
        for design in (self.main, *self.others):
            held = sums.get(design.streams[0].key)
            if held is not None:
                total = held.only([]) if total is None else total + held.only([])
        assert total is not None
        return total.variance, total.leaving_out()


def _samples(sums: Sums, found: Fit) -> Tensor:
    """m e: independent samples that a stream's estimate is worth, (D,)."""
    single, own = sums.variance, found.variance * (sums.samples / sums.units)
    efficiency = torch.where(single > 0, single / own.clamp_min(1e-280), torch.ones_like(own))
    return sums.samples * efficiency


def allocation(
    variances: Sequence[float], costs: Sequence[float], *, variance: float | None = None, budget: float | None = None
) -> list[float]:
    """Units of each stream: the cheapest that reach a variance, or the best that a budget buys.

    Args:
        variances: v_k of one unit.
        costs: c_k > 0 of one unit.
        variance: V, what is to be reached; or
        budget: what may be spent.

    Raises:
        ValueError: unless exactly one of variance and budget is given.

    Example:
        >>> n = allocation([4.0, 1.0], [1.0, 4.0], variance=0.1)
        >>> n, sum(v / k for v, k in zip([4.0, 1.0], n, strict=True))
        ([80.0, 20.0], 0.1)
    """
    if (variance is None) == (budget is None):
        raise ValueError("give either a variance to reach or a budget to spend")
    root = [math.sqrt(v / c) for v, c in zip(variances, costs, strict=True)]
    total = sum(math.sqrt(v * c) for v, c in zip(variances, costs, strict=True))
    if total == 0:
        return [0.0] * len(root)
    factor = total / variance if variance is not None else (budget or 0.0) / total
    return [r * factor for r in root]
