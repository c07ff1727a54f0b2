r"""Statistics by name: what `--statistic` and `--reward` take.

    brightness        mean over all pixels
    mean              the sample itself: its expectation is the mean image
    jpeg              minus the bytes of the JPEG file (`metrics.jpeg`)
    thickness         stroke thickness in pixels (`metrics.thickness`)
    class:K           probability of class K by a classifier (`metrics.classes`)
    fraction:K        1 if the classifier says K, else 0
    module:function   a function of one's own, called as f(samples (n, ...) in [-1, 1], **columns) -> (n,) or (n, ...)

A function of one's own declares what it is by attributes: `f.differentiable`, `f.smooth`, `f.indicator`, each True or
False; what it leaves out is unknown and taken for the worse.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowvar.errors import UserError
from lowvar.metrics.classes import class_statistic
from lowvar.metrics.features import DataSet
from lowvar.metrics.jpeg import jpeg
from lowvar.metrics.statistic import Statistic
from lowvar.metrics.thickness import thickness

__all__ = ["STATISTICS", "needs_data", "statistic_named"]


def _brightness(samples: Tensor, **columns: Any) -> Tensor:
    return samples.flatten(1).mean(1)


def _mean(samples: Tensor, **columns: Any) -> Tensor:
    return samples


_FIXED = {
    s.name: s
    for s in (
        Statistic("brightness", _brightness, "mean over all pixels", True, True, False),
        Statistic("mean", _mean, "the sample itself", True, True, False),
        Statistic("jpeg", jpeg, "minus the bytes of the JPEG file", False, False, False),
        Statistic("thickness", thickness, "stroke thickness in pixels", True, True, False),
    )
}
_CLASSES = ("class", "fraction")

STATISTICS: Mapping[str, str] = {
    **{name: s.about for name, s in _FIXED.items()},
    "class:K": "probability of class K by a classifier trained on the spot",
    "fraction:K": "share of samples that the classifier gives class K",
    "module:function": "a function of your own, f(samples, **columns) -> one value a sample",
}
"""What may be named, with one line each."""


def needs_data(word: str) -> bool:
    """Whether the statistic needs labelled data (class:K, fraction:K).

    Example:
        >>> needs_data("class:3"), needs_data("brightness")
        (True, False)
    """
    return word.partition(":")[0] in _CLASSES and ":" in word


def statistic_named(word: str, *, data: DataSet | None = None, seed: int = 0, cache: Path | None = None) -> Statistic:
    """The statistic of a name.

    Args:
        word: one of `STATISTICS`.
        data: labelled images, for class:K and fraction:K.
        seed: of their classifier.
        cache: folder for its weights.

    Raises:
        UserError: for an unknown name, listing the known ones; a module that cannot be imported or has no such
            function; a class without data.

    Example:
        >>> import torch
        >>> statistic_named("brightness")(torch.ones(2, 1, 4, 4)).tolist()
        [1.0, 1.0]
        >>> statistic_named("math:floor").name
        'math:floor'
    """
    if word in _FIXED:
        return _FIXED[word]
    if needs_data(word):
        if data is None:
            raise UserError(f"statistic {word!r} needs labelled images to train its classifier on; give the data")
        return class_statistic(word, data, seed=seed, cache=cache)
    module, _, function = word.partition(":")
    if not module or not function or not all(part.isidentifier() for part in (*module.split("."), function)):
        raise UserError(f"there is no statistic {word!r}; allowed: {', '.join(STATISTICS)}")
    return _own(word, module, function)


def _own(word: str, module: str, function: str) -> Statistic:
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        if missing == module or module.startswith(f"{missing}."):
            raise UserError(
                f"statistic {word!r}: there is no module {module!r}; allowed: {', '.join(STATISTICS)}, a module being "
                "one that Python finds from here"
            ) from None
        raise UserError(f"statistic {word!r}: module {module!r} imports {missing!r}, which is not installed") from None
    found: Callable[..., Any] | None = getattr(holder, function, None)
    if not callable(found):
        offered = [name for name, value in vars(holder).items() if callable(value) and not name.startswith("_")]
        has = ", ".join(offered[:8]) or "none"
        raise UserError(f"statistic {word!r}: module {module!r} has no function {function!r}; it has {has}")
    if isinstance(found, Statistic):
        return found
    flags = {name: getattr(found, name, None) for name in ("differentiable", "smooth", "indicator")}
    wrong = next((name for name, value in flags.items() if value not in (None, True, False)), None)
    if wrong is not None:
        raise UserError(f"statistic {word!r} declares {wrong} = {flags[wrong]!r}; allowed: True, False, or nothing")
    about = (found.__doc__ or "").strip().splitlines()
    return Statistic(word, found, about[0] if about else f"function {function} of {module}", **flags)
