r"""Orthonormal bases of an event space R^d, d = prod(event shape).

A covariance that is diagonal in a basis B costs one transform: C = B diag(c) B^T. Coefficients keep the event's shape,
so that a table of variances looks the same in every basis.

- `PixelBasis`: the identity.
- `DCTBasis`: the orthonormal 2-D type-II discrete cosine transform x an orthonormal rotation of the colours (mean and
  differences); separable, O(d (H + W + C)) a transform; good for natural images of any size.
- `MatrixBasis`: any orthonormal matrix, such as the principal components of data; O(d^2).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Basis", "DCTBasis", "MatrixBasis", "PixelBasis"]


class Basis(ABC):
    """An orthonormal transform of events (B, *event_shape) to coefficients of the same shape, and back."""

    event_shape: torch.Size
    name: str

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Coefficients B^T x, (B, *event_shape)."""

    @abstractmethod
    def inverse(self, c: Tensor) -> Tensor:
        """The event B c, (B, *event_shape)."""

    def accumulate(self, out: Tensor, c: Tensor, spare: Tensor | None = None) -> Tensor:
        """out + B c written over `out`; c and `spare` may be overwritten too. All of one shape, dtype and device."""
        return out.add_(self.inverse(c))

    def matrix(self) -> Tensor:
        """Dense B (d, d), float64: column k is direction k. O(d^2) memory."""
        d = self.event_shape.numel()
        eye = torch.eye(d, dtype=torch.float64).reshape(d, *self.event_shape)
        return self.inverse(eye).reshape(d, d).T

    def squared_mix(self, v: Tensor) -> Tensor:
        """sum_k B_ik^2 v_k: the diagonal of B diag(v) B^T, shape of v."""
        d = self.event_shape.numel()
        return (v.reshape(-1, d) @ (self.matrix() ** 2).T.to(v)).reshape(v.shape)

    def same_as(self, other: Basis) -> bool:
        """Whether both are the same transform."""
        return self is other


class PixelBasis(Basis):
    """The identity.

    Example:
        >>> x = torch.ones(1, 2)
        >>> bool((PixelBasis((2,)).forward(x) == x).all())
        True
    """

    name = "pixel"

    def __init__(self, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return x

    def inverse(self, c: Tensor) -> Tensor:
        """See the base class."""
        return c

    def squared_mix(self, v: Tensor) -> Tensor:
        """See the base class."""
        return v

    def same_as(self, other: Basis) -> bool:
        """See the base class."""
        return isinstance(other, PixelBasis)


@lru_cache(maxsize=64)
def _dct(n: int) -> Tensor:
    """Orthonormal DCT-II matrix (n, n), float64: row k is cosine k."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    D = torch.cos(math.pi / n * (i + 0.5) * k) * math.sqrt(2 / n)
    D[0] = math.sqrt(1 / n)
    return D


class DCTBasis(Basis):
    """Separable DCT-II over every axis of the event; over the colour axis it is the rotation to mean and differences.

    Args:
        event_shape: (C, H, W) or (n,), any number of axes.

    Example:
        >>> basis = DCTBasis((3, 8, 8))
        >>> x = torch.linspace(-1, 1, 192, dtype=torch.float64).reshape(1, 3, 8, 8)
        >>> torch.allclose(basis.inverse(basis.forward(x)), x)
        True
    """

    name = "dct"

    def __init__(self, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)
        self._cache: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def _factors(self, like: Tensor) -> list[Tensor]:
        key = (like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = [_dct(n).to(like) for n in self.event_shape]
        return self._cache[key]

    def _apply(self, x: Tensor, transpose: bool) -> Tensor:
        shape = x.shape
        for axis, D in enumerate(self._factors(x), start=1):
            n = D.shape[0]
            if n == 1:
                continue
            F = D.T if transpose else D  # acts on columns from the left, its transpose on rows from the right
            if axis == x.ndim - 1:
                x = (x.reshape(-1, n) @ F.T).reshape(shape)
            else:
                columns = x.reshape(-1, n, shape[axis + 1 :].numel())
                x = torch.bmm(F.expand(columns.shape[0], n, n), columns).reshape(shape)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return self._apply(x, transpose=False)

    def inverse(self, c: Tensor) -> Tensor:
        """See the base class."""
        return self._apply(c, transpose=True)

    def accumulate(self, out: Tensor, c: Tensor, spare: Tensor | None = None) -> Tensor:
        """See the base class: the last axis is transformed onto `out`, the others between c and `spare`."""
        plain = out.is_contiguous() and c.is_contiguous() and out.shape == c.shape
        axes = [(axis, D) for axis, D in enumerate(self._factors(c), start=1) if D.shape[0] > 1]
        if not plain or not axes or (torch.is_grad_enabled() and (out.requires_grad or c.requires_grad)):
            return out.add_(self.inverse(c))
        if len(axes) == 1:
            spare = c
        elif spare is None or spare.shape != c.shape or not spare.is_contiguous():
            spare = torch.empty_like(c)
        for i, (axis, D) in enumerate(axes):
            last, n = i == len(axes) - 1, D.shape[0]
            target = out if last else spare
            if axis == c.ndim - 1:
                target.view(-1, n).addmm_(c.view(-1, n), D, beta=float(last))
            else:
                shape = (-1, n, c.shape[axis + 1 :].numel())
                columns = c.view(shape)
                target.view(shape).baddbmm_(D.T.expand(len(columns), n, n), columns, beta=float(last))
            c, spare = spare, c
        return out

    def squared_mix(self, v: Tensor) -> Tensor:
        """See the base class; separable."""
        for axis, D in enumerate(self._factors(v), start=1):
            if D.shape[0] > 1:
                v = torch.movedim(torch.movedim(v, axis, -1) @ D**2, -1, axis)
        return v

    def same_as(self, other: Basis) -> bool:
        """See the base class."""
        return isinstance(other, DCTBasis) and other.event_shape == self.event_shape


class MatrixBasis(Basis):
    """A dense orthonormal basis.

    Args:
        directions: (d, d), column k is direction k.
        event_shape: shape of an event, d numbers.
        name: "pca" for principal components.

    Raises:
        ValueError: if the matrix is not square of size d or not orthonormal to 1e-4.
    """

    def __init__(self, directions: Tensor, event_shape: Sequence[int], name: str = "pca") -> None:
        self.event_shape = torch.Size(event_shape)
        self.name = name
        d = self.event_shape.numel()
        if directions.shape != (d, d):
            raise ValueError(
                f"directions have shape {tuple(directions.shape)}, an event of {d} numbers needs ({d}, {d})"
            )
        error = float((directions.T.double() @ directions.double() - torch.eye(d, dtype=torch.float64)).abs().max())
        if not error < 1e-4:
            raise ValueError(f"directions are not orthonormal: max |B^T B - I| = {error:.2g}, allowed 1e-4")
        self.directions = directions
        self._cache: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def _matrix(self, like: Tensor) -> Tensor:
        key = (like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = self.directions.to(like)
        return self._cache[key]

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return (x.reshape(x.shape[0], -1) @ self._matrix(x)).reshape(x.shape)

    def inverse(self, c: Tensor) -> Tensor:
        """See the base class."""
        return (c.reshape(c.shape[0], -1) @ self._matrix(c).T).reshape(c.shape)

    def matrix(self) -> Tensor:
        """See the base class."""
        return self.directions.double()

    def same_as(self, other: Basis) -> bool:
        """See the base class."""
        return self is other or (
            isinstance(other, MatrixBasis)
            and other.directions.shape == self.directions.shape
            and torch.equal(self.directions.double().cpu(), other.directions.double().cpu())
        )
