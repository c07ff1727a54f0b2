r"""Targets: from which x_0 the thing to predict is made.

Given x_t, every prediction target is a linear function of x_0 (see `objectives`), so a target is a rule that puts
some T for the x_0 of a draw, with

    T = x_0                                        plain
    eps = (x_t - alpha T) / sigma                  the noise that goes with it, whatever T is.

x_t stays as it was made. The squared error then asks for E[T | x_t], and its expected gradient is the plain one exactly
if E[T | x_t] = E[x_0 | x_t] = D*(x_t): the gradient is linear in T,

    grad ||T - D||^2 = -2 (T - D) . grad D.

The *value* of the loss is lower by the target noise, E ||x_0 - D*||^2 - E ||T - D*||^2, that T leaves out: losses of
different targets do not compare, validation losses (always plain) do. A term for the variance head keeps the x_0 that
was drawn, whose spread around D* is what it learns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lowvar.process.head import expand
from lowvar.process.schedule import Level

if TYPE_CHECKING:
    from lowvar.train.objectives import Label

__all__ = ["GivenTarget", "PlainTarget", "Target", "implied_noise"]


def implied_noise(clean: Tensor, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """(x_t - alpha T) / sigma = eps + (alpha / sigma) (x_0 - T), without the cancellation; shape of eps."""
    ratio = expand(level.alpha / level.sigma, x0)
    return eps + ratio * (x0 - clean)


class Target(ABC):
    """A rule for the x_0 that prediction targets are made from."""

    @property
    @abstractmethod
    def label(self) -> Label:
        """What it does to the expected gradient of the plain target."""

    @abstractmethod
    def clean(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """T of draws x_0, eps (B, *event_shape) at levels (B,) with t > 0; shape and dtype of x_0, without gradient."""


@dataclass(frozen=True)
class PlainTarget(Target):
    """T = x_0.

    Example:
        >>> import torch
        >>> from lowvar.process import CosineVP
        >>> x0 = torch.ones(2, 3)
        >>> PlainTarget().clean(x0, torch.zeros(2, 3), CosineVP().at([0.2, 0.7])) is x0
        True
    """

    @property
    def label(self) -> Label:
        """See the base class."""
        return "unbiased"

    def clean(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """See the base class."""
        return x0


@dataclass(frozen=True, eq=False)
class GivenTarget(Target):
    """A T that is known already, for these draws alone.

    Args:
        value: T, the shape of the draws.
        of: the target it is of, which has the label.

    Example:
        >>> import torch
        >>> from lowvar.process import CosineVP
        >>> target = GivenTarget(torch.zeros(2, 3), PlainTarget())
        >>> target.clean(torch.ones(2, 3), torch.zeros(2, 3), CosineVP().at([0.2, 0.7])).sum().item(), target.label
        (0.0, 'unbiased')
    """

    value: Tensor
    of: Target

    @property
    def label(self) -> Label:
        """See the base class."""
        return self.of.label

    def clean(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """See the base class.

        Raises:
            ValueError: if the draws have another shape.
        """
        if x0.shape != self.value.shape:
            raise ValueError(f"draws are {tuple(x0.shape)}, the target that was given {tuple(self.value.shape)}")
        return self.value
