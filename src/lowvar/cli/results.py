"""The files of a run folder: config.yaml, metrics.jsonl, summary.json, figures.json, grids.npz, report.html."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvar import __version__
from lowvar.cli.options import Command

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowvar.data import Data
    from lowvar.evaluation import Cell, Evaluation

__all__ = ["about_data", "environment", "plain", "summarise", "titled", "write_json", "write_run"]


def plain(value: Any) -> Any:
    """JSON-ready: tensors, arrays and tuples as lists, paths as text, numbers that are not finite as null.

    Example:
        >>> plain({"a": (1, float("nan")), "b": Path("x")})
        {'a': [1, None], 'b': 'x'}
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [plain(v) for v in value]
    return str(value)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, as far as they can change a figure."""
    from importlib.metadata import version

    import torch

    found = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **found, "platform": platform.platform(), "device": kind}


def summarise(command: Command, seed: int, begun: float, device: torch.device, **figures: Any) -> dict[str, Any]:
    """`summary.json`: what every summary holds, and the command's figures.

    Args:
        command: with its flags.
        seed: of the run.
        begun: `time.perf_counter()` at its start.
        device: where the network ran.
        figures: the command's own entries.
    """
    fields = {
        "command": command.name,
        "version": __version__,
        "seed": seed,
        "seconds": round(time.perf_counter() - begun, 3),
        "config": command.resolved(),
        **figures,
        "environment": environment(device),
    }
    return plain(fields)


def about_data(data: Data) -> dict[str, Any]:
    """What stands in a summary about a data set."""
    sizes = {name: len(getattr(data, name)) for name in ("train", "calibration", "test")}
    about = {"name": data.name, "shape": data.shape, "fingerprint": data.fingerprint, "levels": data.levels, **sizes}
    return about if data.scaling_factor is None else {**about, "scaling_factor": data.scaling_factor}


def titled(found: Evaluation, cells: Sequence[Cell]) -> dict[str, Tensor]:
    """The samples that an evaluation shows, named `sampler@steps`."""
    titles = {cell.label: cell.title for cell in cells}
    return {titles.get(label, label): x for label, x in found.shown.items()}


def write_json(path: Path, value: Any) -> None:
    """A JSON file that any reader takes: no NaN, no infinity."""
    path.write_text(json.dumps(plain(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_run(
    folder: Path,
    summary: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    records: Sequence[Mapping[str, Any]] | None = None,
    figures: Mapping[str, Any] | None = None,
    grids: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a run's files and its report.

    Args:
        folder: of the run, there already.
        summary: content of `summary.json`.
        config: content of `config.yaml` (default: the summary's config).
        records: lines of `metrics.jsonl`; None leaves the file as it is.
        figures: content of `figures.json`.
        grids: content of `grids.npz`.
    """
    import numpy as np
    import yaml

    write_json(folder / "summary.json", summary)
    text = yaml.safe_dump(plain(summary["config"] if config is None else config), sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    if records is not None:
        lines = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    elif not (folder / "metrics.jsonl").exists():
        (folder / "metrics.jsonl").touch()
    if figures:
        write_json(folder / "figures.json", figures)
    if grids:
        with (folder / "grids.npz").open("wb") as file:
            arrays: dict[str, Any] = {name: x.numpy() for name, x in grids.items()}
            np.savez_compressed(file, **arrays)
    from lowvar.report import build

    build(folder)
