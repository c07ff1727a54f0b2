r"""A statistic: a function of single samples whose mean over a sampler is wanted, and the checks that it is one.

    mu = E f(x_0),     f(samples (n, ...), **columns) -> (n,) or (n, ...): one number, vector or image a sample.

An expectation averages f, a reward is maximised; both read the same object. What it declares:

    differentiable   autograd gives df/dx
    smooth           f has no jumps: samples that lie close have values that lie close, so what couples samples
                     (common noise, levels, a control variate) couples values
    indicator        f is 0 or 1

each True, False, or None where nobody has said. What makes a function no statistic is refused with one sentence:
another number of values than samples, NaN, a value that changes when it is asked again (its noise would be averaged as
if it were the sampler's, and pairs would lose their meaning), or one that changes with the other samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["Statistic"]

_RELATIVE = 1e-3
"""Answers agree if they differ by less than this share of the values' spread, as the rounding of a batch does."""


@dataclass(frozen=True)
class Statistic:
    """A named function of samples, checked at every call.

    Args:
        name: as users write it; errors begin with it.
        function: called as function(samples, **columns) with samples (n, ...) in [-1, 1].
        about: one line for help and reports.
        differentiable, smooth, indicator: see the module.

    Example:
        >>> peak = Statistic("peak", lambda x: x.flatten(1).amax(1), "brightest pixel", smooth=True)
        >>> peak(torch.tensor([[0.0, 0.5], [-1.0, 0.25]])).tolist()
        [0.5, 0.25]
    """

    name: str
    function: Callable[..., Any]
    about: str = ""
    differentiable: bool | None = None
    smooth: bool | None = None
    indicator: bool | None = None

    @property
    def __name__(self) -> str:
        """Its name, as functions have one."""
        return self.name

    def __call__(self, samples: Tensor, *, index: Sequence[int] | Tensor | None = None, **columns: Any) -> Tensor:
        """The values, (n,) or (n, ...), of a floating dtype and with their graph; whole numbers as float64.

        Args:
            samples: (n, ...).
            index: numbers of the samples, to name one in an error (default 0 .. n - 1).
            columns: what else is known of each sample (its class, its prompt), as the function takes it.

        Raises:
            UserError: if the function raises, or returns something else than one finite value a sample.
        """
        values = self.anywhere(samples, **columns)
        n = len(samples)
        seen = values.detach().reshape(n, -1)
        if not bool(torch.isfinite(seen).all()):
            k = int((~torch.isfinite(seen)).any(1).nonzero()[0, 0])
            bad = float(seen[k][~torch.isfinite(seen[k])][0])
            cause = "" if bool(torch.isfinite(samples[k]).all()) else ", which is not finite itself"
            raise UserError(
                f"statistic {self.name!r} is {bad} for sample {_number(index, k)}{cause}; it must be finite for every "
                "sample"
            )
        return values

    def anywhere(self, samples: Tensor, **columns: Any) -> Tensor:
        """The values where some may be infinite or NaN: a root of a twin's samples, of which some are negative.

        Args:
            samples: (n, ...).
            columns: as in a call.

        Raises:
            UserError: if the function raises, or returns something else than one real value a sample.

        Example:
            >>> root = Statistic("root", lambda x: x[:, 0].sqrt())
            >>> root.anywhere(torch.tensor([[4.0], [-1.0]])).tolist()
            [2.0, nan]
        """
        try:
            found = self.function(samples, **columns)
        except (UserError, OSError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            said = (str(error).splitlines() or ["nothing more"])[0]
            raise UserError(
                f"statistic {self.name!r} raised {type(error).__name__}: {said}; it is called as f(samples "
                f"{tuple(samples.shape)}{''.join(f', {k}=' for k in columns)})"
            ) from error
        try:
            values = torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"statistic {self.name!r} returned a {type(found).__name__}; return a tensor with one value a sample"
            ) from None
        n = len(samples)
        if values.ndim == 0 or len(values) != n:
            raise UserError(
                f"statistic {self.name!r} returned shape {tuple(values.shape)} for {n} samples; return one value a "
                f"sample: ({n},) or ({n}, ...)"
            )
        if values.is_complex():
            raise UserError(f"statistic {self.name!r} returned complex numbers; return real ones, a column a part")
        if values.is_floating_point():
            return values
        return values.to(torch.get_default_dtype() if values.dtype == torch.bool else torch.float64)

    def check(self, samples: Tensor, *, index: Sequence[int] | Tensor | None = None, **columns: Any) -> Tensor:
        """The values of a first batch, after the function was asked again, and about half of the batch.

        Args:
            samples: (n, ...), n >= 2.
            index: numbers of the samples.
            columns: handed to the function; those with one entry a sample are cut with the samples.

        Raises:
            UserError: if the answers differ: the function is random itself, or looks at the whole batch; and as in a
                call.

        Example:
            >>> centred = Statistic("centred", lambda x: x[:, 0] - x[:, 0].mean())
            >>> try:
            ...     centred.check(torch.arange(4.0)[:, None])
            ... except UserError as error:
            ...     print(str(error)[:78])
            statistic 'centred' gives sample 0 the value -1.5 within 4 samples and -0.5 wi
        """
        values = self(samples, index=index, **columns)
        n, half = len(samples), len(samples) // 2
        found = _difference(values, self(samples, index=index, **columns))
        if found is not None:
            k, first, second = found
            raise UserError(
                f"statistic {self.name!r} is random itself: sample {_number(index, k)} has the value {first:.6g} and, "
                f"asked again, {second:.6g}; give it a fixed seed, so that its value depends on the sample alone"
            )
        if not half:
            return values
        columns = {name: _first(column, n, half) for name, column in columns.items()}
        part = self(samples[:half], index=None if index is None else index[:half], **columns)
        if part.shape[1:] != values.shape[1:]:
            raise UserError(
                f"statistic {self.name!r} returned shape {tuple(values.shape)} for {n} samples and {tuple(part.shape)} "
                f"for {half}; a value's shape must not depend on the number of samples"
            )
        found = _difference(values, part)
        if found is not None:
            k, first, second = found
            raise UserError(
                f"statistic {self.name!r} gives sample {_number(index, k)} the value {first:.6g} within {n} samples "
                f"and {second:.6g} within {half}; its value must not depend on the other samples"
            )
        return values


def _number(index: Sequence[int] | Tensor | None, k: int) -> int:
    return k if index is None else int(index[k])


def _first(column: Any, n: int, half: int) -> Any:
    """The first `half` entries of a column that has one a sample."""
    return column[:half] if isinstance(column, Tensor | list | tuple) and len(column) == n else column


def _difference(values: Tensor, again: Tensor) -> tuple[int, float, float] | None:
    """Where two answers about the same first samples differ most, (sample, first, second); None where they agree."""
    a, b = (x.detach().to("cpu", torch.float64).reshape(len(x), -1) for x in (values, again))
    if not a.numel():
        return None
    reach = _RELATIVE * float(a.std(0, correction=0).max()) + 1e-6 * float(a.abs().max())
    gap = (b - a[: len(b)]).abs()
    if float(gap.max()) <= reach:
        return None
    k, j = divmod(int(gap.argmax()), gap.shape[1])
    return k, float(a[k, j]), float(b[k, j])
