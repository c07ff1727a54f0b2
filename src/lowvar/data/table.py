"""A table (CSV, TSV or parquet) as three splits of rows in [-1, 1].

Every column of numbers, truth values or text is a feature (see `lowvar.data.columns` for its encoding), except one
called `label`, which holds the class of a row. Row i goes by the hash of its number, as image files go by their name:
80% train, 10% calibration, 10% test. A cell without a value is refused: what to put there is the user's decision.

Rows are held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowvar.data.columns import CATEGORIES, Category, Column, Columns, Constant, Number
from lowvar.data.folder import split_of
from lowvar.data.images import Data, TensorImages
from lowvar.errors import UserError

__all__ = ["LABEL", "is_table", "load_table"]

LABEL = "label"
_SUFFIXES = (".csv", ".tsv")


def is_table(path: Path) -> bool:
    """Whether a file is a table of numbers and text: CSV, TSV, or parquet without bytes or nested columns (images)."""
    suffix = path.suffix.lower()
    if suffix != ".parquet":
        return suffix in _SUFFIXES
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException):
        return False
    return not any(pa.types.is_nested(f.type) or pa.types.is_binary(f.type) for f in schema)


def _read(path: Path) -> Any:
    """The file as an Arrow table.

    Raises:
        UserError: if it cannot be read or has a name twice.
    """
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            table = pq.read_table(path)
        else:
            table = pc.read_csv(path, parse_options=pc.ParseOptions(delimiter="\t" if suffix == ".tsv" else ","))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the table {path} ({str(error).splitlines()[0]}); write it again") from None
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise UserError(f"{path} has two columns called {twice[0]!r}; rename one")
    name = table.column_names[0]
    if suffix != ".parquet" and table.num_columns == 1 and any(mark in name for mark in ";\t|,"):
        mark = "tabs" if suffix == ".tsv" else "commas"
        raise UserError(
            f"{path} has one column, called {name!r}; columns are separated by {mark} here: write it so, or as parquet"
        )
    if table.num_rows == 0:
        raise UserError(f"{path} has no rows; give a table with a header and rows")
    return table


def _values(path: Path, name: str, column: Any) -> list[float] | list[str]:
    """A column as numbers or text.

    Raises:
        UserError: for a missing or infinite value, or another type.
    """
    import pyarrow as pa

    kind = column.type
    values: Any = column.to_pylist()
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if kind == pa.null():
        raise UserError(f"{path} has no value in any row of the column {name!r}; take the column out")
    if pa.types.is_dictionary(kind):
        number = False
    elif pa.types.is_binary(kind):
        raise UserError(f"the column {name!r} of {path} holds text that is not UTF-8; save the file as UTF-8")
    elif not (number or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"the column {name!r} of {path} holds {kind}, and columns hold numbers or text; turn it into a number or "
            "take it out"
        )
    else:
        number = number or pa.types.is_boolean(kind)
    for i, value in enumerate(cast("list[Any]", values)):
        missing = value is None or (isinstance(value, str) and not value.strip())
        size = float(cast("float", value)) if number and not missing else 0.0
        if missing or not math.isfinite(size):
            what = "an infinite value" if math.isinf(size) else "no value"
            raise UserError(
                f"the column {name!r} of {path} has {what} in row {i + 1} (the first below the header is 1); "
                "fill it in or take the row out"
            )
    return [float(value) for value in values] if number else [str(value) for value in values]


def _fitted(path: Path, name: str, values: list[float] | list[str], train: Tensor) -> Column:
    """The encoding of a column."""
    different = set(values)
    if len(different) == 1:
        return Constant(name, values[0])
    if isinstance(values[0], str):
        if len(different) > CATEGORIES:
            raise UserError(
                f"the column {name!r} of {path} has {len(different)} different texts, and at most {CATEGORIES} become "
                "categories; group them, turn them into numbers or take the column out"
            )
        return Category(name, tuple(sorted(str(value) for value in different)))
    x = torch.tensor(values, dtype=torch.float64)
    if not math.isfinite(float(x.max() - x.min())):
        raise UserError(
            f"the column {name!r} of {path} goes from {float(x.min()):g} to {float(x.max()):g}, a range that no number "
            "holds; give it another unit"
        )
    return Number.fitted(name, x, x[train])


def _classes(path: Path, values: list[float] | list[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Class numbers and names of the label column, in order of the values."""
    found = sorted(set(values))
    if not isinstance(values[0], str) and any(value != round(float(value)) for value in values):
        raise UserError(f"the column {LABEL!r} of {path} holds the class of a row: whole numbers or text; rename it")
    place = {value: k for k, value in enumerate(found)}
    names = tuple(value if isinstance(value, str) else str(round(value)) for value in found)
    return torch.tensor([place[value] for value in values]), names


def load_table(path: Path, *, size: int | None = None, seed: int = 0, channels: int | None = None) -> Data:
    r"""A table as `Data` without grey levels: float32 (n, d) in [-1, 1], `columns` to read samples with.

    Args:
        path: a CSV file with a header, a TSV file, or a parquet file.
        size, channels: None; they are of images.
        seed: which rows are calibration and test.

    Raises:
        UserError: for a file that does not read, a cell without a value, a column that is neither numbers nor text, a
            text column with more than 64 values, no column that varies, or too few rows for three splits.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "t.csv"
        ...     _ = file.write_text("height,kind\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(40)))
        ...     data = load_table(file)
        >>> data.shape, data.levels, len(data.train), len(data.calibration), len(data.test)
        ((3,), None, 33, 5, 2)
    """
    for name, given in (("size", size), ("channels", channels)):
        if given is not None:
            raise UserError(f"{name} is {given}, and {path} is a table; leave {name} out, it is of images")
    table = _read(path)
    values = {name: _values(path, name, table.column(name)) for name in table.column_names}
    where = torch.tensor([split_of(str(i), seed) for i in range(table.num_rows)])
    parts = [torch.nonzero(where == k)[:, 0] for k in range(3)]
    for numbers, name in zip(parts, ("train", "calibration", "test"), strict=True):
        if len(numbers) < 2:
            raise UserError(
                f"{path} has {table.num_rows} rows, of which {len(numbers)} fall to the {name} split; give more rows"
            )
    labels, classes = _classes(path, values.pop(LABEL)) if LABEL in values else (None, ())
    columns = Columns(tuple(_fitted(path, name, column, parts[0]) for name, column in values.items()), classes)
    if columns.width == 0:
        raise UserError(f"{path} has no column that varies; there is nothing to learn")
    x = columns.encode(values)
    digest = hashlib.sha256(json.dumps([columns.config(), seed]).encode() + x.numpy().tobytes())
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    train, calibration, test = (TensorImages(x[rows], None if labels is None else labels[rows]) for rows in parts)
    return Data(str(path), train, calibration, test, None, digest.hexdigest()[:16], columns, classes)
