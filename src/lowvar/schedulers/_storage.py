"""The file beside the config: tensors of a calibration that are too many for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["CALIBRATION_FILE", "load_tensors", "names_tensors", "save_tensors"]

CALIBRATION_FILE = "calibration.safetensors"


def names_tensors(fields: Mapping[str, Any]) -> bool:
    """Whether a calibration's JSON fields refer to the file."""
    twin = fields.get("twin")
    return (isinstance(twin, Mapping) and twin.get("basis") not in ("dct", "pixel")) or _refers(fields)


def _refers(value: Any) -> bool:
    return isinstance(value, Mapping) and ("tensor" in value or any(_refers(v) for v in value.values()))


def save_tensors(tensors: Mapping[str, Tensor], directory: Any) -> None:
    """Writes the file into a directory, which is made where it is missing."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), str(folder / CALIBRATION_FILE))


def load_tensors(source: Any, subfolder: str | None, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the file from a folder, or from a repository of the Hub with diffusers' options.

    Raises:
        UserError: if it is missing or unreadable.
    """
    folder = Path(str(source))
    if folder.is_dir():
        places = [folder / subfolder / CALIBRATION_FILE] if subfolder else []
        file = next((p for p in [*places, folder / CALIBRATION_FILE] if p.is_file()), None)
        if file is None:
            raise UserError(f"{folder} holds no {CALIBRATION_FILE}, which its scheduler_config.json needs: copy it too")
    else:
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        given = {k: options[k] for k in names if options.get(k) is not None}
        file = Path(hf_hub_download(str(source), CALIBRATION_FILE, subfolder=subfolder, **given))
    try:
        return load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): calibrate again with `lowvar calibrate`") from error
