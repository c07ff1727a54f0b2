"""The file beside the config: tensors of a calibration, and of a head's spectrum, that are too many for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvar.calibrate.stored import JSON_LIMIT
from lowvar.errors import UserError
from lowvar.process.basis import Basis, DCTBasis, MatrixBasis, PixelBasis
from lowvar.process.head import Spectrum

__all__ = [
    "CALIBRATION_FILE",
    "load_tensors",
    "names_tensors",
    "save_tensors",
    "spectrum_from_json",
    "spectrum_to_json",
]

CALIBRATION_FILE = "calibration.safetensors"


def names_tensors(fields: Mapping[str, Any]) -> bool:
    """Whether a calibration's JSON fields refer to the file."""
    twin = fields.get("twin")
    return (isinstance(twin, Mapping) and twin.get("basis") not in ("dct", "pixel")) or _refers(fields)


def _refers(value: Any) -> bool:
    return isinstance(value, Mapping) and ("tensor" in value or any(_refers(v) for v in value.values()))


def spectrum_to_json(spectrum: Spectrum) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A head's spectrum as JSON-ready fields, and the tensors that do not belong there, named `head.`."""
    fields: dict[str, Any] = {"basis": spectrum.basis.name, "event_shape": list(spectrum.basis.event_shape)}
    tensors: dict[str, Tensor] = {}
    if isinstance(spectrum.basis, MatrixBasis):
        tensors["head.directions"] = spectrum.basis.directions.float().contiguous()
        fields["directions"] = {"tensor": "head.directions"}
    if spectrum.variance.numel() <= JSON_LIMIT:
        fields["variance"] = spectrum.variance.tolist()
    else:
        tensors["head.variance"] = spectrum.variance.float().contiguous()
        fields["variance"] = {"tensor": "head.variance"}
    return fields, tensors


def spectrum_from_json(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Spectrum:
    """The spectrum that `spectrum_to_json` described.

    Raises:
        UserError: if a part is missing or does not fit.
    """
    try:
        shape, kind = tuple(fields["event_shape"]), fields["basis"]
        basis: Basis
        if kind == "pca":
            basis = MatrixBasis(tensors[fields["directions"]["tensor"]], shape, kind)
        elif kind in ("dct", "pixel"):
            basis = DCTBasis(shape) if kind == "dct" else PixelBasis(shape)
        else:
            raise ValueError(f"basis {kind!r}, allowed: dct, pixel, pca")
        given = fields["variance"]
        variance = tensors[given["tensor"]] if isinstance(given, Mapping) else torch.tensor(given)
        return Spectrum(basis, variance)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the spectrum of the scheduler's head does not fit ({error}): copy the folder again"
        ) from error


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
