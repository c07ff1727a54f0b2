"""From the word or path a user gives to a `Data`.

A name (`digits`, `photos`, `photos:32`) is looked up in `NAMES`; anything else is a path: a folder of images, a data
set on disk (saved by `datasets`, or a parquet file) with an image column, a table (CSV, TSV or parquet), or an array of
latents or 8-bit images (.npy, .npz, .safetensors).
"""

from __future__ import annotations

from pathlib import Path

from lowvar.data.images import Data
from lowvar.errors import UserError

__all__ = ["NAMES", "load"]

NAMES: tuple[str, ...] = ("digits", "photos")
_TABLES = {".txt", ".json", ".jsonl"}


def load(name_or_path: str | Path, *, size: int | None = None, seed: int = 0, channels: int | None = None) -> Data:
    """Loads a data set by name or path as three disjoint splits.

    Args:
        name_or_path: `digits`; `photos` or `photos:SIZE`; the path of a folder of images, of a folder written by
            `datasets`' `save_to_disk`, of a parquet file with an image column, of a table (CSV, TSV, parquet), or of
            an array (.npy, .npz, .safetensors) of latents (float16, float32) or images (uint8).
        size: side in pixels: of a patch (photos), or to scale and crop to (files).
        seed: which photos' patches are drawn, and which files are calibration and test where no sub folders say so.
            The digits' split is fixed.
        channels: 1 (grey) or 3 (colour); None: what the data has.

    Returns:
        `Data` whose splits are disjoint and give float32 (n, C, H, W), for a table (n, d), in [-1, 1]; latents have
        variance 1 instead.

    Raises:
        UserError: one sentence, for an unknown name, an unreadable or unsuitable folder or file, or a size or number of
            channels that the data cannot have.

    Example:
        >>> data = load("photos:32", seed=1)
        >>> data.shape, data.levels, tuple(data.test.images([0, 5]).shape)
        ((3, 32, 32), 256, (2, 3, 32, 32))
    """
    text = str(name_or_path)
    name, _, option = text.partition(":")
    if name == "digits" and not option:
        from lowvar.data.digits import load_digits

        return load_digits(size=size, channels=channels)
    if name == "photos":
        from lowvar.data.photos import load_photos

        if option and not option.isdecimal():
            raise UserError(f"the option {option!r} of photos is not a size in pixels; write for example photos:32")
        if option and size is not None and int(option) != size:
            raise UserError(f"{text} and size {size} disagree; give the size once")
        return load_photos(size=int(option) if option else size, seed=seed, channels=channels)
    return _load_path(Path(text).expanduser(), text, size=size, seed=seed, channels=channels)


def _load_path(path: Path, text: str, *, size: int | None, seed: int, channels: int | None) -> Data:
    if not path.exists():
        raise UserError(
            f"there is no data set {text!r}; give one of {', '.join(NAMES)}, "
            "or the path of an existing folder of images, table or array"
        )
    if path.is_dir() and not ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        from lowvar.data.folder import load_folder

        return load_folder(path, size=size, seed=seed, channels=channels)
    if path.is_file():
        from lowvar.data.arrays import SUFFIXES, load_arrays

        if path.suffix.lower() in SUFFIXES:
            return load_arrays(path, size=size, seed=seed, channels=channels)
        from lowvar.data.table import is_table, load_table

        if is_table(path):
            return load_table(path, size=size, seed=seed, channels=channels)
    if path.is_file() and path.suffix.lower() != ".parquet":
        kind = "a table" if path.suffix.lower() in _TABLES else "a file"
        raise UserError(
            f"{text} is {kind} of a type that is not read; give a folder of images, a parquet file with an image "
            "column, a table as CSV, TSV or parquet, or an array as .npy, .npz or .safetensors"
        )
    from lowvar.data.saved import load_saved

    return load_saved(path, size=size, seed=seed, channels=channels)
