r"""Covariance as a value: one small family of batched positive semi-definite matrices on an event space R^d.

Every member answers the same questions, and the family is closed under C -> a I + b C (`affine`), which is all a
reverse kernel N(mean, lambda^2 I + kappa^2 C) needs: its noise is `affine(lambda^2, kappa^2).sqrt_matvec(z)`, its
density uses `logdet` and `inverse_quadratic`.

    member                 C                               cost of a product / root / logdet
    Isotropic              v I                             d
    Diagonal               diag(v)                         d
    BasisDiagonal          B diag(v) B^T                   one transform and back (logdet: d)
    LowRankPlusDiagonal    diag(v) + U U^T, rank r         d r + r^3
    Dense                  any                             d^2 product, d^3 once for root and logdet
    Implicit               known by products only          one product / k products (Lanczos) / d products

Conventions: events have shape (B, *event_shape); variances may have batch size 1, meaning the same for all samples.
Everything is computed in float32 or wider. **Variances below zero cannot come out**: constructors set negative entries
(noise of an estimate, rounding) to 0, as the nearest positive semi-definite matrix in the member's own basis.

Sources: the determinant lemma and the Woodbury identity for low rank. `Dense` and `Implicit` are in `matrix`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lowvar.process.basis import Basis

__all__ = ["BasisDiagonal", "Covariance", "Diagonal", "Isotropic", "LowRankPlusDiagonal"]

Scalar = Tensor | float


def wide(x: Tensor) -> Tensor:
    """Float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_sample(value: Scalar, like: Tensor) -> Tensor:
    """A number, or one number a sample (B,), shaped to multiply `like` (B, ...)."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device)  # made where it is used, not copied there
    value = value.to(like)
    return value.reshape(-1, *([1] * (like.ndim - 1))) if value.ndim else value


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


class Covariance(ABC):
    """A batch of positive semi-definite matrices acting on events (B, *event_shape)."""

    event_shape: torch.Size

    @property
    def d(self) -> int:
        """Number of numbers in an event."""
        return self.event_shape.numel()

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Variances of the event's entries, (B or 1, *event_shape)."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Sum of the variances, (B or 1,)."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """C v for events v (B, *event_shape)."""

    @abstractmethod
    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """R z with R R^T = C, so that standard normal z (B, *event_shape) gives N(0, C)."""

    @abstractmethod
    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """v^T C^-1 v, (B,); +inf where C is singular along v."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log det C, (B or 1,); -inf where C is singular."""

    @abstractmethod
    def affine(self, a: Scalar, b: Scalar) -> Covariance:
        """a I + b C for a, b >= 0 (numbers, or one a sample)."""

    @abstractmethod
    def bounded(self, limit: Tensor) -> Covariance:
        """C reduced so that entry i's variance agrees with an upper bound limit_i >= 0, (B or 1, *event_shape).

        `Diagonal` takes the minimum entry by entry; the others scale the matrix by min(1, sum limit / trace).
        """

    def dense(self) -> Tensor:
        """The matrices (B or 1, d, d), by d products."""
        diagonal = self.diagonal()
        eye = torch.eye(self.d, dtype=diagonal.dtype, device=diagonal.device)
        columns = [self.matvec(e.reshape(1, *self.event_shape).expand_as(diagonal)).flatten(1) for e in eye]
        return torch.stack(columns, -1)

    def inverse_trace(self, other: Covariance) -> Tensor:
        """tr(C^-1 other), (B or 1,), as a KL divergence needs it. General form: d^3."""
        return torch.diagonal(torch.linalg.solve(self.dense(), other.dense()), dim1=-2, dim2=-1).sum(-1)

    def _scale_to(self, limit: Tensor) -> Tensor:
        return (limit.flatten(1).sum(1) / self.trace().clamp_min(1e-30)).clamp(max=1.0)


class Isotropic(Covariance):
    """v I.

    Args:
        variance: v >= 0, a number or (B or 1,).
        event_shape: shape of an event.

    Example:
        >>> C = Isotropic(0.5, (3,))
        >>> C.affine(1.0, 2.0).trace().tolist()
        [6.0]
    """

    def __init__(self, variance: Scalar, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)
        self.variance = wide(torch.as_tensor(variance)).reshape(-1).clamp_min(0)

    def diagonal(self) -> Tensor:
        """See the base class."""
        return self.variance.reshape(-1, *([1] * len(self.event_shape))).expand(-1, *self.event_shape)

    def trace(self) -> Tensor:
        """See the base class."""
        return self.variance * self.d

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return per_sample(self.variance, v) * v

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class."""
        return per_sample(self.variance.sqrt(), z) * z

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class."""
        return dot(v, v) / self.variance.to(v)

    def logdet(self) -> Tensor:
        """See the base class."""
        return self.d * torch.log(self.variance)

    def affine(self, a: Scalar, b: Scalar) -> Isotropic:
        """See the base class."""
        return Isotropic(per_sample(a, self.variance) + per_sample(b, self.variance) * self.variance, self.event_shape)

    def bounded(self, limit: Tensor) -> Isotropic:
        """See the base class."""
        return Isotropic(torch.minimum(self.variance, limit.flatten(1).mean(1).to(self.variance)), self.event_shape)

    def inverse_trace(self, other: Covariance) -> Tensor:
        """See the base class; d."""
        return other.trace() / self.variance


class Diagonal(Covariance):
    """diag(v), one variance an entry of the event.

    Args:
        variance: (B or 1, *event_shape), >= 0.
    """

    def __init__(self, variance: Tensor) -> None:
        self.event_shape = variance.shape[1:]
        self.variance = wide(variance).clamp_min(0)

    def diagonal(self) -> Tensor:
        """See the base class."""
        return self.variance

    def trace(self) -> Tensor:
        """See the base class."""
        return self.variance.flatten(1).sum(1)

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.variance * v

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class."""
        return self.variance.sqrt() * z

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class."""
        return (v**2 / self.variance).flatten(1).sum(1)

    def logdet(self) -> Tensor:
        """See the base class."""
        return torch.log(self.variance).flatten(1).sum(1)

    def affine(self, a: Scalar, b: Scalar) -> Diagonal:
        """See the base class."""
        return Diagonal(per_sample(a, self.variance) + per_sample(b, self.variance) * self.variance)

    def bounded(self, limit: Tensor) -> Diagonal:
        """See the base class."""
        return Diagonal(torch.minimum(self.variance, limit.to(self.variance)))

    def inverse_trace(self, other: Covariance) -> Tensor:
        """See the base class; d."""
        return (other.diagonal() / self.variance).flatten(1).sum(1)


class BasisDiagonal(Covariance):
    """B diag(v) B^T for an orthonormal basis B.

    Args:
        basis: the orthonormal transform.
        variance: variances along the basis directions, (B or 1, *event_shape), >= 0.

    Example:
        >>> from lowvar.process.basis import DCTBasis
        >>> C = BasisDiagonal(DCTBasis((1, 4, 4)), torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
        >>> bool(torch.allclose(C.diagonal().sum(), C.trace()))
        True
    """

    def __init__(self, basis: Basis, variance: Tensor) -> None:
        self.event_shape = variance.shape[1:]
        self.basis = basis
        self.variance = wide(variance).clamp_min(0)

    def diagonal(self) -> Tensor:
        """See the base class; d^2 for a dense basis."""
        return self.basis.squared_mix(self.variance)

    def trace(self) -> Tensor:
        """See the base class."""
        return self.variance.flatten(1).sum(1)

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self.basis.inverse(self.variance * self.basis.forward(v))

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class: the symmetric root."""
        return self.basis.inverse(self.variance.sqrt() * self.basis.forward(z))

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class."""
        return (self.basis.forward(v) ** 2 / self.variance).flatten(1).sum(1)

    def logdet(self) -> Tensor:
        """See the base class."""
        return torch.log(self.variance).flatten(1).sum(1)

    def affine(self, a: Scalar, b: Scalar) -> BasisDiagonal:
        """See the base class."""
        variance = per_sample(a, self.variance) + per_sample(b, self.variance) * self.variance
        return BasisDiagonal(self.basis, variance)

    def bounded(self, limit: Tensor) -> BasisDiagonal:
        """See the base class."""
        return BasisDiagonal(self.basis, per_sample(self._scale_to(limit), self.variance) * self.variance)

    def inverse_trace(self, other: Covariance) -> Tensor:
        """See the base class; d within one basis or against a multiple of I, d^3 otherwise."""
        if isinstance(other, BasisDiagonal) and self.basis.same_as(other.basis):
            return (other.variance / self.variance).flatten(1).sum(1)
        if isinstance(other, Isotropic):
            return other.variance * (1 / self.variance).flatten(1).sum(1)
        return super().inverse_trace(other)


class LowRankPlusDiagonal(Covariance):
    """diag(v) + U U^T.

    Args:
        variance: v, (B or 1, *event_shape), >= 0.
        factors: U, (B or 1, r, *event_shape): r directions, already scaled by their standard deviations.
    """

    def __init__(self, variance: Tensor, factors: Tensor) -> None:
        self.event_shape = variance.shape[1:]
        self.variance = wide(variance).clamp_min(0)
        self.factors = wide(factors)

    def _capacity(self) -> tuple[Tensor, Tensor]:
        """W = diag(v)^-1/2 U (B, d, r) and I + W^T W (B, r, r)."""
        W = (self.factors / self.variance.sqrt()[:, None]).flatten(2).transpose(1, 2)
        return W, torch.eye(W.shape[-1], dtype=W.dtype, device=W.device) + W.transpose(1, 2) @ W

    def diagonal(self) -> Tensor:
        """See the base class."""
        return self.variance + (self.factors**2).sum(1)

    def trace(self) -> Tensor:
        """See the base class."""
        return self.diagonal().flatten(1).sum(1)

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        U = self.factors.flatten(2)
        inner = torch.einsum("brd,bd->br", U.expand(v.shape[0], -1, -1), v.flatten(1))
        return self.variance * v + torch.einsum("brd,br->bd", U.expand(v.shape[0], -1, -1), inner).reshape(v.shape)

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class: D^1/2 (I + W W^T)^1/2 z with W = D^-1/2 U, whose root has rank r; needs v > 0."""
        W, _ = self._capacity()
        Q, s, _ = torch.linalg.svd(W, full_matrices=False)  # (B, d, r), (B, r)
        flat = z.flatten(1)
        gain = torch.sqrt(1 + s**2) - 1
        Q = Q.expand(z.shape[0], -1, -1)
        inner = gain * torch.einsum("bdr,bd->br", Q, flat)
        return self.variance.sqrt() * (flat + torch.einsum("bdr,br->bd", Q, inner)).reshape(z.shape)

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class: Woodbury."""
        W, M = self._capacity()
        w = (v / self.variance.sqrt()).flatten(1)
        g = torch.einsum("bdr,bd->br", W.expand(v.shape[0], -1, -1), w)
        solved = torch.linalg.solve(M.expand(v.shape[0], -1, -1), g[..., None])[..., 0]
        return (w**2).sum(1) - (g * solved).sum(1)

    def logdet(self) -> Tensor:
        """See the base class: the determinant lemma."""
        _, M = self._capacity()
        return torch.log(self.variance).flatten(1).sum(1) + torch.linalg.slogdet(M)[1]

    def inverse_trace(self, other: Covariance) -> Tensor:
        """See the base class; d r^2 + r^3 against a diagonal, by the Woodbury identity."""
        if not isinstance(other, Isotropic | Diagonal):
            return super().inverse_trace(other)
        ratio = (other.diagonal() / self.variance).flatten(1)
        W, M = self._capacity()
        inner = W.transpose(1, 2) @ (ratio[:, :, None] * W)
        return ratio.sum(1) - torch.diagonal(torch.linalg.solve(M, inner), dim1=-2, dim2=-1).sum(-1)

    def affine(self, a: Scalar, b: Scalar) -> LowRankPlusDiagonal:
        """See the base class."""
        variance = per_sample(a, self.variance) + per_sample(b, self.variance) * self.variance
        return LowRankPlusDiagonal(variance, per_sample(b, self.factors) ** 0.5 * self.factors)

    def bounded(self, limit: Tensor) -> LowRankPlusDiagonal:
        """See the base class."""
        scale = self._scale_to(limit)
        variance = per_sample(scale, self.variance) * self.variance
        return LowRankPlusDiagonal(variance, per_sample(scale, self.factors) ** 0.5 * self.factors)
