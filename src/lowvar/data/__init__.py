"""Data sets as three disjoint splits of images, or of a table's rows, in [-1, 1], or of latents of variance 1.

`load(name_or_path)` gives a `Data` with `train` (what the network learns from), `calibration` (what covariance tables
and the twin are fitted on) and `test` (what every score is computed against). A split is an `Images`: a map-style set
that hands out float32 tensors (n, C, H, W) for the numbers asked for and, where it is large, decodes only those.
"""

from __future__ import annotations

from lowvar.data.arrays import ArrayImages
from lowvar.data.columns import Columns
from lowvar.data.images import Data, Images, Subset, TensorImages
from lowvar.data.registry import NAMES, load
from lowvar.data.stream import Stream, StreamData

__all__ = [
    "NAMES",
    "ArrayImages",
    "Columns",
    "Data",
    "Images",
    "Stream",
    "StreamData",
    "Subset",
    "TensorImages",
    "load",
]
