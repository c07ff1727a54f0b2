r"""A user's own network: a folder that holds a model of diffusers, or a function that makes an `nn.Module`.

All that training asks of a network is one call,

    out = network(x, timestep)                         x (B, C, H, W), rows (B, d);  timestep (B,) float32, 0 to 1000
    out = network(x, timestep, class_labels=labels)    conditional: labels (B,) int64, 0 .. K - 1, and K for no class

with out a tensor, a tuple whose first entry is one, or an object with `.sample` (see `NetworkDenoiser`). It has C
channels, and more where a variance head is trained: `head_channels` says how many. What makes the network sees
torch's generator at the run's seed, so its weights are a function of the seed alone.

Of a folder the config is read, and the weights where that is asked for, as safetensors. Code and pickles in it are
left alone. DiT's own dropout of classes, which draws from torch's generator, is switched off: the classes of a sample
are a function of its number here (`conditional`). A network with classes that is trained without them has its null
class, the last, in every sample.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lowvar.errors import UserError
from lowvar.models import null_class
from lowvar.process.head import Head, head_channels, rank_of

__all__ = ["OfNullClass", "check_network", "is_storable", "own_network", "structure"]

Weights = Literal["fresh", "kept"]
CALL = "network(x, timestep), with class_labels=labels where it is conditional"
_KINDS = ("UNet2DModel", "DiTTransformer2DModel", "ResidualMLP")
_COMPONENTS = ("unet", "transformer", "network")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack")


class OfNullClass(nn.Module):
    """A network with classes as one without: every sample has the null class.

    Args:
        network: called with `class_labels`.
        null: number of the null class.
    """

    def __init__(self, network: nn.Module, null: int) -> None:
        super().__init__()
        self.network, self.null = network, null

    def forward(self, x: Tensor, timestep: Tensor) -> Any:
        """The network's output."""
        labels = torch.full((len(x),), self.null, dtype=torch.int64, device=x.device)
        return self.network(x, timestep, class_labels=labels)


def own_network(source: str | Path, weights: Weights = "fresh", seed: int = 0) -> nn.Module:
    """The network that a word stands for.

    Args:
        source: a model folder (with config.json) or a pipeline folder (with model_index.json) of diffusers, or
            `module:function`, a function without arguments that returns an `nn.Module`.
        weights: of a folder: `fresh`, random by the seed, or `kept`, the folder's own.
        seed: of fresh weights, and of what a function draws from torch's generator.

    Raises:
        UserError: for a folder that is no such model, holds pickled weights only where they are asked for, or a
            function that is not there or returns something else.

    Example:
        >>> type(own_network("torch.nn:Identity")).__name__
        'Identity'
    """
    text = str(source)
    folder = Path(text).expanduser()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if folder.is_dir():
            return _from_folder(folder, weights)
        module, colon, function = text.partition(":")
        if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise UserError(
                f"the network is {text!r}; give a folder that holds a model of diffusers ({', '.join(_KINDS)}), which "
                "has a config.json or model_index.json, or module:function"
            )
        if weights != "fresh":
            raise UserError(
                f"the network's weights are {weights!r} and the network is {text}; a function returns the network "
                "with the weights it should begin with: leave weights out"
            )
        return _called(module, function)


@contextmanager
def _from_here() -> Iterator[None]:
    """Modules of the current folder can be imported meanwhile."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _called(module: str, function: str) -> nn.Module:
    try:
        with _from_here():
            made = getattr(importlib.import_module(module), function)
            network = made()
    except Exception as error:  # the user's code
        raise UserError(
            f"the network {module}:{function} cannot be made ({type(error).__name__}: {_one_line(error)}); give a "
            "function without arguments in a module that Python finds from the current folder"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"the network {module}:{function} returned a {type(network).__name__}; it must return a torch.nn.Module"
        )
    return network


# ------------------------------------------------------------------------------------------------------------- folders


def _from_folder(folder: Path, weights: Weights) -> nn.Module:
    if (folder / "model_index.json").is_file():
        found = [name for name in _COMPONENTS if (folder / name / "config.json").is_file()]
        if not found:
            raise UserError(f"the pipeline {folder} has no {', '.join(_COMPONENTS)} folder with a config.json in it")
        folder = folder / found[0]
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has neither a config.json nor a model_index.json: give the folder that a model's or pipeline's "
            "save_pretrained wrote"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} does not describe a model ({_one_line(error)})") from None
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"  # its name before diffusers 0.30
    if name not in _KINDS:
        raise UserError(
            f"{folder} holds a {name}; allowed: {', '.join(_KINDS)}: give another one as module:function, a function "
            "of yours that returns it"
        )
    return _of_kind(folder, name, config, weights).float().train()


def _of_kind(folder: Path, name: str, config: dict[str, Any], weights: Weights) -> nn.Module:
    import diffusers

    from lowvar.models import ResidualMLP

    kind: Any = ResidualMLP if name == "ResidualMLP" else getattr(diffusers, name)
    try:
        if weights == "fresh":
            return kind.from_config(config)
        files = {file.suffix for file in folder.iterdir()}
        if ".safetensors" not in files:
            held = "as a pickle, which may run code when it is read" if files & {*_PICKLES} else "nowhere"
            raise UserError(
                f"{folder} holds its weights {held}; give a folder with safetensors, or network weights fresh"
            )
        network, about = kind.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # diffusers raises every kind for files that do not fit together
        raise UserError(f"the network in {folder} cannot be made: {_one_line(error)}") from error
    if about["missing_keys"]:
        raise UserError(
            f"the weights in {folder} lack {about['missing_keys'][0]}; give the whole folder, or network weights fresh"
        )
    return network


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} .."


def is_storable(network: nn.Module) -> bool:
    """Whether a pipeline folder can hold the network: a class that can be opened without running code of others.

    Example:
        >>> is_storable(nn.Linear(2, 2))
        False
    """
    kind = type(network)
    return kind.__name__ in _KINDS and kind.__module__.partition(".")[0] in ("diffusers", "lowvar")


def structure(network: nn.Module) -> str:
    """16 hexadecimal digits that change with any name or shape in a network's state.

    Example:
        >>> [structure(nn.Linear(2, 2)) == structure(nn.Linear(2, k)) for k in (2, 3)]
        [True, False]
    """
    state = [(name, tuple(value.shape)) for name, value in sorted(network.state_dict().items())]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- checks


def check_network(
    network: nn.Module, shape: Sequence[int], head: Head | None = None, rank: int = 0, classes: int | None = None
) -> None:
    """Refuses a network that does not fit the data, the variance head or the classes; calls a copy of it once.

    A UNet2DModel, whose weights fit images of any size, is told the data's size, which samples will have; a DiT's own
    dropout of classes is switched off.

    Args:
        network: about to be trained.
        shape: of the data, (C, H, W) or (d,).
        head: variance head.
        rank: r of head `lowrank`.
        classes: K of conditional training; None without classes.

    Raises:
        UserError: one sentence.

    Example:
        >>> from diffusers import UNet2DModel
        >>> blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        >>> network = UNet2DModel(8, 1, 1, block_out_channels=(8,), **blocks)
        >>> check_network(network, (1, 8, 8))
        >>> try:
        ...     check_network(network, (1, 8, 8), "range")
        ... except UserError as error:
        ...     print(error)
        the network UNet2DModel returns 1 channels for data of 1, and head range needs 2; give head none, or a network \
with 2 output channels
    """
    name, null = type(network).__name__, null_class(network)
    _check_size(network, name, shape)
    if classes is not None and is_storable(network) and null != classes:
        has = "none" if null is None else f"{null} and a null class"
        setting = "num_embeds_ada_norm" if name.startswith("DiT") else "num_class_embeds"
        value = classes if name.startswith("DiT") else classes + 1
        raise UserError(
            f"the data have {classes} classes and the network {name} has {has}; set {setting} to {value} in its "
            "config.json, or leave conditional out"
        )
    for module in network.modules():
        if type(module).__name__ == "LabelEmbedding":  # of DiT
            cast("Any", module).dropout_prob = 0.0
    found = _probed(network, name, shape, classes, null)
    wanted = head_channels(head, shape[0], rank)
    if found[0] != wanted and found[1:] == tuple(shape[1:]):
        fits = [h for h in ("range", "logvar", "basis") if rank_of(cast("Head", h), shape[0], found[0]) is not None]
        fits += ["none"] if found[0] == shape[0] else []
        directions = rank_of("lowrank", shape[0], found[0])
        fits += [] if not directions else [f"lowrank and rank {directions}"]
        give = f"give head {' or '.join(fits)}, or " if fits else "give "
        asked = "without a head" if head is None else f"head {head}{f' of rank {rank}' if head == 'lowrank' else ''}"
        needs = f"{asked} it must return" if head is None else f"{asked} needs"
        raise UserError(
            f"the network {name} returns {found[0]} channels for data of {shape[0]}, and {needs} {wanted}; {give}a "
            f"network with {wanted} output channels"
        )
    if found != (wanted, *shape[1:]):
        raise UserError(
            f"the network {name} returns {_by(found)} for data of {_by(shape)}; it must return "
            f"{_by((wanted, *shape[1:]))}"
        )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _check_size(network: nn.Module, name: str, shape: Sequence[int]) -> None:
    """What the config says of channels and size, before the network is called."""
    if not is_storable(network):
        return
    config: Any = cast("Any", network).config
    if (name == "ResidualMLP") != (len(shape) == 1):
        what = ("images", "rows of a table") if name != "ResidualMLP" else ("rows of a table", "images")
        raise UserError(f"the network {name} is for {what[0]}, and the data are {what[1]}; give another network")
    if config["in_channels"] != shape[0]:
        raise UserError(
            f"the network {name} takes {config['in_channels']} channels and the data have {shape[0]}; give a network "
            "whose in_channels fit, or other data"
        )
    if len(shape) == 1:
        return
    height, width = shape[1:]
    if name == "UNet2DModel":
        cast("Any", network).register_to_config(sample_size=height if height == width else (height, width))
    elif (config["sample_size"],) * 2 != (height, width):
        side = config["sample_size"]
        raise UserError(
            f"the network {name} is for {side}x{side} and the data are {width}x{height}; set sample_size to the data's "
            f"in its config.json, or scale the images to {side}x{side} (size {side})"
        )


def _probed(
    network: nn.Module, name: str, shape: Sequence[int], classes: int | None, null: int | None
) -> tuple[int, ...]:
    """The shape of one output of the network for data of this shape."""
    probe = copy.deepcopy(network).eval()
    parameter = next((p for p in probe.parameters() if p.is_floating_point()), torch.zeros(()))
    x = torch.zeros(2, *shape, device=parameter.device)
    labels: dict[str, Tensor] = {}
    if classes is not None or null is not None:
        last = classes if null is None else null
        labels = {"class_labels": torch.tensor([0, last], device=x.device)}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            out = probe(x, torch.tensor([0.0, 999.0], device=x.device), **labels)
        out = out if isinstance(out, Tensor) else (out[0] if isinstance(out, tuple) else out.sample)
        if len(out) != 2:
            raise ValueError(f"it returned shape {tuple(out.shape)} for a batch of 2")
        return tuple(out.shape[1:])
    except Exception as error:  # the user's code
        raise UserError(
            f"the network {name} fails on data of {_by(shape)} ({type(error).__name__}: {_one_line(error)}); it is "
            f"called as {CALL}"
        ) from error
