"""Rewards by name: weighted sums of `lowvar.metrics`' statistics and of functions of one's own.

    jpeg                    one of `lowvar.metrics.STATISTICS` with a number a sample
    module:function         called as f(samples (n, ...), **columns) -> (n,), `async def` or not
    0.5*jpeg+2*brightness   a sum; weights may be negative

Samples are clipped to the data's range before they are judged, as they are when they are saved.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowvar.errors import UserError
from lowvar.metrics import STATISTICS, Statistic, needs_data, statistic_named
from lowvar.metrics.features import DataSet
from lowvar.reward.rewards import waited

__all__ = ["NamedReward", "parsed", "reward_named", "reward_needs_data"]

_TERM = re.compile(
    r"\s*([+-]?)\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*\*\s*)?([A-Za-z_][\w.]*(?::[\w.]+)?)\s*"
)


def parsed(text: str) -> list[tuple[float, str]]:
    """Weights and names of a sum.

    Raises:
        UserError: if it is no sum of names.

    Example:
        >>> parsed("0.5*jpeg - class:3+2*mine.score:f")
        [(0.5, 'jpeg'), (-1.0, 'class:3'), (2.0, 'mine.score:f')]
    """
    found, at = [], 0
    while at < len(text):
        term = _TERM.match(text, at)
        if term is None or (found and not term[1]):
            break
        found.append((float(term[2] or 1) * (-1 if term[1] == "-" else 1), term[3]))
        at = term.end()
    if not found or at < len(text):
        raise UserError(
            f"reward {text!r} is no name or sum of names; give for example jpeg, 0.5*jpeg+20*brightness or "
            "module:function"
        )
    return found


def reward_needs_data(text: str) -> bool:
    """Whether a reward trains a classifier.

    Example:
        >>> reward_needs_data("jpeg+100*class:3")
        True
    """
    return any(needs_data(name) for _, name in parsed(text))


@dataclass(frozen=True)
class NamedReward:
    """sum_i w_i f_i of clipped samples, a reward of `lowvar.reward`.

    Args:
        name: as users write it.
        weights: w.
        statistics: f.
        bound: b of the data, in [-b, b]; None: no bound.
    """

    name: str
    weights: Sequence[float]
    statistics: Sequence[Statistic]
    bound: float | None = 1.0
    columns: Sequence[frozenset[str] | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Reads which columns each function takes."""
        object.__setattr__(self, "columns", [_taken(s.function) for s in self.statistics])

    @property
    def differentiable(self) -> bool:
        """Whether all are."""
        return all(s.differentiable is True for s in self.statistics)

    def __call__(self, samples: Tensor, prompts: Any = None, **columns: Any) -> Tensor:
        """The sum, (n,); asynchronous functions are waited for together."""
        x = samples if self.bound is None else samples.clamp(-self.bound, self.bound)
        given = [
            s.function(x, **{k: v for k, v in columns.items() if taken is None or k in taken})
            for s, taken in zip(self.statistics, self.columns, strict=True)
        ]
        total = x.new_zeros(len(x))
        for w, s, found in zip(self.weights, self.statistics, waited(given), strict=True):
            values = Statistic(s.name, _constant(found))(x)  # its checks: one finite value a sample
            if values.shape != (len(x),):
                raise UserError(
                    f"statistic {s.name!r} has shape {tuple(values.shape)} for {len(x)} samples; a reward is one "
                    "number a sample"
                )
            total = total + w * values.to(total)
        return total


def _constant(found: Any) -> Callable[..., Any]:
    return lambda samples: found


def _taken(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the columns that a function takes; None: all."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


def reward_named(text: str, *, data: DataSet | None = None, seed: int = 0, bound: float | None = 1.0) -> NamedReward:
    """The reward of a name or a sum.

    Args:
        text: see the module.
        data: labelled images, for class:K.
        seed: of their classifier.
        bound: of the data; None for latents.

    Raises:
        UserError: for an unknown name, a statistic that is no number, or a class without data.

    Example:
        >>> import torch
        >>> reward = reward_named("2*brightness-jpeg")
        >>> x = torch.ones(1, 1, 8, 8)
        >>> float(reward(x)) == 2 - float(statistic_named("jpeg")(x)), reward.differentiable
        (True, False)
    """
    terms = parsed(text)
    if any(name == "mean" for _, name in terms):
        known = ", ".join(name for name in STATISTICS if name != "mean")
        raise UserError(f"reward 'mean' is the sample itself, and a reward is one number; allowed: {known}")
    found = [statistic_named(name, data=data, seed=seed) for _, name in terms]
    return NamedReward(text, [w for w, _ in terms], found, bound)
