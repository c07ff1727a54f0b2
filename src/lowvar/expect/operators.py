r"""Linear operators A: what a measurement sees of an image.

    y = A x_0 + n,     A: events (B, *event_shape) -> measurements (B, *measured_shape),     A^T its adjoint.

    member    A x                                                A diag(v) A^T
    Whole     x itself: denoising                                diag(v)
    Masking   the entries that a mask keeps: inpainting          diag(v of those entries)
    Pooling   means of f x f blocks: super-resolution            diag(block means of v) / f^2
    Blur      sharp image * kernel, where the kernel fits        not diagonal
    Matrix    M x for any matrix                                 not diagonal in general
    Linear    any linear function, its adjoint by autograd       not diagonal in general

Where no two rows of A share a column, `row_variance` gives the diagonal of A diag(v) A^T, and a system with it is
solved by division; elsewhere it is None. `Blur` looks at the part of the image on which the whole kernel lies, so that
nothing has to be assumed beyond the border.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvar.process.noise import Independent

__all__ = ["Blur", "Linear", "LinearOperator", "Masking", "Matrix", "Pooling", "Whole"]


class LinearOperator(ABC):
    """A linear map of events to measurements, with its adjoint.

    Attributes:
        event_shape: shape of what it looks at.
        measured_shape: shape of what it gives.
    """

    event_shape: torch.Size
    measured_shape: torch.Size

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x, (B, *measured_shape), for events (B, *event_shape)."""

    @abstractmethod
    def adjoint(self, u: Tensor) -> Tensor:
        """A^T u, (B, *event_shape), for measurements (B, *measured_shape)."""

    def row_variance(self, v: Tensor) -> Tensor | None:
        """Diagonal of A diag(v) A^T, (B, *measured_shape), where that matrix is diagonal for all v; else None."""
        return None

    def matrix(self) -> Tensor:
        """Dense A, (m, d) float64; d products.

        Example:
            >>> Pooling((1, 2, 2), 2).matrix().tolist()
            [[0.25, 0.25, 0.25, 0.25]]
        """
        d = self.event_shape.numel()
        return self.forward(torch.eye(d, dtype=torch.float64).reshape(d, *self.event_shape)).reshape(d, -1).mT


class Whole(LinearOperator):
    """The event itself: y = x_0 + n.

    Args:
        event_shape: shape of an event.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        self.event_shape = self.measured_shape = torch.Size(event_shape)

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return x

    def adjoint(self, u: Tensor) -> Tensor:
        """See the base class."""
        return u

    def row_variance(self, v: Tensor) -> Tensor | None:
        """See the base class."""
        return v


class Masking(LinearOperator):
    """The entries that a mask keeps, as a vector.

    Args:
        mask: (*event_shape), True where the entry is seen.

    Raises:
        ValueError: if the mask is not boolean or keeps nothing.

    Example:
        >>> seen = torch.tensor([[True, False], [False, True]])
        >>> Masking(seen).forward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist()
        [[1.0, 4.0]]
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or not bool(mask.any()):
            raise ValueError(
                f"the mask is {mask.dtype} and keeps {int(mask.sum())} entries; give True where one is seen"
            )
        self.event_shape, self.mask = mask.shape, mask
        self._index = mask.flatten().nonzero()[:, 0]
        self.measured_shape = torch.Size((len(self._index),))

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return x.flatten(1)[:, self._index.to(x.device)]

    def adjoint(self, u: Tensor) -> Tensor:
        """See the base class."""
        out = u.new_zeros(len(u), self.event_shape.numel())
        out[:, self._index.to(u.device)] = u
        return out.reshape(-1, *self.event_shape)

    def row_variance(self, v: Tensor) -> Tensor | None:
        """See the base class."""
        return self.forward(v)


class Pooling(LinearOperator):
    """Means of blocks of factor x factor pixels.

    Args:
        event_shape: (C, h, w).
        factor: side f of a block; divides h and w.

    Raises:
        ValueError: if it does not, or events are no images.
    """

    def __init__(self, event_shape: Sequence[int], factor: int) -> None:
        shape = torch.Size(event_shape)
        if len(shape) != 3 or factor < 1 or shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"blocks of {factor} x {factor} do not tile events {tuple(shape)}; give a divisor of h and w"
            )
        self.event_shape, self.factor = shape, factor
        self.measured_shape = torch.Size((shape[0], shape[1] // factor, shape[2] // factor))

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, u: Tensor) -> Tensor:
        """See the base class."""
        f = self.factor
        return u.repeat_interleave(f, 2).repeat_interleave(f, 3) / f**2

    def row_variance(self, v: Tensor) -> Tensor | None:
        """See the base class."""
        return F.avg_pool2d(v, self.factor) / self.factor**2


class Blur(LinearOperator):
    """Convolution of every channel with one kernel, where the kernel lies within the image.

    Args:
        event_shape: (C, h, w).
        kernel: (k, l), at most the image's size; flipped as convolutions do.

    Raises:
        ValueError: if the kernel does not fit.

    Example:
        >>> A = Blur((1, 4, 4), torch.ones(3, 3) / 9)
        >>> A.measured_shape, A.forward(torch.ones(1, 1, 4, 4)).allclose(torch.ones(1, 1, 2, 2))
        (torch.Size([1, 2, 2]), True)
    """

    def __init__(self, event_shape: Sequence[int], kernel: Tensor) -> None:
        shape = torch.Size(event_shape)
        fits = len(shape) == 3 and kernel.ndim == 2 and kernel.numel() > 0
        if not fits or kernel.shape[0] > shape[1] or kernel.shape[1] > shape[2]:
            raise ValueError(
                f"a kernel {tuple(kernel.shape)} does not fit events {tuple(shape)}; give (k, l) up to (h, w)"
            )
        self.event_shape, self.kernel = shape, kernel
        self.measured_shape = torch.Size(
            (shape[0], shape[1] - kernel.shape[0] + 1, shape[2] - kernel.shape[1] + 1),
        )

    def _weight(self, like: Tensor) -> Tensor:
        return self.kernel.to(like).flip(0, 1).expand(self.event_shape[0], 1, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return F.conv2d(x, self._weight(x), groups=self.event_shape[0])

    def adjoint(self, u: Tensor) -> Tensor:
        """See the base class."""
        return F.conv_transpose2d(u, self._weight(u), groups=self.event_shape[0])


class Matrix(LinearOperator):
    """M x for a matrix M.

    Args:
        matrix: (m, d).
        event_shape: shape of an event of d numbers; default (d,).

    Raises:
        ValueError: if shapes disagree.
    """

    def __init__(self, matrix: Tensor, event_shape: Sequence[int] | None = None) -> None:
        self.event_shape = torch.Size(matrix.shape[1:] if event_shape is None else event_shape)
        if matrix.ndim != 2 or matrix.shape[1] != self.event_shape.numel():
            raise ValueError(f"a matrix {tuple(matrix.shape)} does not act on events {tuple(self.event_shape)}")
        self.measured_shape, self.entries = torch.Size(matrix.shape[:1]), matrix

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return x.flatten(1) @ self.entries.to(x).mT

    def adjoint(self, u: Tensor) -> Tensor:
        """See the base class."""
        return (u @ self.entries.to(u)).reshape(-1, *self.event_shape)


class Linear(LinearOperator):
    """Any linear function of batches, its adjoint by reverse mode.

    Args:
        function: (B, *event_shape) -> (B, m, ...), linear and sample by sample, in the dtype of what it is given.
        event_shape: shape of an event.

    Raises:
        ValueError: if the function is not linear, gives another shape or does not take float64.

    Example:
        >>> A = Linear(lambda x: x[..., 1:] - x[..., :-1], (3,))
        >>> A.adjoint(torch.tensor([[1.0, 0.0]])).tolist()
        [[-1.0, 1.0, 0.0]]
    """

    def __init__(self, function: Callable[[Tensor], Tensor], event_shape: Sequence[int]) -> None:
        self.function, self.event_shape = function, torch.Size(event_shape)
        x = Independent(0).normal(range(3), self.event_shape, dtype=torch.float64)
        try:
            found = function(torch.stack([x[0], x[1], x[0] - 2 * x[1]]))
        except RuntimeError as error:
            raise ValueError(
                f"the operator fails on float64 events (3, {', '.join(map(str, self.event_shape))}): {error}; take "
                "what it holds to their dtype, as in x @ W.to(x).mT"
            ) from None
        if found.ndim < 2 or len(found) != 3:
            raise ValueError(
                f"the operator gives shape {tuple(found.shape)} for 3 events; give (3, m), one row of measurements each"
            )
        a, b, c = found
        excess = float((c - (a - 2 * b)).abs().max())
        if not excess <= 1e-9 * (1 + float(a.abs().max())):
            raise ValueError(
                f"the operator is not linear, or looks at other events: A(u - 2 v) is off A u - 2 A v by {excess:.3g}"
            )
        self.measured_shape = a.shape

    def forward(self, x: Tensor) -> Tensor:
        """See the base class."""
        return self.function(x)

    def adjoint(self, u: Tensor) -> Tensor:
        """See the base class."""
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(len(u), *self.event_shape, dtype=u.dtype, device=u.device, requires_grad=True)
            return torch.autograd.grad(self.function(x), x, u.detach().clone())[0]
