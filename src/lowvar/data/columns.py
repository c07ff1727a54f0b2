r"""Columns of a table as numbers in [-1, 1], and back.

A column of numbers goes through its own distribution function, piecewise linear between knots (v_j, p_j),

    x = 2 F(v) - 1,    F(v_j) = p_j,    v_0 < v_1 < .. < v_k,    0 = p_0 < p_1 < .. < p_k = 1,

with v_j quantiles of the training rows and the ends the smallest and largest value of *all* rows, as 8-bit images have
a range that is known beforehand. So x is close to uniform whatever the column's tails, every row of the file lies in
[-1, 1], and F is strictly increasing: decoding gives the value back to float32's precision of x. Values that repeat
(counts, zeros) share one knot at the mean of their p. Whole numbers come back rounded.

A column of text becomes one number for each of its values, 1 where the row has it and -1 elsewhere; decoding takes the
largest. A column with one value carries nothing: it is kept aside and comes back as it was.

Source of the quantile transform for tables: Kotelnikov et al., "TabDDPM", ICML 2023 (there to a normal distribution).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["CATEGORIES", "Category", "Column", "Columns", "Constant", "Number"]

KNOTS = 129
CATEGORIES = 64


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The piecewise linear function through (xs, ys) at x, constant beyond the ends; float64."""
    x = x.clamp(xs[0], xs[-1])
    k = (torch.searchsorted(xs, x.contiguous(), right=True) - 1).clamp(0, len(xs) - 2)
    share = (x - xs[k]) / (xs[k + 1] - xs[k])
    return torch.lerp(ys[k], ys[k + 1], share)


@dataclass(frozen=True)
class Number:
    """A column of numbers.

    Attributes:
        name: its header.
        knots: v_0 < .. < v_k.
        shares: p_0 = 0 < .. < p_k = 1.
        whole: whether all values are whole numbers.

    Example:
        >>> column = Number.fitted("age", torch.tensor([20.0, 30.0, 70.0]), torch.tensor([20.0, 30.0]))
        >>> x = column.encode([20.0, 30.0, 70.0])
        >>> column.decode(x)
        [20.0, 30.0, 70.0]
    """

    name: str
    knots: tuple[float, ...]
    shares: tuple[float, ...]
    whole: bool = False

    @classmethod
    def fitted(cls, name: str, values: Tensor, train: Tensor) -> Number:
        """The column of `values` (n,), at least two of them different, with quantiles of `train` (m,), m >= 1."""
        values, train = values.double(), train.double()
        p = torch.linspace(0, 1, min(max(len(train), 2), KNOTS), dtype=torch.float64)
        v = torch.quantile(train, p).clamp(values.min(), values.max())
        v, p = torch.cat([values.min()[None], v, values.max()[None]]), torch.cat([p[:1], p, p[-1:]])
        knots, which, count = torch.unique(v, return_inverse=True, return_counts=True)
        shares = torch.zeros_like(knots).index_add_(0, which, p) / count
        shares[0], shares[-1] = 0.0, 1.0
        keep = torch.ones(len(knots), dtype=torch.bool)
        keep[1:-1] = (shares[1:-1] > 0) & (shares[1:-1] < 1)
        whole = bool((values == values.round()).all())
        return cls(name, tuple(knots[keep].tolist()), tuple(shares[keep].tolist()), whole)

    @property
    def width(self) -> int:
        """Numbers a row: 1."""
        return 1

    def _table(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.knots, dtype=torch.float64), torch.tensor(self.shares, dtype=torch.float64)

    def encode(self, values: Sequence[Any]) -> Tensor:
        """2 F(v) - 1, float64 (n, 1)."""
        v, p = self._table()
        return 2 * _interpolate(torch.tensor(values, dtype=torch.float64), v, p)[:, None] - 1

    def decode(self, x: Tensor) -> list[float]:
        """Values in the column's own unit, within its range."""
        v, p = self._table()
        found = _interpolate((x[:, 0].double() + 1) / 2, p, v)
        return (found.round() if self.whole else found).tolist()

    def number(self, value: float) -> float:
        """A value as a number: itself."""
        return float(value)


@dataclass(frozen=True)
class Category:
    """A column of text, one number for each of its values.

    Example:
        >>> column = Category("colour", ("blue", "red"))
        >>> column.encode(["red"]).tolist(), column.decode(torch.tensor([[0.2, -0.4]]))
        ([[-1.0, 1.0]], ['blue'])
    """

    name: str
    values: tuple[str, ...]

    @property
    def width(self) -> int:
        """Numbers a row: how many values there are."""
        return len(self.values)

    def encode(self, values: Sequence[Any]) -> Tensor:
        """1 at the row's value and -1 elsewhere, float64 (n, width)."""
        place = {value: k for k, value in enumerate(self.values)}
        index = torch.tensor([place[str(value)] for value in values], dtype=torch.int64)
        return 2 * torch.nn.functional.one_hot(index, self.width).double() - 1

    def decode(self, x: Tensor) -> list[str]:
        """The value whose number is largest."""
        return [self.values[k] for k in x.argmax(1).tolist()]

    def number(self, value: str) -> float:
        """A value as a number: its place among the values."""
        return float(self.values.index(value))


@dataclass(frozen=True)
class Constant:
    """A column with one value, which is kept aside.

    Example:
        >>> column = Constant("unit", "cm")
        >>> column.width, column.decode(torch.zeros(2, 0))
        (0, ['cm', 'cm'])
    """

    name: str
    value: float | str

    @property
    def width(self) -> int:
        """Numbers a row: 0."""
        return 0

    def encode(self, values: Sequence[Any]) -> Tensor:
        """Nothing, float64 (n, 0)."""
        return torch.zeros(len(values), 0, dtype=torch.float64)

    def decode(self, x: Tensor) -> list[Any]:
        """The value, n times."""
        return [self.value] * len(x)

    def number(self, value: float | str) -> float:
        """A value as a number: itself, and 0 for text."""
        return 0.0 if isinstance(value, str) else float(value)


Column = Number | Category | Constant
_KINDS: dict[str, type[Column]] = {"number": Number, "category": Category, "constant": Constant}


@dataclass(frozen=True)
class Columns:
    """The columns of a table in their order.

    Attributes:
        columns: at least one of them not constant.
        classes: names of the classes, where the table has a column of labels; () otherwise.

    Example:
        >>> columns = Columns((Category("colour", ("blue", "red")), Constant("unit", "cm")))
        >>> columns.width, columns.decode(columns.encode({"colour": ["red"], "unit": ["cm"]}))
        (2, {'colour': ['red'], 'unit': ['cm']})
    """

    columns: tuple[Column, ...]
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Headers."""
        return tuple(column.name for column in self.columns)

    @property
    def width(self) -> int:
        """Numbers a row, d."""
        return sum(column.width for column in self.columns)

    def encode(self, table: Mapping[str, Sequence[Any]]) -> Tensor:
        """Rows in [-1, 1], float32 (n, d)."""
        return torch.cat([column.encode(table[column.name]) for column in self.columns], 1).float()

    def decode(self, x: Tensor) -> dict[str, list[Any]]:
        """Values in their own units by header.

        Args:
            x: (n, d); beyond [-1, 1] the end of a column's range is taken.

        Raises:
            ValueError: for another number of columns.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"the rows have shape {tuple(x.shape)}; these columns need (n, {self.width})")
        parts = x.detach().cpu().split([column.width for column in self.columns], 1)
        return {column.name: column.decode(part) for column, part in zip(self.columns, parts, strict=True)}

    def numbers(self, x: Tensor) -> Tensor:
        """Values in their own units, float64 (n, columns); text as its place among the column's values."""
        table = self.decode(x)
        rows = [[column.number(value) for value in table[column.name]] for column in self.columns]
        return torch.tensor(rows, dtype=torch.float64).T.contiguous()

    def config(self) -> dict[str, Any]:
        """JSON-ready; `restored` takes it."""
        kinds = {kind: name for name, kind in _KINDS.items()}
        rows = [{"kind": kinds[type(column)], **vars(column)} for column in self.columns]
        plain = [{k: list(v) if isinstance(v, tuple) else v for k, v in row.items()} for row in rows]
        return {"columns": plain, "classes": list(self.classes)}

    @classmethod
    def restored(cls, config: Mapping[str, Any]) -> Columns:
        """The columns that `config` described.

        Raises:
            UserError: if it describes none.
        """
        try:
            rows: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in config["columns"]
            ]
            made = tuple(_KINDS[row.pop("kind")](**row) for row in rows)
            return cls(made, tuple(config["classes"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the model's table of columns does not read ({error!r}); copy the model again") from None
