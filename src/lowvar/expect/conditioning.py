r"""Gaussian conditioning on a linear measurement, for every covariance of the family.

    x ~ N(m, C),   y = A x + n,   n ~ N(0, N),   N = diag(noise_std^2):

    S    = A C A^T + N,
    E[x | y]   = m + C A^T S^-1 (y - A m),
    Cov[x | y] = C - C A^T S^-1 A C.

S is solved by division where it is diagonal (C a multiple of I or diagonal, and no two rows of A share an entry), as a
matrix where C is `Dense`, or the same for all samples and of at most 1,024 numbers (a calibrated table: one
decomposition serves the batch), and by conjugate gradients elsewhere: one product with C, A and A^T an iteration,
sample by sample. The conditioned covariance stays in the family: diagonal for selected entries, diagonal in its basis
for a measurement of the whole event, dense where S is a matrix; elsewhere `Implicit`, known by its products, its root
by Lanczos steps.

Source: M. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.expect.operators import LinearOperator, Masking, Whole
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic, LowRankPlusDiagonal
from lowvar.process.matrix import Dense, Implicit

__all__ = ["Measurement", "condition", "solve"]

_SMALL = 1024
"""Numbers in an event up to which a covariance shared by all samples is written out."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured: y = A x_0 + n with n ~ N(0, noise_std^2).

    Attributes:
        operator: A.
        y: (*measured_shape), or (B, *measured_shape) with one measurement a sample.
        noise_std: standard deviation of the noise, a number or one an entry, (*measured_shape); above 0.

    Raises:
        ValueError: if shapes disagree, y is not finite or a standard deviation is not above 0.

    Example:
        >>> from lowvar.expect.operators import Masking
        >>> Measurement(Masking(torch.tensor([True, False])), torch.tensor([0.3]), 0.1).y.shape
        torch.Size([1])
    """

    operator: LinearOperator
    y: Tensor
    noise_std: Tensor | float

    def __post_init__(self) -> None:
        """Checks shapes and numbers."""
        shape = self.operator.measured_shape
        if self.y.shape != shape and self.y.shape[1:] != shape:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)}, and the operator measures {tuple(shape)}; give that, or "
                f"(B, {', '.join(map(str, shape))}) with one measurement a sample"
            )
        if not bool(torch.isfinite(self.y).all()):
            raise ValueError("y holds values that are not finite; mask what was not measured")
        std = torch.as_tensor(self.noise_std)
        if not bool(((std > 0) & torch.isfinite(std)).all()):
            raise ValueError(f"noise_std is {float(std.min()):g} at least; give standard deviations above 0, e.g. 0.01")
        if std.ndim and std.shape != shape:
            raise ValueError(f"noise_std has shape {tuple(std.shape)}; give a number or {tuple(shape)}")

    def var(self, like: Tensor) -> Tensor:
        """Noise variances that multiply measurements (B, *measured_shape)."""
        return torch.as_tensor(self.noise_std).to(like) ** 2

    def residual(self, mean: Tensor) -> Tensor:
        """y - A mean, (B, *measured_shape).

        Raises:
            ValueError: if there is one measurement a sample, and another number of samples.
        """
        y = self.y.to(mean)
        y = y[None] if y.ndim == len(self.operator.measured_shape) else y
        if len(y) not in (1, len(mean)):
            raise ValueError(f"{len(y)} measurements for {len(mean)} samples; give one, or one a sample")
        return y - self.operator.forward(mean)


def _diagonal(A: LinearOperator, C: Covariance, like: Tensor) -> Tensor | None:
    """The diagonal of A C A^T where it is diagonal, else None."""
    return A.row_variance(C.diagonal().to(like)) if isinstance(C, Isotropic | Diagonal) else None


def _written_out(C: Covariance, like: Tensor) -> Tensor | None:
    """The matrix (B or 1, d, d) of C where that is there already or shared by all samples and small, else None."""
    plain = isinstance(C, Isotropic | Diagonal | BasisDiagonal | LowRankPlusDiagonal)
    shared = plain and C.variance.shape[0] == 1 and C.d <= _SMALL
    if isinstance(C, LowRankPlusDiagonal):
        shared = shared and C.factors.shape[0] == 1
    return C.dense().to(like) if shared or isinstance(C, Dense) else None


def _system(measurement: Measurement, K: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """M K (B or 1, m, d), and S^-1 times `right` (B, m, k), or times M K: in float64 where the device has it.

    Rows of A that nearly repeat each other, with little noise, are more than float32 holds.

    Raises:
        ValueError: if they are more than the device's numbers hold.
    """
    wide = K if K.device.type == "mps" else K.double()
    M, shape = measurement.operator.matrix().to(wide), measurement.operator.measured_shape
    seen = M @ wide
    noise = (measurement.var(wide) * torch.ones(shape, dtype=wide.dtype, device=wide.device)).flatten()
    S = seen @ M.mT + torch.diag(noise)
    L, failed = torch.linalg.cholesky_ex(S)
    pivots = L.diagonal(dim1=-2, dim2=-1) ** 2 / S.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not bool((pivots > 10 * torch.finfo(S.dtype).eps).all()):
        raise ValueError(
            f"A C A^T + N is singular with noise_std {float(noise.min().sqrt()):.3g}: rows of A repeat each other; "
            "give a larger noise_std"
        )
    return seen, torch.cholesky_solve(seen if right is None else right.to(wide), L)


def solve(
    measurement: Measurement,
    C: Covariance,
    r: Tensor,
    *,
    iterations: int | None = None,
    tolerance: float = 1e-6,
) -> Tensor:
    """S^-1 r, S = A C A^T + N.

    Args:
        measurement: A and N.
        C: covariance of events.
        r: (B, *measured_shape).
        iterations: of conjugate gradients, at most; None: until `tolerance` is reached.
        tolerance: of the residual's norm, relative to r's.

    Raises:
        ValueError: if it is not reached in 4 m + 20 iterations: C is then not positive semi-definite, or the noise is
            too small for the precision of the numbers.

    Example:
        >>> from lowvar.expect.operators import Whole
        >>> seen = Measurement(Whole((2,)), torch.zeros(2), 1.0)
        >>> solve(seen, Isotropic(3.0, (2,)), torch.tensor([[4.0, 8.0]])).tolist()
        [[1.0, 2.0]]
    """
    A, noise = measurement.operator, measurement.var(r)
    direct = _diagonal(A, C, r)
    if direct is not None:
        return r / (direct + noise)
    K = _written_out(C, r)
    if K is not None:
        if len(K) == 1:
            return _system(measurement, K, r.flatten(1).mT[None])[1][0].mT.reshape(r.shape).to(r)
        return _system(measurement, K, r.flatten(1)[..., None])[1].reshape(r.shape).to(r)

    def product(p: Tensor) -> Tensor:
        return A.forward(C.matvec(A.adjoint(p))) + noise * p

    return _conjugate_gradients(product, r, iterations, max(tolerance, 20 * torch.finfo(r.dtype).eps))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).reshape(-1, *([1] * (a.ndim - 1)))


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], r: Tensor, iterations: int | None, tolerance: float
) -> Tensor:
    """Sample by sample; one that is done, or meets a direction of no curvature, stays as it is."""
    most = 4 * r[0].numel() + 20 if iterations is None else iterations
    u, p, rho = torch.zeros_like(r), r, _inner(r, r)
    goal = rho * tolerance**2
    for _ in range(most):
        live = rho > goal
        if not bool(live.any()):
            return u
        q = product(p)
        curvature = _inner(p, q)
        live = live & (curvature > 0)
        step = torch.where(live, rho / torch.where(live, curvature, torch.ones_like(rho)), torch.zeros_like(rho))
        u, r = u + step * p, r - step * q
        new = torch.where(live, _inner(r, r), torch.zeros_like(rho))
        p = r + torch.where(live, new / torch.where(live, rho, torch.ones_like(rho)), torch.zeros_like(rho)) * p
        rho = new
    if iterations is None and bool((rho > goal).any()):
        worst = float((rho / goal).amax().sqrt() * tolerance)
        raise ValueError(
            f"conjugate gradients stopped at a residual of {worst:.2g} after {most} iterations; give a larger "
            "noise_std, float64 states, or a number of iterations to stop at"
        )
    return u


def condition(
    measurement: Measurement,
    mean: Tensor,
    C: Covariance,
    *,
    iterations: int | None = None,
    tolerance: float = 1e-6,
    steps: int = 16,
) -> tuple[Tensor, Covariance]:
    """Mean and covariance of N(mean, C) given the measurement.

    Args:
        measurement: y, A, N.
        mean: (B, *event_shape).
        C: of the same events.
        iterations, tolerance: of conjugate gradients, see `solve`.
        steps: of Lanczos, for the root of an implicit result.

    Returns:
        Mean (B, *event_shape), and the covariance.

    Example:
        >>> from lowvar.expect.operators import Masking
        >>> seen = Measurement(Masking(torch.tensor([True, False])), torch.tensor([1.0]), 0.5)
        >>> m, C = condition(seen, torch.zeros(1, 2), Isotropic(0.25, (2,)))
        >>> m.tolist(), C.diagonal().tolist()
        ([[0.5, 0.0]], [[0.125, 0.25]])
    """
    A = measurement.operator
    gained = solve(measurement, C, measurement.residual(mean), iterations=iterations, tolerance=tolerance)
    covariance = _conditioned(measurement, mean, C, iterations, tolerance, steps)
    return mean + C.matvec(A.adjoint(gained)), covariance


def _conditioned(
    measurement: Measurement, like: Tensor, C: Covariance, iterations: int | None, tolerance: float, steps: int
) -> Covariance:
    A = measurement.operator
    noise = measurement.var(like)
    if isinstance(C, Isotropic | Diagonal) and isinstance(A, Masking | Whole):
        v = C.diagonal().to(like)
        seen = A.adjoint(A.forward(torch.ones_like(v)))  # 1 where measured
        n = A.adjoint((noise * torch.ones_like(A.forward(v[:1]))).expand_as(A.forward(v)))
        return Diagonal(torch.where(seen > 0, v * n / (v + n).clamp_min(torch.finfo(v.dtype).tiny), v))
    if isinstance(C, BasisDiagonal) and isinstance(A, Whole) and noise.ndim == 0:
        v = C.variance.to(like)
        return BasisDiagonal(C.basis, v * noise / (v + noise))
    K = None if _diagonal(A, C, like) is not None else _written_out(C, like)  # products are cheap where S is diagonal
    if K is not None:
        seen, gain = _system(measurement, K)
        return Dense((K.to(seen) - seen.mT @ gain).to(like), C.event_shape)

    def product(v: Tensor) -> Tensor:
        w = C.matvec(v)
        return w - C.matvec(A.adjoint(solve(measurement, C, A.forward(w), iterations=iterations, tolerance=tolerance)))

    return Implicit(product, C.event_shape, steps, like=like)
