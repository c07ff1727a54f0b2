r"""What is subtracted from a cost before it meets the score: (f - b) grad log p.

A baseline b may know everything but the sample x it is used on: then E[b grad log p] = b E[grad log p] = 0. Other
samples and earlier batches are allowed, this sample's own cost is not: a mean that includes it scales the gradient by
1 - 1/n, a moving average that includes it by one minus its weight. So a baseline here never sees that cost: it predicts
a sample from *other* samples of the batch (the fitting set) and from the state before the batch.

A control variate h may know x where the gradient of its mean m(theta) = E h is known and added back:

    (f - b - beta (h - m)) grad log p + beta grad m,      beta from other samples.

Where several costs depend on a site, the baseline is that of their sum. One for each cost would be the same: all are
multiplied by one score, and what is fitted here (means, weighted means, regressions) is linear in the costs, so the sum
of the costs' baselines is the baseline of the sum. What Rao-Blackwellisation takes away are costs that do not depend on
the site, and a baseline never hears of those.

Baselines add up, each fitted to what those before it leave of the same fitting set: `LeaveOneOut() + Regression(h, m)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.estimator import SiteRecord, SiteState

__all__ = [
    "Baseline",
    "Constant",
    "LeaveOneOut",
    "MovingAverage",
    "Nothing",
    "Recordless",
    "StatelessBaseline",
    "Subtracted",
    "Sum",
]


class Subtracted(NamedTuple):
    """What a baseline subtracts, without gradient, and a term of value 0 whose gradient is added (that of its mean)."""

    value: Tensor
    known: Tensor


class Baseline(ABC):
    """What `Score` subtracts from the cost of a site.

    Attributes:
        fits: whether it needs other samples of the batch.
        knows: whether it depends on the sample it is subtracted from, and adds the gradient of its mean back.
    """

    fits: ClassVar[bool]
    knows: ClassVar[bool] = False

    @abstractmethod
    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        """What it keeps of a sample, inside the program (one sample, under vmap)."""

    @abstractmethod
    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """What to subtract from samples (m, ...), whose costs it is not told.

        Args:
            record: of the samples, (m, ..., *own).
            others: records of the fitting set, (k, ..., *own).
            costs: costs of the fitting set, (k, ...).
            state: before the batch.
        """

    @abstractmethod
    def start(self, d: Distribution) -> SiteState:
        """The state before any batch."""

    @abstractmethod
    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """The state after a batch of costs (n, ...)."""

    @abstractmethod
    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """A loss of its own parameters, or None."""

    def subtracted(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """What to subtract from each sample's cost (n, ...), fitted to the other n - 1 samples.

        Raises:
            ValueError: if it fits and n is 1.
        """
        n = len(costs)
        if not self.fits:
            nobody = {key: x[:0] for key, x in record.items()}
            b = self.predict(record, nobody, costs[:0], state)
            return Subtracted(b.value.expand_as(costs), b.known.expand_as(costs))
        if n < 2:
            raise ValueError(
                f"{type(self).__name__} is fitted to the other samples and n is 1; give n >= 2, or MovingAverage()"
            )
        i = torch.arange(n, device=costs.device)
        index = (i[None, :] + 1 + torch.arange(n - 1, device=costs.device)[:, None]) % n  # column i: all but i
        others = {key: x[index] for key, x in record.items()}
        b = self.predict({key: x[None] for key, x in record.items()}, others, costs[index], state)
        return Subtracted(b.value[0].expand_as(costs), b.known[0].expand_as(costs))

    def __add__(self, other: Baseline) -> Baseline:
        """This one, then the other on what is left."""
        return Sum((*_parts(self), *_parts(other)))


def _parts(b: Baseline) -> tuple[Baseline, ...]:
    return b.parts if isinstance(b, Sum) else (b,)


class Recordless(Baseline):
    """A baseline that keeps nothing of a sample and learns nothing."""

    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """None."""
        return None


class StatelessBaseline(Baseline):
    """A baseline that remembers nothing."""

    def start(self, d: Distribution) -> SiteState:
        """Empty."""
        return {}

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """Still empty."""
        return state


def _number(value: Tensor) -> Subtracted:
    return Subtracted(value, torch.zeros_like(value))


@dataclass(frozen=True)
class Nothing(Recordless, StatelessBaseline):
    """No baseline."""

    fits: ClassVar[bool] = False

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """0."""
        return _number(costs.new_zeros((1, *costs.shape[1:])))


@dataclass(frozen=True)
class Constant(Recordless, StatelessBaseline):
    """A number.

    Example:
        >>> Constant(2.0).subtracted({}, torch.zeros(3), {}).value
        tensor([2., 2., 2.])
    """

    fits: ClassVar[bool] = False

    value: float

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """The number."""
        return _number(costs.new_full((1, *costs.shape[1:]), self.value))


@dataclass(frozen=True)
class LeaveOneOut(Recordless, StatelessBaseline):
    """The mean cost of the other n - 1 samples (of the same datum); needs n >= 2.

    N = 2 samples of a Bernoulli, D = f(1) - f(0), gradient with respect to the logit: variance of the mean
    D^2 (p q / 2 - p^2 q^2).

    Source: W. Kool, H. van Hoof, M. Welling, "Buy 4 REINFORCE samples, get a baseline for free!", 2019.

    Example:
        >>> LeaveOneOut().subtracted({}, torch.tensor([0.0, 3.0, 6.0]), {}).value
        tensor([4.5000, 3.0000, 1.5000])
    """

    fits: ClassVar[bool] = True

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """Their mean."""
        return _number(costs.mean(0, keepdim=True))


@dataclass(frozen=True)
class MovingAverage(Recordless):
    """The exponentially weighted mean cost of earlier batches, without this one's; 0 before any.

    Args:
        decay: weight of the past, in [0, 1).

    Raises:
        ValueError: if the decay is out of range.

    Example:
        >>> from torch.distributions import Normal
        >>> rule = MovingAverage(0.5)
        >>> state = rule.updated(rule.start(Normal(0.0, 1.0)), {}, torch.tensor([4.0, 2.0]))
        >>> rule.subtracted({}, torch.zeros(2), state).value
        tensor([3., 3.])
    """

    fits: ClassVar[bool] = False

    decay: float = 0.9

    def __post_init__(self) -> None:
        """Checks the range."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay}; allowed: 0 (the last batch only) up to 1, 1 excluded")

    def start(self, d: Distribution) -> SiteState:
        """No weight."""
        return {"mean": torch.zeros((), dtype=torch.float64), "weight": torch.zeros((), dtype=torch.float64)}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """The mean so far."""
        mean = state["mean"] / state["weight"].clamp_min(1e-30)
        return _number(mean.to(costs).expand(1, *costs.shape[1:]))

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """decay old + (1 - decay) mean of the batch, and its weight likewise."""
        mean, weight = state["mean"], state["weight"]
        return {
            "mean": self.decay * mean + (1 - self.decay) * costs.detach().mean().to(mean),
            "weight": self.decay * weight + (1 - self.decay),
        }


@dataclass(frozen=True)
class Sum(Baseline):
    """Baselines one after the other, each on what those before it leave."""

    parts: tuple[Baseline, ...]

    @property
    def fits(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a part does."""
        return any(part.fits for part in self.parts)

    def record(self, d: Distribution, x: Tensor, state: SiteState) -> dict[str, Tensor]:
        """The parts', under their numbers."""
        parts = [part.record(d, x, _own(state, i)) for i, part in enumerate(self.parts)]
        return {f"{i}.{k}": v for i, own in enumerate(parts) for k, v in own.items()}

    def predict(self, record: SiteRecord, others: SiteRecord, costs: Tensor, state: SiteState) -> Subtracted:
        """The sum of the parts'."""
        value = known = costs.new_zeros((1, *costs.shape[1:]))
        left = costs
        for i, part in enumerate(self.parts):
            own, theirs, before = _own(record, i), _own(others, i), _own(state, i)
            b = part.predict(own, theirs, left, before)
            left = left - part.predict(theirs, theirs, left, before).value
            value, known = value + b.value, known + b.known
        return Subtracted(value, known)

    def start(self, d: Distribution) -> SiteState:
        """The parts', under their numbers."""
        return {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.start(d).items()}

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """Each on what those before it leave."""
        after: dict[str, Tensor] = {}
        left = costs
        for i, part in enumerate(self.parts):
            own, before = _own(record, i), _own(state, i)
            after |= {f"{i}.{k}": v for k, v in part.updated(before, own, left).items()}
            left = left - part.predict(own, own, left, before).value.detach()
        return after

    def auxiliary(self, record: SiteRecord, costs: Tensor) -> Tensor | None:
        """The parts' sum; each learns the cost itself."""
        losses = [part.auxiliary(_own(record, i), costs) for i, part in enumerate(self.parts)]
        given = [loss for loss in losses if loss is not None]
        return torch.stack(given).sum() if given else None


def _own(everything: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    mark = f"{i}."
    return {key[len(mark) :]: value for key, value in everything.items() if key.startswith(mark)}
