r"""Laws of a covariance, against the dense matrices it stands for.

diagonal, trace, matvec, logdet, v^T C^-1 v, tr(C^-1 D)     agree with the dense truth
sqrt_matvec = R z with R R^T = C                            columns R e_j, or in the mean for a random root
affine(a, b) = a I + b C,  numbers or one a sample
bounded(limit): still a covariance, total variance at most sum limit, never above C
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance, Isotropic
from lowvar.process.noise import Independent

__all__ = [
    "CovarianceLaws",
    "check_affine",
    "check_bounded",
    "check_diagonal",
    "check_inverse_quadratic",
    "check_inverse_trace",
    "check_logdet",
    "check_matvec",
    "check_positive",
    "check_root",
    "check_trace",
]


def _events(covariance: Covariance, truth: Tensor, seed: int = 0) -> Tensor:
    """Events to multiply with: as many as the truth has matrices (3 for one that all samples share)."""
    n = 3 if truth.shape[0] == 1 else truth.shape[0]
    return Independent(seed).normal(range(n), covariance.event_shape, dtype=truth.dtype)


def _close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    scale = float(expected[torch.isfinite(expected)].abs().max()) if bool(torch.isfinite(expected).any()) else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1e-300), msg=lambda m: f"{what}: {m}"
    )


def check_diagonal(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """Variances of the entries, in the event's shape."""
    expected = torch.diagonal(truth, dim1=-2, dim2=-1).reshape(-1, *covariance.event_shape)
    _close(covariance.diagonal(), expected, tolerance, "diagonal")


def check_trace(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """The sum of the variances."""
    _close(covariance.trace(), torch.diagonal(truth, dim1=-2, dim2=-1).sum(-1), tolerance, "trace")


def check_matvec(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """Products, and the dense matrix made of them."""
    v = _events(covariance, truth)
    expected = (truth @ v.flatten(1)[..., None])[..., 0].reshape(v.shape)
    _close(covariance.matvec(v), expected, tolerance, "matvec")
    _close(covariance.dense(), truth, tolerance, "dense")


def root_square(covariance: Covariance, truth: Tensor) -> Tensor:
    """R R^T from the columns R e_j, (B, d, d)."""
    n = max(truth.shape[0], 1)
    eye = torch.eye(covariance.d, dtype=truth.dtype)
    columns = [
        covariance.sqrt_matvec(e.reshape(1, *covariance.event_shape).expand(n, *covariance.event_shape)) for e in eye
    ]
    R = torch.stack([c.flatten(1) for c in columns], -1)
    return R @ R.mT


def check_root(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """R R^T = C."""
    _close(root_square(covariance, truth), truth, tolerance, "sqrt_matvec")


def check_logdet(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """Log determinant (C must be regular)."""
    _close(covariance.logdet(), torch.linalg.slogdet(truth)[1], tolerance, "logdet")


def check_inverse_quadratic(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """v^T C^-1 v (C must be regular)."""
    v = _events(covariance, truth)
    flat = v.flatten(1)
    expected = (flat * torch.linalg.solve(truth.expand(len(v), -1, -1), flat)).sum(1)
    _close(covariance.inverse_quadratic(v), expected, tolerance, "inverse_quadratic")


def check_inverse_trace(covariance: Covariance, truth: Tensor, other: Covariance, tolerance: float) -> None:
    """tr(C^-1 D), and tr(C^-1 C) = d (C must be regular)."""
    expected = torch.diagonal(torch.linalg.solve(truth, other.dense().to(truth)), dim1=-2, dim2=-1).sum(-1)
    _close(covariance.inverse_trace(other), expected, tolerance, "inverse_trace")
    own = covariance.inverse_trace(covariance)
    _close(own, torch.full_like(own, covariance.d), tolerance, "inverse_trace of itself")


def check_affine(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """a I + b C for numbers, for one pair a sample, and twice in a row."""
    eye = torch.eye(covariance.d, dtype=truth.dtype)
    for a, b in ((0.0, 1.0), (0.3, 2.0), (1.5, 0.0)):
        new = covariance.affine(a, b)
        expected = a * eye + b * truth
        check_matvec(new, expected, tolerance)
        check_root(new, expected, tolerance)
        check_trace(new, expected, tolerance)
    check_logdet(covariance.affine(0.3, 2.0), 0.3 * eye + 2.0 * truth, tolerance)
    twice = covariance.affine(0.3, 2.0).affine(0.1, 0.5)
    _close(twice.dense(), (0.1 + 0.15) * eye + truth, tolerance, "affine twice")
    if truth.shape[0] > 1:
        a = torch.linspace(0.1, 1.0, truth.shape[0], dtype=truth.dtype)
        b = torch.linspace(2.0, 0.0, truth.shape[0], dtype=truth.dtype)
        expected = a[:, None, None] * eye + b[:, None, None] * truth
        check_matvec(covariance.affine(a, b), expected, tolerance)
        check_root(covariance.affine(a, b), expected, tolerance)


def check_bounded(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """The bounded covariance keeps the bound on the total, never exceeds C, and a loose bound changes nothing."""
    diagonal = torch.diagonal(truth, dim1=-2, dim2=-1).reshape(-1, *covariance.event_shape)
    loose = covariance.bounded(diagonal.amax() * 10 * torch.ones_like(diagonal))
    _close(loose.dense(), truth, tolerance, "loose bound")
    limit = 0.3 * diagonal.flip(-1)
    tight = covariance.bounded(limit)
    matrix = tight.dense().to(truth)
    scale = float(truth.abs().max())
    excess = (torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1) - limit.flatten(1).sum(1)).max()
    if float(excess) > tolerance * scale * covariance.d:
        raise AssertionError(f"the total variance exceeds the bound by {float(excess):.3g}")
    if float(torch.linalg.eigvalsh(truth - matrix)[..., 0].min()) < -tolerance * scale * covariance.d:
        raise AssertionError("bounding made the covariance larger in some direction")


def check_positive(covariance: Covariance, truth: Tensor, tolerance: float) -> None:
    """No negative variance: diagonal, trace, eigenvalues of the dense matrix."""
    del truth
    matrix = covariance.dense().double()
    scale = float(matrix.abs().max()) + 1e-300
    if float(covariance.diagonal().min()) < 0 or float(covariance.trace().min()) < 0:
        raise AssertionError("a variance is negative")
    low = float(torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[..., 0].min())
    if low < -tolerance * scale:
        raise AssertionError(f"the matrix has the eigenvalue {low:.3g}")


class CovarianceLaws:
    """Inherit, and supply the fixtures `covariance` (float64) and `truth` (B or 1, d, d), which must be regular.

    Set `tolerance` (relative to the largest entry of what is compared) and, where `bounded` does not apply (products
    only), `has_bound = False`.
    """

    tolerance: float = 1e-10
    has_bound: bool = True

    def test_diagonal(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_diagonal`."""
        check_diagonal(covariance, truth, self.tolerance)

    def test_trace(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_trace`."""
        check_trace(covariance, truth, self.tolerance)

    def test_matvec(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_matvec`."""
        check_matvec(covariance, truth, self.tolerance)

    def test_root(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_root`."""
        check_root(covariance, truth, self.tolerance)

    def test_logdet(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_logdet`."""
        check_logdet(covariance, truth, self.tolerance)

    def test_inverse_quadratic(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_inverse_quadratic`."""
        check_inverse_quadratic(covariance, truth, self.tolerance)

    def test_inverse_trace(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_inverse_trace`."""
        other = Isotropic(torch.tensor([0.7], dtype=truth.dtype), covariance.event_shape)
        check_inverse_trace(covariance, truth, other, self.tolerance)

    def test_affine(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_affine`."""
        check_affine(covariance, truth, self.tolerance)

    def test_bounded(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_bounded`."""
        if self.has_bound:
            check_bounded(covariance, truth, self.tolerance)

    def test_positive(self, covariance: Covariance, truth: Tensor) -> None:
        """See `check_positive`."""
        check_positive(covariance, truth, self.tolerance)
