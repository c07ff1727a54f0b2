r"""The integrand f of an expectation: a checked statistic whose values are flat rows of one shape.

f is any function of samples, (n, *event_shape) -> (n, *shape); numbers, vectors and images are allowed, booleans and
integers count as numbers (an indicator is a statistic). What makes a function no statistic is refused by
`lowvar.metrics.Statistic`; here its shape is found once and held to. Values go to the CPU, wherever the samples are:
sums of a run are small, and a checkpoint of one machine goes on on another.

f has to be finite on the sampler's own samples. On those of a twin, which may leave the range on which f is defined
(the root of an intensity that a Gaussian makes negative), a control is g = f where that is finite and 0 elsewhere: any
g will do whose mean is taken of the same g.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.metrics import Statistic

__all__ = ["Integrand", "StatisticFunction", "named"]

StatisticFunction = Callable[[Tensor], Any]


def named(function: StatisticFunction, name: str | None = None) -> Statistic:
    """The statistic of a function, under a name (default: the function's own).

    Raises:
        UserError: for what is no function.

    Example:
        >>> named(lambda x: x).name, named(torch.sum, "total").name
        ('statistic', 'total')
    """
    if not callable(function):
        raise UserError(
            f"the statistic is {function!r}; give a function of samples (n, ...) that returns one value a sample"
        )
    if isinstance(function, Statistic):
        return function if name is None else replace(function, name=name)
    own = getattr(function, "__name__", None) or type(function).__name__
    return Statistic(name or ("statistic" if own == "<lambda>" else own), function)


@dataclass(frozen=True)
class Integrand:
    """A statistic with the shape of its values.

    Attributes:
        statistic: f, checked at every call.
        shape: of one value; `Integrand.of` finds it.
        indicator: whether f is known to be 0 or 1: it says so, or its values are booleans.

    Example:
        >>> norm = Integrand.of(lambda x: x.square().sum(1), torch.ones(3, 2), "squared norm")
        >>> norm.name, tuple(norm.shape), norm(torch.ones(3, 2)).flatten().tolist()
        ('squared norm', (), [2.0, 2.0, 2.0])
    """

    statistic: Statistic
    shape: torch.Size
    indicator: bool = False

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
            UserError: as `Statistic.check`, and if it is no function or a value has no numbers.
        """
        statistic = named(function, name)
        answers: list[Any] = []

        def noted(samples: Tensor) -> Any:
            answers.append(statistic.function(samples))
            return answers[-1]

        shape = replace(statistic, function=noted).check(samples).shape[1:]
        if not shape.numel():
            raise UserError(
                f"statistic {statistic.name!r} has values of shape {tuple(shape)}; give at least one number"
            )
        says = torch.as_tensor(answers[0]).dtype == torch.bool
        return cls(statistic, shape, bool(statistic.indicator) or says)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Values, (n, D) float64 on the CPU, D = prod(shape).

        Raises:
            UserError: if values have another shape than before or are not finite.
        """
        return self._rows(self.statistic(samples))

    @torch.no_grad()
    def control(self, twins: Tensor) -> Tensor:
        """g of a twin's samples, (n, D) float64 on the CPU: f where that is finite, else 0.

        Raises:
            UserError: if values have another shape than before.
        """
        return self._rows(self.statistic.anywhere(twins)).nan_to_num(0.0, 0.0, 0.0)

    def _rows(self, values: Tensor) -> Tensor:
        if values.shape[1:] != self.shape:
            raise UserError(
                f"statistic {self.name!r} gave values of shape {tuple(values.shape[1:])} and before of shape "
                f"{tuple(self.shape)}; give one shape, whatever the samples"
            )
        return values.reshape(len(values), -1).to("cpu", torch.float64)
