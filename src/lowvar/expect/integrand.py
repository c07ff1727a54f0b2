r"""The integrand f of an expectation: a checked statistic whose values are flat rows of one shape.

f is any function of samples, (n, *event_shape) -> (n, *shape); numbers, vectors and images are allowed, booleans and
integers count as numbers (an indicator is a statistic). What makes a function no statistic is refused by
`lowvar.metrics.Statistic`; here its shape is found once and held to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.metrics import Statistic

__all__ = ["Integrand", "StatisticFunction"]

StatisticFunction = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Integrand:
    """A statistic with the shape of its values.

    Attributes:
        statistic: f, checked at every call.
        shape: of one value; `Integrand.of` finds it.

    Example:
        >>> norm = Integrand.of(lambda x: x.square().sum(1), torch.ones(3, 2), "squared norm")
        >>> norm.name, tuple(norm.shape), norm(torch.ones(3, 2)).flatten().tolist()
        ('squared norm', (), [2.0, 2.0, 2.0])
    """

    statistic: Statistic
    shape: torch.Size

    @property
    def name(self) -> str:
        """The statistic's, in messages and results."""
        return self.statistic.name

    @classmethod
    @torch.no_grad()
    def of(cls, function: StatisticFunction, samples: Tensor, name: str | None = None) -> Integrand:
        """The integrand of a function, checked on a few samples.

        Args:
            function: f, or a `Statistic`.
            samples: (n, *event_shape), n >= 2.
            name: of the statistic (default: the function's own).

        Raises:
            UserError: as `Statistic.check`, and if a value has no numbers.
        """
        if isinstance(function, Statistic):
            statistic = function if name is None else replace(function, name=name)
        else:
            own = getattr(function, "__name__", None) or type(function).__name__
            statistic = Statistic(name or ("statistic" if own == "<lambda>" else own), function)
        shape = statistic.check(samples).shape[1:]
        if not shape.numel():
            raise UserError(
                f"statistic {statistic.name!r} has values of shape {tuple(shape)}; give at least one number"
            )
        return cls(statistic, shape)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Values, (n, D) float64, D = prod(shape).

        Raises:
            UserError: if values have another shape than before or are not finite.
        """
        values = self.statistic(samples)
        if values.shape[1:] != self.shape:
            raise UserError(
                f"statistic {self.name!r} gave values of shape {tuple(values.shape[1:])} and before of shape "
                f"{tuple(self.shape)}; give one shape, whatever the samples"
            )
        return values.reshape(len(values), -1).double()
