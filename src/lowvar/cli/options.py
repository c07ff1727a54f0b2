"""Flags that mean the same in every command, as frozen dataclasses that tyro reads. Nothing heavy is imported here.

A command is a frozen dataclass whose fields are its flags and whose `run(console)` does the work and returns what goes
into `summary.json`; its docstring is its help.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.cli.console import Console
    from lowvar.data import Data

__all__ = [
    "ClassFlags",
    "Command",
    "Common",
    "DataFlags",
    "MaybeFloat",
    "MaybeInt",
    "MaybePath",
    "MaybeText",
    "Sampling",
    "at_least",
    "choose_device",
    "parse_names",
    "parse_steps",
]


# What leaving such a flag out means is said in its help.
MaybeText = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
MaybeInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
MaybeFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
MaybePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command of `lowvar`."""

    json: bool = False
    """print summary.json's content on stdout, and nothing else"""
    quiet: bool = False
    """print nothing but errors"""

    @abstractmethod
    def run(self, console: Console) -> dict[str, Any]:
        """Does the work; the summary's content."""

    @property
    def name(self) -> str:
        """The command's name."""
        return type(self).__name__.lower()

    def resolved(self) -> dict[str, Any]:
        """Its flags as JSON-ready values."""
        fields = dataclasses.asdict(self)
        skipped = ("json", "quiet", "overwrite", "resume")
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items() if k not in skipped}


@dataclass(frozen=True, kw_only=True)
class Common(Command):
    """Flags of every command that computes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the network runs; auto takes a GPU if there is one"""
    overwrite: bool = False
    """replace an existing --out"""


@dataclass(frozen=True, kw_only=True)
class Sampling(Common):
    """Flags of every command that runs a network as it is."""

    seed: int = 0
    """of all random numbers; sample i has the same noise whatever the batch size"""
    batch_size: int = 256
    """samples the network sees at once"""


@dataclass(frozen=True, kw_only=True)
class ClassFlags:
    """Flags that say which class of a conditional model is sampled."""

    label: MaybeText = None
    """class to sample, by name or number, of a model trained with --conditional; default: all classes"""
    guidance: float = 1.0
    """scale of classifier-free guidance with --label; above 1 it costs a second evaluation a step"""

    def check_guidance(self) -> None:
        """Refuses a scale that is none, and one without a class.

        Raises:
            UserError: saying which.
        """
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UserError(f"--guidance is {self.guidance:g}; give a number from 0, for example 2")
        if self.guidance != 1 and self.label is None:
            raise UserError(f"--guidance is {self.guidance:g}, and there is no class to guide to; give --label")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Flags that say which data set."""

    data: str
    """`digits`, `photos`, `photos:SIZE`, a folder of images, a saved `datasets` folder, a parquet file, a table (CSV,
    TSV or parquet; its column `label` is the class), or an array (.npy, .npz or .safetensors) of latents or images"""
    size: MaybeInt = None
    """side in pixels to scale and crop the images to; photos: of a patch"""
    channels: MaybeInt = None
    """1 (grey) or 3 (colour); default: what the data has"""

    def load(self, seed: int) -> Data:
        """The data set; where files are not sorted into splits, the seed sorts them.

        Raises:
            UserError: for a data set that is not there or cannot be read.
        """
        from lowvar.data import load

        return load(self.data, size=self.size, seed=seed, channels=self.channels)


def at_least(flag: str, value: int, low: int = 1) -> int:
    """`value`, if it is at least `low`.

    Raises:
        UserError: naming the flag.

    Example:
        >>> at_least("--n", 3)
        3
    """
    if value < low:
        raise UserError(f"{flag} is {value}; give a whole number from {low}")
    return value


def parse_names(flag: str, text: str) -> list[str]:
    """A list separated by commas, without repetitions.

    Raises:
        UserError: for an empty list.

    Example:
        >>> parse_names("--against", "ddim, unipc,ddim")
        ['ddim', 'unipc']
    """
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UserError(f"{flag} is empty; give names separated by commas")
    return names


def parse_steps(text: str) -> list[int]:
    """Numbers of steps separated by commas, without repetitions.

    Raises:
        UserError: for anything that is not a whole number from 1.

    Example:
        >>> parse_steps("5,10,20")
        [5, 10, 20]
    """
    parts = parse_names("--steps", text)
    if not all(part.lstrip("+-").isdecimal() for part in parts):
        raise UserError(f"--steps is {text!r}; give whole numbers separated by commas, for example 5,10,20")
    return [at_least("--steps", int(part)) for part in parts]


def choose_device(name: str) -> torch.device:
    """The torch device of `--device`.

    Raises:
        UserError: if a GPU is asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch finds no CUDA device here; use --device auto or --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
