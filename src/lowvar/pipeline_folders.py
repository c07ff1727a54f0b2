"""Model folders of diffusers, opened as data.

A model folder is somebody else's file: it is read, never run. `open_pipeline` refuses pickled weights, classes from
anywhere but diffusers, transformers and this package, and code that lies in the folder, each in one sentence; what it
opens has safetensors weights and JSON configs only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from lowvar.errors import UserError
from lowvar.models import ResidualMLP
from lowvar.own_pipelines import ClassConditionalPipeline, ImagePipeline, LatentPipeline, TablePipeline
from lowvar.schedulers import ReverseVarianceScheduler

__all__ = ["one_line", "open_pipeline"]

INDEX = "model_index.json"
_OWN = {ReverseVarianceScheduler.__module__: ReverseVarianceScheduler, ResidualMLP.__module__: ResidualMLP}
_OURS = (ClassConditionalPipeline, ImagePipeline, LatentPipeline, TablePipeline)
_VALUES = ("classes", "columns", "scaling_factor")  # of our pipelines, no components
_OWN_PIPELINES = {kind.__name__: kind for kind in _OURS}
_LIBRARIES = ("diffusers", "transformers", *_OWN)
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack")


def open_pipeline(folder: str | Path, *, dtype: torch.dtype | None = None) -> Any:
    """The diffusers pipeline in a folder, in evaluation mode, without running anything that lies in it.

    Args:
        folder: a pipeline folder on disk.
        dtype: of the weights; default as diffusers loads them, float32.

    Raises:
        UserError: if the folder is no pipeline folder, holds pickled weights or code, or names classes from elsewhere.

    Example:
        >>> import tempfile
        >>> try:
        ...     open_pipeline(tempfile.gettempdir())
        ... except ValueError as error:
        ...     print(str(error).split(" has ")[1].split(":")[0])
        no model_index.json
    """
    import diffusers

    path = Path(folder)
    index = _read_index(path)
    _check_classes(path, index, diffusers)
    _check_weights(path, index)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        pipeline = _OWN_PIPELINES.get(index["_class_name"], diffusers.DiffusionPipeline).from_pretrained(
            str(path), use_safetensors=True, trust_remote_code=False, local_files_only=True, **options
        )
    except UserError:
        raise
    except Exception as error:  # diffusers raises every kind for a folder that does not fit together
        raise UserError(f"the model folder {path} cannot be opened: {one_line(error)}") from error
    return cast("Any", pipeline)


def one_line(error: Exception) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} .."


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a diffusers pipeline folder, which has a {INDEX}")
    file = path / INDEX
    if not file.is_file() and (path / "network.safetensors").is_file():
        raise UserError(
            f"{path} has no {INDEX}: its network is no model of diffusers; open it in a program with "
            "lowvar.pipelines.open_weights"
        )
    if not file.is_file():
        raise UserError(f"{path} has no {INDEX}: give the folder that a pipeline's save_pretrained wrote")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} is not readable JSON ({error}): copy the model folder again") from error
    if not isinstance(index, dict):
        raise UserError(f"{file} holds no table of components: copy the model folder again")
    return index


def _components(index: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, library, class) of the components that are to be loaded."""
    own = index.get("_class_name") in _OWN_PIPELINES
    for name, value in index.items():
        if own and name in _VALUES:  # the names of two classes look like a component
            continue
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)
        if pair and not name.startswith("_"):
            yield name, value[0], value[1]


def _check_classes(path: Path, index: Mapping[str, Any], diffusers: Any) -> None:
    """Everything that is to be instantiated is a class of diffusers, transformers or ours."""
    name = index.get("_class_name")
    kind = _OWN_PIPELINES.get(name) or getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise UserError(
            f"{path / INDEX} names the pipeline {name!r}, which is none of diffusers {diffusers.__version__}: custom "
            "pipelines are code and are not run; open it in your own program and use lowvar.pipelines.denoiser_of"
        )
    for component, library, class_name in _components(index):
        # such as stable_diffusion's safety checker
        inside = library.isidentifier() and library[0] != "_" and hasattr(diffusers.pipelines, library)
        if library not in _LIBRARIES and not inside:
            raise UserError(
                f"{path / INDEX} takes its {component} from the module {library!r}; allowed: {', '.join(_LIBRARIES)}: "
                "code of others is not run; open it in your own program and use lowvar.pipelines.denoiser_of"
            )
        if library in _OWN and class_name != _OWN[library].__name__:
            raise UserError(f"{path / INDEX} names {library}.{class_name}; there is {_OWN[library].__name__} only")
        code = sorted(p.name for p in (path / component).glob("*.py")) if (path / component).is_dir() else []
        if code:
            raise UserError(f"{path / component} holds code ({code[0]}), which is not run: give a folder without it")


def _check_weights(path: Path, index: Mapping[str, Any]) -> None:
    """No component has pickled weights only."""
    for component, _, _ in _components(index):
        files = sorted((path / component).glob("*")) if (path / component).is_dir() else []
        pickles = [f.name for f in files if f.suffix in _PICKLES]
        if pickles and not any(f.suffix == ".safetensors" for f in files):
            raise UserError(
                f"{path / component} holds its weights as a pickle ({pickles[0]}), which may run code when it is read: "
                "convert it to safetensors (load it where you trust it, then save_pretrained) and give that folder"
            )
