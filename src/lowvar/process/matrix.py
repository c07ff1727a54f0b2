r"""Covariances without structure: a dense matrix, and a matrix known only through its products.

`Dense` decomposes once, C = V diag(w) V^T, and answers everything from that (d^3 once, d^2 an answer). `Implicit` has
products alone; its root and inverse are f(C) z by k Lanczos steps with full reorthogonalisation,

    f(C) z ~= |z| Q_k f(T_k) e_1,

which is exact once k reaches the number of distinct eigenvalues and converges geometrically before.

Source: N. Higham, "Functions of Matrices", SIAM 2008, ch. 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance, Scalar, dot, per_sample, wide

__all__ = ["Dense", "Implicit"]


class Dense(Covariance):
    """Any symmetric matrix; negative eigenvalues are set to 0.

    Args:
        matrix: (B or 1, d, d); its symmetric part is taken.
        event_shape: shape of an event of d numbers.
    """

    def __init__(self, matrix: Tensor, event_shape: Sequence[int]) -> None:
        self.event_shape = torch.Size(event_shape)
        matrix = wide(matrix)
        if matrix.ndim != 3 or matrix.shape[-2:] != (self.d, self.d):
            raise ValueError(
                f"matrix has shape {tuple(matrix.shape)}; events of {self.d} numbers need (B, {self.d}, {self.d})"
            )
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        self._values, self._vectors = values.clamp_min(0), vectors

    @classmethod
    def _of(cls, values: Tensor, vectors: Tensor, event_shape: torch.Size) -> Dense:
        new = cls.__new__(cls)
        new.event_shape, new._values, new._vectors = event_shape, values.clamp_min(0), vectors
        return new

    def _function(self, values: Tensor, v: Tensor) -> Tensor:
        inner = torch.einsum("bij,bi->bj", self._vectors.expand(v.shape[0], -1, -1), v.flatten(1))
        return torch.einsum("bij,bj->bi", self._vectors.expand(v.shape[0], -1, -1), values * inner).reshape(v.shape)

    def dense(self) -> Tensor:
        """See the base class."""
        return (self._vectors * self._values[:, None]) @ self._vectors.mT

    def diagonal(self) -> Tensor:
        """See the base class."""
        return (self._vectors**2 @ self._values[..., None])[..., 0].reshape(-1, *self.event_shape)

    def trace(self) -> Tensor:
        """See the base class."""
        return self._values.sum(-1)

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return self._function(self._values, v)

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class: the symmetric root."""
        return self._function(self._values.sqrt(), z)

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class."""
        inner = torch.einsum("bij,bi->bj", self._vectors.expand(v.shape[0], -1, -1), v.flatten(1))
        return (inner**2 / self._values).sum(-1)

    def logdet(self) -> Tensor:
        """See the base class."""
        return torch.log(self._values).sum(-1)

    def affine(self, a: Scalar, b: Scalar) -> Dense:
        """See the base class; no new decomposition."""
        values = per_sample(a, self._values) + per_sample(b, self._values) * self._values
        return Dense._of(values, self._vectors, self.event_shape)

    def bounded(self, limit: Tensor) -> Dense:
        """See the base class."""
        return Dense._of(
            per_sample(self._scale_to(limit), self._values) * self._values, self._vectors, self.event_shape
        )

    def inverse_trace(self, other: Covariance) -> Tensor:
        """See the base class; d^2 where `other` is given by its products."""
        rotated = self._vectors.mT @ other.dense().to(self._vectors) @ self._vectors
        return (torch.diagonal(rotated, dim1=-2, dim2=-1) / self._values).sum(-1)


class Implicit(Covariance):
    """A covariance known by its products only, such as (sigma^2 / alpha) d x0_hat / d x by Jacobian-vector products.

    Args:
        product: v (B, *event_shape) -> C v; C must be symmetric (the caller symmetrises a learned Jacobian).
        event_shape: shape of an event.
        steps: k, Lanczos steps of `sqrt_matvec` (exact for k >= the number of distinct eigenvalues).
        shift, scale: the matrix is shift I + scale C (used by `affine`).

        like: a tensor (B, ...) that tells batch size, dtype and device of events.

    Costs: `matvec` one product, `sqrt_matvec` k, `inverse_quadratic` k, everything else d products.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        event_shape: Sequence[int],
        steps: int = 8,
        shift: Scalar = 0.0,
        scale: Scalar = 1.0,
        like: Tensor | None = None,
    ) -> None:
        self.event_shape = torch.Size(event_shape)
        self.product, self.steps, self.shift, self.scale = product, steps, shift, scale
        self.like = torch.zeros(1) if like is None else like[:0].detach()
        self._batch = 1 if like is None else like.shape[0]

    def matvec(self, v: Tensor) -> Tensor:
        """See the base class."""
        return per_sample(self.shift, v) * v + per_sample(self.scale, v) * self.product(v)

    def dense(self) -> Tensor:
        """See the base class; symmetrised, eigenvalues not clipped."""
        eye = torch.eye(self.d, dtype=self.like.dtype, device=self.like.device)
        columns = [self.matvec(e.reshape(1, *self.event_shape).expand(self._batch, *self.event_shape)) for e in eye]
        matrix = torch.stack([c.flatten(1) for c in columns], -1)
        return (matrix + matrix.mT) / 2

    def _exact(self) -> Dense:
        return Dense(self.dense(), self.event_shape)

    def diagonal(self) -> Tensor:
        """See the base class; d products."""
        return self._exact().diagonal()

    def trace(self) -> Tensor:
        """See the base class; d products."""
        return self._exact().trace()

    def logdet(self) -> Tensor:
        """See the base class; d products."""
        return self._exact().logdet()

    def _lanczos(self, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """f(C) z by `steps` Lanczos steps with full reorthogonalisation; Ritz values below 0 are set to 0."""
        flat = z.flatten(1)
        norm = flat.norm(dim=1, keepdim=True).clamp_min(1e-30)
        basis = [flat / norm]
        k = min(self.steps, self.d)
        T = torch.zeros(z.shape[0], k, k, dtype=flat.dtype, device=flat.device)
        complete = torch.zeros(z.shape[0], dtype=torch.bool, device=flat.device)
        for j in range(k):
            w = self.matvec(basis[j].reshape(z.shape)).flatten(1)
            scale = w.norm(dim=1, keepdim=True)
            own = (w * basis[j]).sum(1)
            # a direction beyond the invariant subspace is 0 and has no part in the result: any value that f can take
            T[:, j, j] = own if j == 0 else torch.where(complete, T[:, 0, 0], own)
            for _ in range(2):  # twice is enough
                V = torch.stack(basis, -1)
                w = w - torch.einsum("bdk,bk->bd", V, torch.einsum("bdk,bd->bk", V, w))
            if j + 1 < k:
                beta = w.norm(dim=1, keepdim=True)
                # where the invariant subspace is complete T becomes block diagonal
                alive = beta > 1e-6 * scale.clamp_min(1e-30)
                complete = ~alive[:, 0]
                beta = torch.where(alive, beta, torch.zeros_like(beta))
                T[:, j, j + 1] = T[:, j + 1, j] = beta[:, 0]
                basis.append(torch.where(alive, w / beta.clamp_min(1e-30), torch.zeros_like(w)))
        values, vectors = torch.linalg.eigh(T)
        weights = torch.einsum("bij,bj->bi", vectors, function(values.clamp_min(0)) * vectors[:, 0])
        return (torch.einsum("bdk,bk->bd", torch.stack(basis, -1), weights) * norm).reshape(z.shape)

    def sqrt_matvec(self, z: Tensor) -> Tensor:
        """See the base class; k products."""
        return self._lanczos(z, torch.sqrt)

    def inverse_quadratic(self, v: Tensor) -> Tensor:
        """See the base class; k products (Gauss quadrature of the resolvent)."""
        return dot(v, self._lanczos(v, lambda values: 1 / values))

    def affine(self, a: Scalar, b: Scalar) -> Implicit:
        """See the base class."""
        like = torch.zeros(self._batch, dtype=self.like.dtype, device=self.like.device)
        return Implicit(self.product, self.event_shape, self.steps, a + b * self.shift, b * self.scale, like)

    def bounded(self, limit: Tensor) -> Implicit:
        """C itself: the products of a clipped denoiser already vanish where the mean is clipped."""
        return self

    def trace_estimate(self, probes: Tensor) -> Tensor:
        """Hutchinson's estimate of the trace from probes (m, B, *event_shape) of +-1 (or normals), m products, (B,)."""
        return torch.stack([dot(z, self.matvec(z)) for z in probes]).mean(0)
