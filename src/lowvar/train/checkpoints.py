"""Checkpoints: folders that are whole or not there.

    FOLDER/update-0000500/   network.safetensors   the weights being trained
                             ema.safetensors       their moving average
                             optimizer.safetensors moments, one tensor a parameter and name
                             times.safetensors     state of learned times (absent where there is none)
                             averages.safetensors  power averages (likewise)
                             uncertainty.safetensors  the learned weighting (likewise)
                             validation.safetensors   losses of the last validation, one an evaluation (likewise)
                             stream.safetensors    where the epochs of a stream began (likewise)
                             noise_scale.safetensors  sums of the noise scale's measurements (likewise)
                             state.json            update, settings, fingerprints, learning rate, random numbers' seed

A checkpoint is written into `update-0000500.tmp`, flushed to disk and renamed, so a process killed at any moment leaves
either all of it or a `.tmp` folder that is ignored and removed. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["Checkpoint", "check_same", "latest", "prune", "save", "truncate"]

_NAME = re.compile(r"update-(\d{7,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content.

    Attributes:
        state: JSON-ready values; `update` is the number of updates done.
        tensors: tensors by file name (without suffix) and key.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Writes a checkpoint under `folder`; it is there entirely or not at all.

    Args:
        folder: where checkpoints live.
        state: JSON-ready, with `update`.
        tensors: by file name and key; a file without tensors is left out.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: if it cannot be written (a full disk, no permission).
    """
    final = folder / f"update-{state['update']:07d}"
    partial = final.with_name(final.name + ".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, values in tensors.items():
            if values:
                save_file(_separate(values), partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        for file in partial.iterdir():
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"cannot write the checkpoint {final} ({reason}); make room or choose another folder, "
            "then go on with --resume"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _separate(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares memory with another (tied weights do)."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in values.items():
        own = value.detach().cpu().contiguous()
        found[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return found


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = [(_NAME.match(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what killed processes left half-written."""
    for _, path in _numbered(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("update-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, or None.

    Raises:
        UserError: if its files do not read.
    """
    numbered = _numbered(folder)
    if not numbered:
        return None
    path = numbered[-1][1]
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the checkpoint {path} is damaged ({reason}); remove that folder to resume from the one before"
        ) from None
    return Checkpoint(state, tensors)


def check_same(kept: Checkpoint, identity: Mapping[str, Any], defaults: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on from a checkpoint of other settings or data.

    Args:
        kept: the checkpoint, with what it was made with under `identity`.
        identity: the same of the run that would go on.
        defaults: of settings, for those that are younger than the checkpoint.
        folder: of the run.

    Raises:
        UserError: that names the first difference.
    """
    own, default = json.loads(json.dumps([identity, defaults]))
    saved = {k: v for k, v in default.items() if k in own} | kept.state["identity"]
    for k in saved.keys() & default.keys():
        if isinstance(saved[k], dict) and isinstance(default[k], dict):
            saved[k] = default[k] | saved[k]
    other = sorted(k for k in own.keys() | saved.keys() if own.get(k) != saved.get(k))
    if other:
        key = other[0]
        raise UserError(
            f"the checkpoint in {folder} was made with {key} {saved.get(key)!r}, now it is {own.get(key)!r}; "
            "resume with the same settings and data, or train into another folder"
        )


def truncate(file: Path, update: int) -> None:
    """Drops the lines of a `metrics.jsonl` that are of later updates, which will be made again."""
    if not file.exists():
        return
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["update"] <= update]
    partial = file.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(file)
