"""Covariances agree with their dense truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.process.basis import Basis, DCTBasis, MatrixBasis, PixelBasis
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic, LowRankPlusDiagonal
from lowvar.process.matrix import Dense, Implicit
from lowvar.process.noise import Independent
from lowvar.process.rotated import BasisLowRankPlusDiagonal
from lowvar.testing import rotation
from lowvar.testing.laws.covariance import CovarianceLaws, check_inverse_trace, check_root

SHAPE = (1, 2, 3)
D = 6


def uniform(draw: int, *shape: int) -> Tensor:
    return 0.1 + Independent(0).uniform(range(shape[0]), shape[1:], draw=draw, dtype=torch.float64)


def normal(draw: int, *shape: int) -> Tensor:
    return Independent(0).normal(range(shape[0]), shape[1:], draw=draw, dtype=torch.float64)


def spd(n: int) -> Tensor:
    A = normal(7, n, D, D)
    return A @ A.mT / D + 0.1 * torch.eye(D, dtype=torch.float64)


PCA = MatrixBasis(rotation(D, 3), SHAPE)


def cases() -> dict[str, tuple[Covariance, Tensor]]:
    out: dict[str, tuple[Covariance, Tensor]] = {}
    for n in (1, 4):
        v = uniform(1, n, *SHAPE)
        flat = v.flatten(1)
        eye = torch.eye(D, dtype=torch.float64)
        out[f"isotropic {n}"] = (Isotropic(flat[:, 0], SHAPE), flat[:, :1, None] * eye)
        out[f"diagonal {n}"] = (Diagonal(v), torch.diag_embed(flat))
        for basis in (PCA, DCTBasis(SHAPE), PixelBasis(SHAPE)):
            B = basis.matrix()
            out[f"{basis.name} {n}"] = (BasisDiagonal(basis, v), B @ torch.diag_embed(flat) @ B.mT)
        U = normal(2, n, 2, *SHAPE)
        low = torch.diag_embed(flat) + U.flatten(2).mT @ U.flatten(2)
        out[f"low rank {n}"] = (LowRankPlusDiagonal(v, U), low)
        B = PCA.matrix()
        out[f"low rank in pca {n}"] = (BasisLowRankPlusDiagonal(PCA, LowRankPlusDiagonal(v, U)), B @ low @ B.mT)
        S = spd(n)
        out[f"dense {n}"] = (Dense(S, SHAPE), S)
        if n == 4:  # all directions in the Krylov space: the root is exact

            def product(v: Tensor, S: Tensor = S) -> Tensor:
                return (S @ v.flatten(1)[..., None])[..., 0].reshape(v.shape)

            out[f"implicit {n}"] = (Implicit(product, SHAPE, steps=D, like=v), S)
    return out


CASES = cases()


class TestCovariances(CovarianceLaws):
    @pytest.fixture(params=CASES.values(), ids=list(CASES))
    def case(self, request: pytest.FixtureRequest) -> tuple[Covariance, Tensor]:
        return request.param

    @pytest.fixture
    def covariance(self, case: tuple[Covariance, Tensor]) -> Covariance:
        return case[0]

    @pytest.fixture
    def truth(self, case: tuple[Covariance, Tensor]) -> Tensor:
        return case[1]

    def test_bounded(self, covariance: Covariance, truth: Tensor) -> None:
        if not isinstance(covariance, Implicit):  # products only: nothing to bound
            super().test_bounded(covariance, truth)


@pytest.mark.parametrize("one", CASES)
@pytest.mark.parametrize("two", ["isotropic 1", "diagonal 4", "pca 4", "dct 1", "low rank 4", "dense 4"])
def test_inverse_trace_of_pairs(one: str, two: str) -> None:
    covariance, truth = CASES[one]
    check_inverse_trace(covariance, truth, CASES[two][0], 1e-9)


def test_negative_variances_cannot_come_out() -> None:
    bad = torch.tensor([[-1.0, 2.0, -1e-9]])
    for covariance in (Isotropic(-1.0, (3,)), Diagonal(bad), BasisDiagonal(PixelBasis((3,)), bad)):
        assert float(covariance.diagonal().min()) >= 0
        assert torch.isfinite(covariance.sqrt_matvec(torch.ones(1, 3))).all()
    matrix = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])  # eigenvalues 3, -1
    values = torch.linalg.eigvalsh(Dense(matrix, (2,)).dense())
    torch.testing.assert_close(values, torch.tensor([[0.0, 3.0]]), atol=1e-6, rtol=0)


def test_singular_covariances() -> None:
    """Zero variance: no noise along it, no density off it."""
    covariance = Diagonal(torch.tensor([[0.0, 2.0]], dtype=torch.float64))
    assert covariance.sqrt_matvec(torch.ones(1, 2, dtype=torch.float64))[0, 0] == 0
    assert float(covariance.logdet()) == -float("inf")
    assert float(covariance.inverse_quadratic(torch.ones(1, 2, dtype=torch.float64))) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    v = torch.full((1, 3), 0.01, dtype=dtype)
    for covariance in (Diagonal(v), Isotropic(v[0, 0], (3,)), LowRankPlusDiagonal(v, torch.ones(1, 1, 3, dtype=dtype))):
        assert covariance.diagonal().dtype == torch.float32
    assert Dense(torch.eye(2, dtype=dtype)[None], (2,)).trace().dtype == torch.float32


def test_lanczos_root_converges() -> None:
    """k Lanczos steps approach the symmetric root of a matrix with condition 1e4, from any start."""
    d = 40
    B = rotation(d, 1)
    values = torch.logspace(-2, 2, d, dtype=torch.float64)
    S = (B * values) @ B.mT
    z = Independent(0).normal(range(3), (d,), dtype=torch.float64)
    exact = z @ ((B * values.sqrt()) @ B.mT)
    errors = []
    for k in (2, 4, 8, 16, 40):
        root = Implicit(lambda v: v @ S, (d,), steps=k, like=z).sqrt_matvec(z)
        errors.append(float((root - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 4e-2
    assert errors[-1] < 1e-10


def test_lanczos_stops_at_an_invariant_subspace() -> None:
    S = torch.diag(torch.tensor([1.0, 1.0, 4.0, 4.0], dtype=torch.float64))
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    root = Implicit(lambda v: v @ S, (4,), steps=4, like=z).sqrt_matvec(z)
    torch.testing.assert_close(root, z @ S.sqrt(), atol=1e-12, rtol=0)


def test_hutchinson_is_exact_in_the_mean() -> None:
    """All 2^d sign vectors are the Rademacher law: their mean is the trace."""
    S = spd(1)[0, :3, :3]
    signs = torch.tensor([[s0, s1, s2] for s0 in (-1, 1) for s1 in (-1, 1) for s2 in (-1, 1)], dtype=torch.float64)
    estimate = Implicit(lambda v: v @ S, (3,), like=signs[:1]).trace_estimate(signs[:, None])
    torch.testing.assert_close(estimate, torch.trace(S)[None], atol=1e-12, rtol=0)


def test_lanczos_ends_where_the_subspace_is_complete() -> None:
    """Two eigenvalues and six steps, and a start within one eigenspace: root and quadratic form are exact."""
    S = torch.diag(torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    v = Independent(4).normal(range(3), (6,), dtype=torch.float64)
    v[1, 3:] = 0
    C = Implicit(lambda x: x @ S, (6,), steps=6, like=v)
    expected = (v**2 / S.diagonal()).sum(1)
    torch.testing.assert_close(C.inverse_quadratic(v), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(C.sqrt_matvec(v), v * S.diagonal().sqrt(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 4), (3, 4, 1), (2, 3, 2, 4), (5,), (1, 1)], ids=str)
@pytest.mark.parametrize("with_spare", [True, False])
def test_accumulate_is_the_inverse_added(shape: tuple[int, ...], with_spare: bool) -> None:
    """Whatever axes have length 1; a buffer of nan leaves nothing behind; other memory formats, and gradients."""
    basis = DCTBasis(shape)
    c, out = (Independent(s).normal(range(3), shape, dtype=torch.float64) for s in (1, 2))
    expected = out + basis.inverse(c)
    spare = torch.full_like(c, torch.nan) if with_spare else None
    for contiguous in (True, False):
        target = out.clone() if contiguous else out.clone().movedim(1, -1).contiguous().movedim(-1, 1)
        found = basis.accumulate(target, c.clone(), spare)
        assert found is target
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for other in (PixelBasis(shape), MatrixBasis(rotation(c[0].numel(), 3), shape)):
        torch.testing.assert_close(other.accumulate(out.clone(), c, spare), out + other.inverse(c), rtol=0, atol=1e-13)
    x = c.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((basis.accumulate(out.clone(), x * 1.0, spare) * out).sum(), x)
    torch.testing.assert_close(gradient, basis.forward(out), rtol=0, atol=1e-13)


@pytest.mark.parametrize("basis", [PCA, DCTBasis(SHAPE), DCTBasis((3, 4, 5)), PixelBasis(SHAPE)], ids=lambda b: b.name)
def test_bases_are_orthonormal(basis: Basis) -> None:
    d = basis.event_shape.numel()
    B = basis.matrix()
    torch.testing.assert_close(B.mT @ B, torch.eye(d, dtype=torch.float64), atol=1e-12, rtol=0)
    x = normal(5, 2, *basis.event_shape)
    torch.testing.assert_close(basis.inverse(basis.forward(x)), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(basis.forward(x).flatten(1), x.flatten(1) @ B, atol=1e-12, rtol=0)
    v = x**2
    torch.testing.assert_close(basis.squared_mix(v).flatten(1), v.flatten(1) @ (B**2).mT, atol=1e-12, rtol=0)
    assert basis.same_as(basis)


def test_bases_know_each_other() -> None:
    same = MatrixBasis(rotation(D, 3), SHAPE)
    assert PCA.same_as(same)
    assert not PCA.same_as(MatrixBasis(rotation(D, 4), SHAPE))
    assert DCTBasis(SHAPE).same_as(DCTBasis(SHAPE))
    assert not DCTBasis(SHAPE).same_as(PixelBasis(SHAPE))
    with pytest.raises(ValueError, match="orthonormal"):
        MatrixBasis(2 * rotation(D), SHAPE)
    with pytest.raises(ValueError, match="need"):
        MatrixBasis(rotation(4), SHAPE)


def test_float32_keeps_the_laws() -> None:
    for covariance, truth in CASES.values():
        if isinstance(covariance, Diagonal):
            check_root(Diagonal(covariance.variance.float()), truth.float(), 1e-5)
