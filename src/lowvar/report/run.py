"""What a run folder holds, read and checked once; every later module works on these values.

    summary.json    the figures a script reads: command, version, seed, seconds, config, and more by command
    metrics.jsonl   one record a line, in the order of measurement
    figures.json    curves that only the report shows (optional):
                    mmse {logsnr, mmse, se, twin, analytic}, standardised {name: {logsnr, value, se}},
                    weighting {chosen, logsnr, relative {name: weights over the plain loss's}},
                    budget {name: {logsnr, bits, se, total, total_se, prior, decoder}}, about {sampler: one line},
                    paired [{steps, metric, sampler, against, value, low, high}], value = sampler - against
    estimate.npz    value, low, high, se of an estimated vector or image (optional)
    grids.npz       "data" and "<sampler>@<steps>[@<grid>]", float (n, C, H, W) in [-1, 1] (optional)

Only `summary.json` has to be there. A file that is there has to be right: a report of half a file would mislead.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvar.errors import UserError

__all__ = ["Curve", "Run", "curve", "mapping", "number", "read"]

_REMEDY = "run the command again or take the file from a backup"


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Attributes:
        folder: where it was read from; for messages only, never part of the page.
        summary: `summary.json`.
        records: `metrics.jsonl`, empty without one.
        figures: `figures.json`, empty without one.
        grids: `grids.npz`, empty without one.
        estimate: `estimate.npz`, empty without one.
    """

    folder: Path
    summary: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...] = ()
    figures: Mapping[str, Any] | None = None
    grids: Mapping[str, NDArray[np.floating]] | None = None
    estimate: Mapping[str, NDArray[np.floating]] | None = None

    @property
    def command(self) -> str:
        """The command that wrote the folder."""
        return str(self.summary["command"])

    def figure(self, name: str) -> Any:
        """An entry of `figures.json`, or None."""
        return (self.figures or {}).get(name)

    def wrong(self, file: str, what: str) -> UserError:
        """The error for content of `file` that cannot be shown."""
        return UserError(f"{self.folder / file} is broken: {what}; {_REMEDY}")


@dataclass(frozen=True)
class Curve:
    """Values at x with standard errors (NaN where unknown), three equally long arrays in increasing x."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    se: NDArray[np.float64]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); {_REMEDY}") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} is not valid JSON ({place}); {_REMEDY}") from None
    except RecursionError:
        raise UserError(f"{where} is not valid JSON (nested too deeply); {_REMEDY}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a {type(value).__name__} where an object belongs; {_REMEDY}")
    return value


def _arrays(path: Path) -> dict[str, NDArray[np.floating]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name], dtype=np.float32) for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{path} is not an .npz file of plain number arrays; {_REMEDY}") from None


def read(folder: Path) -> Run:
    """The files of a run folder.

    Raises:
        UserError: if it is no run folder, or one of its files is broken; the sentence names the file.
    """
    summary_file = folder / "summary.json"
    if not summary_file.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has no summary.json; "
            "give a folder that a lowvar command wrote with --out"
        )
    summary = _object(_text(summary_file), str(summary_file))
    if not isinstance(summary.get("command"), str):
        raise UserError(f"{summary_file} is broken: it does not name its command; {_REMEDY}")
    log, figures, grids = (folder / name for name in ("metrics.jsonl", "figures.json", "grids.npz"))
    estimate = folder / "estimate.npz"
    lines = _text(log).splitlines() if log.is_file() else []
    return Run(
        folder,
        summary,
        tuple(_object(line, f"{log} (line {i})") for i, line in enumerate(lines, 1) if line.strip()),
        _object(_text(figures), str(figures)) if figures.is_file() else {},
        _arrays(grids) if grids.is_file() else {},
        _arrays(estimate) if estimate.is_file() else {},
    )


def number(value: Any) -> float | None:
    """A JSON number as float, null as NaN, anything else as None.

    Example:
        >>> number(3), number("3"), number(None)
        (3.0, None, nan)
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _numbers(values: Any) -> list[float] | None:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    found = [number(value) for value in values]
    return None if any(value is None for value in found) else [value for value in found if value is not None]


def curve(run: Run, file: str, where: str, x: Any, y: Any, se: Any = None) -> Curve:
    """Three JSON lists as a `Curve`.

    Args:
        run: for the message.
        file: that the lists are from.
        where: what they are, for the message.
        x: positions.
        y: values.
        se: standard errors, or None where there are none.

    Raises:
        UserError: if they are not equally long lists of numbers.
    """
    xs, ys = _numbers(x), _numbers(y)
    errors = [math.nan] * len(ys or ()) if se is None else _numbers(se)
    if xs is None or ys is None or errors is None or not len(xs) == len(ys) == len(errors):
        raise run.wrong(file, f"{where} is not made of equally long lists of numbers")
    rows = np.array(sorted(zip(xs, ys, errors, strict=True), key=lambda row: row[0]), dtype=np.float64).reshape(-1, 3)
    rows = rows[np.isfinite(rows[:, 0])]
    return Curve(*np.where(np.isfinite(rows), rows, math.nan).T)


def mapping(run: Run, file: str, where: str, value: Any) -> Mapping[str, Any]:
    """`value` if it is an object; {} for None.

    Raises:
        UserError: if it is anything else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise run.wrong(file, f"{where} is not an object")
    return value
