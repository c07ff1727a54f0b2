r"""Low rank plus diagonal in an orthonormal basis: C = B (diag(v) + U U^T) B^T.

An orthonormal change of coordinates leaves trace, determinant and I alone, so every answer is the inner matrix's with
one transform before and one after.
"""

from __future__ import annotations

from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.covariance import BasisDiagonal, Covariance, LowRankPlusDiagonal, Scalar

__all__ = ["BasisLowRankPlusDiagonal"]


class BasisLowRankPlusDiagonal(Covariance):
    """B (diag(v) + U U^T) B^T.

    Args:
        basis: the orthonormal transform.
        inner: diag(v) + U U^T in the basis' coordinates.

    Example:
        >>> import torch
        >>> from lowvar.process.basis import DCTBasis
        >>> inner = LowRankPlusDiagonal(torch.ones(1, 4), torch.ones(1, 1, 4))
        >>> C = BasisLowRankPlusDiagonal(DCTBasis((4,)), inner)
        >>> [round(float(v), 4) for v in (C.trace(), C.logdet().exp())]
        [8.0, 5.0]
    """

    def __init__(self, basis: Basis, inner: LowRankPlusDiagonal) -> None:
        self.basis, self.inner, self.event_shape = basis, inner, inner.event_shape

    def diagonal(self) -> Tensor:
        """See the base class; d^2 for a dense basis."""
        factors = self.inner.factors
        columns = self.basis.inverse(factors.flatten(0, 1)).reshape(factors.shape)
        return BasisDiagonal(self.basis, self.inner.variance).diagonal() + (columns**2).sum(1)

    def trace(self) -> Tensor:
        """See the base class."""
        return self.inner.trace()

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.basis.inverse(self.inner.matvec(self.basis.forward(v)))

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class: the root B R B^T, so that z keeps its meaning in the event's own coordinates."""
        return self.basis.inverse(self.inner.sqrt_matvec(self.basis.forward(z)))

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.inner.inverse_quadratic(self.basis.forward(v))

    def logdet(self) -> Tensor:
        """See the base class."""
        return self.inner.logdet()

    def affine(self, a: Scalar, b: Scalar) -> BasisLowRankPlusDiagonal:
        """See the base class."""
        return BasisLowRankPlusDiagonal(self.basis, self.inner.affine(a, b))

    def bounded(self, limit: Tensor) -> BasisLowRankPlusDiagonal:
        """See the base class: one factor for the whole matrix, by its trace."""
        return BasisLowRankPlusDiagonal(self.basis, self.inner.bounded(limit))
