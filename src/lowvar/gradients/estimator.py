r"""What an estimator of one site of a program is.

A site draws x ~ p_theta(x). What comes after it in the program, averaged over its own noise, is a function of x whose
value is E[C | x]. An estimator turns explicit noise into one or more values of the site, the program goes on from each
of them (a *branch*), and from the branches' costs it builds a surrogate: a number S(theta) with

    E S = E C,     E grad S = grad E C.

Branches are of three kinds, the first of a site is a main one:

    main     values whose (weighted) mean of costs is an unbiased E C: what a site before this one is told
    live     values whose cost is differentiated, as that of main ones is: they come with surrogates of their own, so
             sites after this one are estimated in each of them
    probes   values of which only the cost is asked, a number without a gradient

so Score has one main branch, an enumeration K of them, DisARM one and a probe (the antithetic twin), a measure-valued
derivative 2 d probes for d elements, REBAR one main and two live ones (the relaxed samples). The interpreter knows
numbers of branches only; it has no case for any estimator.

Terms whose value is 0 and whose gradient is the estimator are written with

    zero(y) = y - stop(y),      S = S_main + stop(f - b) zero(log p_theta(x))     (the score function, for instance).

A `record` is what an estimator keeps from drawing until the costs are known: small tensors, such as log p of each
value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

__all__ = [
    "BaseNoise",
    "Between",
    "Branch",
    "Estimator",
    "GradientLabel",
    "OneBranch",
    "SiteDraw",
    "SiteRecord",
    "SiteState",
    "Stateless",
    "element_sum",
    "zero",
]

GradientLabel = Literal["unbiased", "biased"]
Branch = Literal["main", "live", "probe"]
SiteRecord = Mapping[str, Tensor]
SiteState = Mapping[str, Tensor]


def zero(y: Tensor) -> Tensor:
    """y - stop(y): the value 0 with the gradient of y.

    Example:
        >>> y = torch.tensor(3.0, requires_grad=True)
        >>> zero(y * y).backward()
        >>> zero(y).item(), y.grad.item()
        (0.0, 6.0)
    """
    return y - y.detach()


def element_sum(x: Tensor, costs: Tensor) -> Tensor:
    """A record (n, ..., *own) summed over its own axes, for costs (n, ..., branches, G).

    Example:
        >>> element_sum(torch.ones(4, 2, 3), torch.zeros(4, 1, 1)).tolist()
        [6.0, 6.0, 6.0, 6.0]
    """
    lead = costs.ndim - 2
    return x.sum(tuple(range(lead, x.ndim))) if x.ndim > lead else x


Between = Literal["constant", "linear", "smooth"]


@dataclass(frozen=True)
class BaseNoise:
    """Base noise of a site.

    Attributes:
        kind: standard normal numbers, or uniform ones in (0, 1).
        shape: of one sample.
        between: what the estimator is, as a function of it, between its `breaks`; certificates integrate it so.
    """

    kind: Literal["normal", "uniform"]
    shape: torch.Size
    between: Between = "smooth"

    def mirrored(self, noise: Tensor) -> Tensor:
        """-z or 1 - u."""
        return -noise if self.kind == "normal" else 1 - noise


@dataclass(frozen=True)
class SiteDraw:
    """Values of a site, one a branch (total, *shape), and the record for when the costs are known."""

    values: Tensor
    record: SiteRecord


class Estimator(ABC):
    """Draws a site from explicit noise, and turns its branches' costs into a surrogate.

    `draw` runs inside the program, on one sample's tensors, under `torch.func.vmap`: no branching on values there.
    The other methods get whole batches: n samples first, then any axes `...`, then a record's own axes, or a branch
    axis and an axis of G cost groups, whose terms add up.

    An estimator that `broadcasts` can also be handed a whole batch in `draw`: the distribution's parameters and the
    noise then have further axes in front, and so have values (behind the branch axis) and records. So it works element
    by element, and leaves sums over the site's elements to `surrogate` (`element_sum`).

    Attributes:
        label: "unbiased" or "biased".
        source: paper.
        orders: derivatives for which it holds: 1, or 0 for any.
        smooth: whether costs have to be differentiable in the site's value.
        apart: names of noise in which the gradient is a sum, given all other noise: of functions of one of them each.
            Certificates integrate these one by one.
        broadcasts: whether `draw` takes axes in front; where it does not, it is mapped over them (`batches`).
    """

    label: ClassVar[GradientLabel]
    source: ClassVar[str]
    orders: ClassVar[int] = 1
    smooth: ClassVar[bool] = False
    apart: ClassVar[tuple[str, ...]] = ()
    broadcasts: ClassVar[bool] = False

    @abstractmethod
    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """The base noise it needs, by name."""

    @abstractmethod
    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """Where the estimator jumps as a function of uniform noise, (*noise shape, k); names left out are smooth.

        Read by `lowvar.testing.certify` only, which integrates piece by piece.
        """

    @abstractmethod
    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """The kind of each value that the site takes."""

    @abstractmethod
    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """Values and record from noise."""

    @abstractmethod
    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """The surrogate before the site, (n, ..., G).

        Args:
            record: as drawn, (n, ..., *own).
            live: surrogates of the main and live branches, (n, ..., main + live, G).
            costs: costs of all branches, without gradient, (n, ..., total, G).
            state: the site's state before this batch.
        """

    @abstractmethod
    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """The unbiased cost before the site, (n, ..., G), from the main branches' costs (n, ..., main, G)."""

    @abstractmethod
    def start(self, d: Distribution) -> SiteState:
        """The state before any batch."""

    @abstractmethod
    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """The state after a batch, called once its surrogate is built."""

    @abstractmethod
    def auxiliary(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Tensor | None:
        """A loss of the estimator's own parameters (a learned control variate), or None."""


class OneBranch(Estimator):
    """An estimator with one value a site."""

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """One."""
        return ("main",)

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """Its cost."""
        return costs[..., 0, :]


class Stateless(Estimator):
    """An estimator that remembers and learns nothing."""

    def start(self, d: Distribution) -> SiteState:
        """Empty."""
        return {}

    def updated(self, state: SiteState, record: SiteRecord, costs: Tensor) -> SiteState:
        """Still empty."""
        return state

    def auxiliary(self, record: SiteRecord, costs: Tensor, state: SiteState) -> Tensor | None:
        """None."""
        return None
