r"""A calibration on disk: numbers as lists in a scheduler's config, the rest as tensors in a file beside it.

Everything above 64k numbers, every dense basis, trained heads, tables by class and marginal deficits are tensors
(float32); curves stay float64 in the fields, other numbers have 7 significant digits. Where a field is a tensor it says
{"tensor": name}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowvar.calibrate.conditional import ConditionalTable
from lowvar.calibrate.convert import Converted
from lowvar.calibrate.deficit import TENSORS as DEFICIT_TENSORS
from lowvar.calibrate.deficit import MarginalDeficit
from lowvar.calibrate.heads import read_head, write_head
from lowvar.calibrate.table import CovarianceTable, Structure
from lowvar.errors import UserError
from lowvar.process.basis import Basis, DCTBasis, MatrixBasis, PixelBasis
from lowvar.process.mixture import MixtureTwin
from lowvar.process.path import PathMoments
from lowvar.process.twin import GaussianTwin

if TYPE_CHECKING:
    from lowvar.calibrate.calibration import Calibration

__all__ = ["JSON_LIMIT", "read", "written"]

JSON_LIMIT = 65536
_PATHS = ("logsnr", "moments", "variance", "size")


def written(calibration: Calibration) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """JSON-ready fields, and the tensors that do not belong there (float32; curves stay float64 in the fields)."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, value: Tensor) -> Any:
        if value.numel() <= JSON_LIMIT:
            return _short(value.tolist())
        tensors[name] = value.float().contiguous()
        return {"tensor": name}

    tables = {}
    for structure, table in calibration.tables.items():
        tables[structure] = {"variance": put(f"variance.{structure}", table.variance)}
        if table.se is not None:
            tables[structure]["se"] = put(f"se.{structure}", table.se)

    def keep(name: str, value: Tensor) -> Any:
        tensors[name] = value.detach().cpu().float().contiguous()
        return {"tensor": name}

    basis = calibration.twin.basis
    if isinstance(basis, MatrixBasis):
        tensors["basis"] = basis.directions.float().contiguous()
    fields = {
        "fingerprint": calibration.fingerprint,
        "event_shape": list(calibration.event_shape),
        "n": calibration.n,
        "levels": calibration.levels,
        "logsnr": calibration.logsnr.tolist(),
        "mmse": calibration.mmse.tolist(),
        "mmse_se": calibration.mmse_se.tolist(),
        "analytic": calibration.analytic.tolist(),
        "tables": tables,
        "twin": {
            "basis": basis.name,
            "mean": put("twin.mean", calibration.twin.mean),
            "spectrum": put("twin.spectrum", calibration.twin.spectrum),
        },
    }
    if calibration.mixture is not None:
        parts = {name: put(f"mixture.{name}", getattr(calibration.mixture, name)) for name in ("mean", "spectrum")}
        fields["mixture"] = {"weight": calibration.mixture.weight.tolist(), **parts}
    if calibration.paths is not None:
        fields["paths"] = {k: put(f"paths.{k}", getattr(calibration.paths, k)) for k in _PATHS}
        if calibration.paths.share is not None:
            fields["paths"]["share"] = put("paths.share", calibration.paths.share)
    if calibration.heads:
        fields["heads"] = {name: write_head(head, keep) for name, head in calibration.heads.items()}
    if calibration.conditional:
        fields["conditional"] = {
            structure: keep(f"conditional.{structure}", torch.stack([t.variance for t in table.tables]))
            for structure, table in calibration.conditional.items()
        }
        fields["guidance"] = calibration.guidance
    if calibration.converted is not None:
        fields["converted"] = calibration.converted.to_json()
    if calibration.deficits:
        deficits = {}
        for k, deficit in enumerate(calibration.deficits):
            about, parts = deficit.to_json()
            deficits[str(k)] = about | {name: keep(f"deficit.{k}.{name}", value) for name, value in parts.items()}
        fields["deficits"] = deficits
    return fields, tensors


def read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The attributes of the calibration that `written` wrote.

    Raises:
        UserError: if a part is missing or does not fit.
    """
    try:
        return _read(fields, tensors)
    except (KeyError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"the calibration is incomplete ({error}): make it again with `lowvar calibrate`") from error


def _read(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def get(value: Any) -> Tensor:
        value = tensors[value["tensor"]] if isinstance(value, Mapping) else value
        return torch.as_tensor(value, dtype=torch.float64)

    shape = tuple(fields["event_shape"])
    name = fields["twin"]["basis"]
    basis: Basis
    if name == "dct":
        basis = DCTBasis(shape)
    elif name == "pixel":
        basis = PixelBasis(shape)
    else:
        basis = MatrixBasis(tensors["basis"].double(), shape, name)
    logsnr = get(fields["logsnr"])
    tables: dict[Structure, CovarianceTable] = {}
    for structure, table in fields["tables"].items():
        se = get(table["se"]) if "se" in table else None
        own = basis if structure == "basis" else None
        tables[structure] = CovarianceTable(structure, logsnr, get(table["variance"]), shape, own, se)
    twin = GaussianTwin(get(fields["twin"]["mean"]), basis, get(fields["twin"]["spectrum"]))
    mixture = paths = None
    if "mixture" in fields:
        parts = [get(fields["mixture"][k]) for k in ("weight", "mean", "spectrum")]
        mixture = MixtureTwin(parts[0], parts[1], parts[2], basis)
    if "paths" in fields:
        share = get(fields["paths"]["share"]) if "share" in fields["paths"] else None
        paths = PathMoments(*(get(fields["paths"][k]) for k in _PATHS), share=share)
    mmse, mmse_se, analytic = (get(fields[k]) for k in ("mmse", "mmse_se", "analytic"))
    heads = {name: read_head(name, head, get, twin) for name, head in fields.get("heads", {}).items()}
    converted = Converted.from_json(fields["converted"], tables["pixel"]) if "converted" in fields else None
    conditional = {
        structure: ConditionalTable(tuple(replace(tables[structure], variance=v, se=None) for v in get(values)))
        for structure, values in fields.get("conditional", {}).items()
    }
    return {
        "fingerprint": fields["fingerprint"],
        "logsnr": logsnr,
        "mmse": mmse,
        "mmse_se": mmse_se,
        "analytic": analytic,
        "tables": tables,
        "twin": twin,
        "n": int(fields["n"]),
        "mixture": mixture,
        "paths": paths,
        "heads": heads,
        "converted": converted,
        "conditional": conditional,
        "levels": fields.get("levels"),
        "guidance": float(fields.get("guidance", 1.0)),
        "deficits": tuple(
            MarginalDeficit.from_json(d, {k: get(d[k]) for k in DEFICIT_TENSORS}, basis)
            for d in fields.get("deficits", {}).values()
        ),
    }


def _short(numbers: Any) -> Any:
    """Nested lists with 7 significant digits: float32's, which is more than any calibration knows."""
    return [_short(v) for v in numbers] if isinstance(numbers, list) else float(f"{numbers:.7g}")
