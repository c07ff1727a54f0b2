r"""A statistic f: samples (n, *event_shape) -> (n, *shape), checked where it is called.

f is any function of samples; numbers, vectors and images are allowed. It must be a function (the same samples give the
same values), give one row a sample, and be finite: a single NaN makes a mean meaningless, so it is refused and not
averaged. Booleans and integers count as numbers (an indicator is a statistic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["Statistic", "StatisticFunction"]

StatisticFunction = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Statistic:
    """A checked statistic.

    Attributes:
        function: samples (n, *event_shape) -> (n, *shape), a tensor or what `torch.as_tensor` takes.
        name: its name in messages and results.
        shape: of one value; `Statistic.of` finds it.

    Example:
        >>> norm = Statistic.of(lambda x: x.square().sum(1), torch.ones(3, 2), "squared norm")
        >>> norm.name, tuple(norm.shape), norm(torch.ones(3, 2)).flatten().tolist()
        ('squared norm', (), [2.0, 2.0, 2.0])
    """

    function: StatisticFunction
    name: str
    shape: torch.Size

    @classmethod
    def of(cls, function: StatisticFunction, samples: Tensor, name: str | None = None) -> Statistic:
        """The statistic of a function, its shape and its being a function found on a few samples.

        Raises:
            UserError: if values have the wrong shape, are not finite, or differ between two calls.
        """
        label = str(name or getattr(function, "__name__", None) or type(function).__name__)
        label = "statistic" if label == "<lambda>" else label
        first = _values(function, samples, label)
        found = cls(function, label, first.shape[1:])
        again = found(samples)
        if not torch.allclose(first.reshape(len(first), -1).to(again), again, rtol=1e-3, atol=1e-6):
            raise UserError(
                f"statistic {label!r} gave two different values for the same samples; it has to be a function: draw "
                "its randomness once, outside, or average it away"
            )
        return found

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Values, (n, D) float64, D = prod(shape).

        Raises:
            UserError: if values have another shape than before or are not finite.
        """
        values = _values(self.function, samples, self.name)
        if values.shape[1:] != self.shape:
            raise UserError(
                f"statistic {self.name!r} gave values of shape {tuple(values.shape[1:])} and before of shape "
                f"{tuple(self.shape)}; give one shape, whatever the samples"
            )
        return values.reshape(len(values), -1).double()


def _values(function: StatisticFunction, samples: Tensor, name: str) -> Tensor:
    values = torch.as_tensor(function(samples))
    if values.ndim == 0 or len(values) != len(samples):
        raise UserError(
            f"statistic {name!r} gave shape {tuple(values.shape)} for {len(samples)} samples; give one row a sample, "
            f"({len(samples)}, ...): the mean over samples is taken here"
        )
    if not values.dtype.is_complex and not bool(torch.isfinite(values.double()).all()):
        bad = int((~torch.isfinite(values.double()).reshape(len(values), -1).all(1)).sum())
        raise UserError(
            f"statistic {name!r} is NaN or infinite for {bad} of {len(samples)} samples; give finite values only"
        )
    if values.dtype.is_complex or values[0].numel() == 0:
        raise UserError(f"statistic {name!r} gave {values.dtype} of shape {tuple(values.shape)}; give real numbers")
    return values.detach()
