"""What a run's data are called: images, rows of a table, or latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowvar.report.run import Run

__all__ = ["IMAGES", "LATENTS", "ROWS", "Nouns", "nouns", "nouns_of"]


@dataclass(frozen=True)
class Nouns:
    """Words for the data of a run.

    Attributes:
        one, many: what a datum is called.
        a: the same with its article.
        vectors: what it is as a list of numbers.
        features: what distances in features are computed in.
    """

    one: str
    many: str
    a: str
    vectors: str
    features: str


IMAGES = Nouns(
    "image",
    "images",
    "an image",
    "pixel vectors in [−1, 1]",
    "images' features (the formula of FID, with features of our own)",
)
ROWS = Nouns(
    "row",
    "rows",
    "a row",
    "vectors of features in [−1, 1]",
    "rows (the formula of FID, on the rows themselves)",
)
LATENTS = Nouns(
    "latent",
    "latents",
    "a latent",
    "vectors of variance 1",
    "latents' features (the formula of FID, with features of our own)",
)


def nouns_of(shape: Sequence[int] | None, scaling_factor: float | None = None) -> Nouns:
    """The words for data of a shape; with a scaling factor they are latents.

    Example:
        >>> [nouns_of(*given).many for given in (((3, 8, 8),), ((5,),), ((4, 8, 8), 0.2), (None,))]
        ['images', 'rows', 'latents', 'images']
    """
    if scaling_factor is not None:
        return LATENTS
    return ROWS if shape is not None and len(shape) == 1 else IMAGES


def nouns(run: Run) -> Nouns:
    """The words for a run's data; images where it does not say."""
    data: Any = run.summary.get("data")
    if not isinstance(data, Mapping):
        return IMAGES
    shape = data.get("shape")
    return nouns_of(shape if isinstance(shape, list) else None, data.get("scaling_factor"))
