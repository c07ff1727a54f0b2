"""Linear operators and Gaussian conditioning, against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.expect import conditioning
from lowvar.expect.conditioning import Measurement, condition, solve
from lowvar.expect.operators import Blur, Linear, LinearOperator, Masking, Matrix, Pooling, Whole
from lowvar.process import (
    BasisDiagonal,
    Covariance,
    DCTBasis,
    Dense,
    Diagonal,
    Implicit,
    Isotropic,
    LowRankPlusDiagonal,
    PixelBasis,
)
from lowvar.process.noise import Independent

SHAPE = (2, 2, 4)
D = math.prod(SHAPE)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return Independent(seed).normal(range(shape[0]), shape[1:], dtype=torch.float64)


def variances(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 + Independent(seed).uniform(range(shape[0]), shape[1:], dtype=torch.float64)


OPERATORS: dict[str, LinearOperator] = {
    "whole": Whole(SHAPE),
    "masking": Masking(normal(*SHAPE) > 0),
    "pooling": Pooling(SHAPE, 2),
    "blur": Blur(SHAPE, variances(2, 3)),
    "matrix": Matrix(normal(5, D), SHAPE),
    "linear": Linear(lambda x: x.diff(dim=3).sum(1), SHAPE),
}


def covariances() -> dict[str, Covariance]:
    factors = normal(2, 3, *SHAPE) / 2
    dense = normal(2, D, D)
    M = dense @ dense.mT / D
    return {
        "isotropic": Isotropic(torch.tensor([0.7], dtype=torch.float64), SHAPE),
        "diagonal": Diagonal(variances(2, *SHAPE)),
        "basis": BasisDiagonal(DCTBasis(SHAPE), variances(1, *SHAPE)),
        "low rank": LowRankPlusDiagonal(variances(2, *SHAPE), factors),
        "dense": Dense(M, SHAPE),
        "implicit": Implicit(
            lambda v: (M @ v.flatten(1)[..., None])[..., 0].reshape(v.shape), SHAPE, D, like=factors[:, 0]
        ),
    }


@pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS.keys())
def test_operators_keep_their_laws(A: LinearOperator) -> None:
    """Adjoint, dense form, and the diagonal of A diag(v) A^T where one is claimed."""
    x, u = normal(3, *SHAPE), normal(3, *A.measured_shape, seed=1)
    assert A.forward(x).shape == u.shape
    assert A.adjoint(u).shape == x.shape
    assert torch.allclose((A.forward(x) * u).flatten(1).sum(1), (x * A.adjoint(u)).flatten(1).sum(1), rtol=1e-12)
    M = A.matrix()
    assert torch.allclose(A.forward(x).flatten(1), x.flatten(1) @ M.mT, atol=1e-12)
    v = variances(1, *SHAPE)
    gram = M @ torch.diag(v.flatten()) @ M.mT
    claimed = A.row_variance(v)
    if claimed is not None:
        assert torch.allclose(torch.diag(claimed.flatten()), gram, atol=1e-14)


@pytest.mark.parametrize("form", covariances().keys())
@pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS.keys())
@pytest.mark.parametrize("one_std", [True, False], ids=["std", "stds"])
def test_conditioning_is_that_of_gaussians(A: LinearOperator, form: str, one_std: bool) -> None:
    C = covariances()[form]
    std = 0.3 if one_std else 0.2 + variances(*A.measured_shape)
    y, mean = normal(2, *A.measured_shape, seed=2), normal(2, *SHAPE, seed=3)
    got_mean, got = condition(Measurement(A, y, std), mean, C, tolerance=1e-12, steps=D)
    M, K = A.matrix(), C.dense()
    S = M @ K @ M.mT + torch.diag(
        (torch.as_tensor(std, dtype=torch.float64) ** 2 * torch.ones(A.measured_shape)).flatten()
    )
    gain = torch.linalg.solve(S, M @ K).mT
    r = (y - A.forward(mean)).flatten(1)
    assert torch.allclose(got_mean.flatten(1), mean.flatten(1) + (gain @ r[..., None])[..., 0], atol=1e-9)
    exact = K - gain @ M @ K
    assert torch.allclose(got.dense().expand(2, -1, -1), exact.expand(2, -1, -1), atol=1e-9)
    z = normal(2, *SHAPE, seed=4)
    root = got.affine(0.1, 0.5).sqrt_matvec(z)
    twice = got.affine(0.1, 0.5).matvec(z)
    assert torch.allclose((root**2).flatten(1).sum(1), (z * twice).flatten(1).sum(1), rtol=1e-6)  # R symmetric, R R = C


def test_the_result_stays_simple_where_it_can() -> None:
    found = {
        (name, form): type(
            condition(
                Measurement(OPERATORS[name], normal(*OPERATORS[name].measured_shape), 0.1),
                normal(1, *SHAPE),
                covariances()[form],
            )[1]
        )
        for name, form in (
            ("masking", "isotropic"),
            ("whole", "diagonal"),
            ("whole", "basis"),
            ("blur", "basis"),
            ("blur", "diagonal"),
        )
    }
    assert list(found.values()) == [Diagonal, Diagonal, BasisDiagonal, Dense, Implicit]


@pytest.mark.parametrize("form", ["basis", "low rank"])
def test_written_out_or_by_products_is_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large event goes by conjugate gradients and Lanczos; made to here, it gives what the small one does."""
    A, C = OPERATORS["blur"], covariances()[form]
    if form == "low rank":
        C = LowRankPlusDiagonal(variances(1, *SHAPE), normal(1, 3, *SHAPE))
    seen, mean = Measurement(A, normal(*A.measured_shape), 0.3), normal(2, *SHAPE, seed=3)
    small = condition(seen, mean, C)
    monkeypatch.setattr(conditioning, "_SMALL", 0)
    large = condition(seen, mean, C, tolerance=1e-12, steps=D)
    assert isinstance(small[1], Dense)
    assert isinstance(large[1], Implicit)
    assert torch.allclose(small[0], large[0], atol=1e-9)
    assert torch.allclose(small[1].dense().expand(2, -1, -1), large[1].dense(), atol=1e-9)


def test_conjugate_gradients_go_sample_by_sample_and_may_stop_early() -> None:
    """A sample's solution does not depend on the others, and k iterations are exact for k distinct eigenvalues."""
    A, C = OPERATORS["blur"], Implicit(covariances()["basis"].matvec, SHAPE)
    seen, r = Measurement(A, normal(*A.measured_shape), 0.3), normal(4, *A.measured_shape)
    r[2] = 0
    together = solve(seen, C, r, tolerance=1e-12)
    alone = torch.cat([solve(seen, C, part, tolerance=1e-12) for part in r.split(1)])
    assert torch.allclose(together, alone, atol=1e-10)
    assert together[2].abs().max() == 0
    few = solve(seen, C, r, iterations=2)
    assert 1e-6 < (few - together).abs().max() < (0 * few - together).abs().max()
    flat = Measurement(Linear(lambda x: x * 1.0, SHAPE), normal(*SHAPE), 0.3)
    assert torch.allclose(solve(flat, Isotropic(2.0, SHAPE), normal(2, *SHAPE), iterations=1), normal(2, *SHAPE) / 2.09)


def test_a_learned_jacobian_that_is_no_covariance_does_no_harm_where_it_curves_down() -> None:
    """Negative curvature stops a sample; without a limit of iterations it is an error."""
    C = Implicit(lambda v: -v, SHAPE, like=normal(1, *SHAPE))
    seen = Measurement(OPERATORS["linear"], normal(*OPERATORS["linear"].measured_shape), 0.1)
    r = normal(1, *seen.operator.measured_shape)
    assert solve(seen, C, r, iterations=5).isfinite().all()


REFUSED = [
    (lambda: Measurement(Whole((2,)), torch.zeros(3), 0.1), r"y has shape \(3,\), and the operator measures \(2,\)"),
    (lambda: Measurement(Whole((2,)), torch.tensor([0.0, math.nan]), 0.1), "not finite; mask what was not measured"),
    (
        lambda: Measurement(Whole((2,)), torch.zeros(2), 0.0),
        "noise_std is 0 at least; give standard deviations above 0",
    ),
    (
        lambda: Measurement(Whole((2,)), torch.zeros(2), torch.ones(3)),
        r"noise_std has shape \(3,\); give a number or \(2,\)",
    ),
    (
        lambda: Measurement(Whole((2,)), torch.zeros(3, 2), 1.0).residual(torch.zeros(2, 2)),
        "3 measurements for 2 samples",
    ),
    (lambda: Masking(torch.zeros(3, dtype=torch.bool)), "keeps 0 entries"),
    (lambda: Masking(torch.ones(3)), "mask is torch.float32"),
    (lambda: Pooling((1, 9, 8), 2), r"blocks of 2 x 2 do not tile events \(1, 9, 8\)"),
    (lambda: Blur((1, 4, 4), torch.ones(5, 5)), r"a kernel \(5, 5\) does not fit events \(1, 4, 4\)"),
    (lambda: Matrix(torch.ones(2, 3), (4,)), r"a matrix \(2, 3\) does not act on events \(4,\)"),
    (lambda: Linear(lambda x: x**2, (3,)), "the operator is not linear"),
    (lambda: Linear(lambda x: x + 1, (3,)), "the operator is not linear"),
    (lambda: Linear(lambda x: x - x.mean(0), (3,)), "looks at other events"),
    (lambda: Linear(lambda x: x @ torch.ones(3, 2), (3,)), r"fails on float64 events \(3, 3\).*as in x @ W.to\(x\).mT"),
    (lambda: Linear(lambda x: x.sum(1), (3,)), r"gives shape \(3,\) for 3 events; give \(3, m\)"),
    (lambda: Linear(lambda x: x.sum(), (3,)), r"gives shape \(\) for 3 events"),
    (lambda: Blur((1, 4, 4), torch.ones(0, 2)), r"a kernel \(0, 2\) does not fit"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_no_measurement_is_refused(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_one_shared_variance_is_written_out_where_products_would_need_a_system() -> None:
    """A blur's S is not diagonal: one decomposition for the batch. That of pooled blocks is: products stay cheap."""
    shape = (1, 4, 6)
    for A, kind in ((Blur(shape, torch.tensor([[0.25, 0.5], [0.15, 0.1]])), Dense), (Pooling(shape, 2), Implicit)):
        seen = Measurement(A, normal(*A.measured_shape, seed=5), 0.1)
        mean, C = condition(seen, torch.zeros(3, *shape, dtype=torch.float64), Isotropic(0.5, shape))
        assert isinstance(C, kind)
        M = A.matrix()
        K = torch.linalg.solve(0.5 * M @ M.mT + 0.01 * torch.eye(len(M), dtype=torch.float64), 0.5 * M).mT
        want = 0.5 * torch.eye(24, dtype=torch.float64) - 0.5 * K @ M
        assert torch.allclose(C.dense()[0], want, atol=1e-9)
        assert torch.allclose(mean.flatten(1), (K @ seen.y.flatten())[None].expand(3, -1), atol=1e-5)


def test_rows_that_repeat_each_other_are_solved_in_float64() -> None:
    """7 times the same row, noise 1e-4, float32 states: S has condition 3e9."""
    M, basis = torch.ones(7, 3), PixelBasis((3,))
    seen = Measurement(Matrix(M), torch.full((7,), 3.0), 1e-4)
    mean, C = condition(seen, torch.zeros(2, 3), BasisDiagonal(basis, torch.tensor([[1.0, 2.0, 3.0]])))
    assert mean.dtype == C.diagonal().dtype == torch.float32
    assert torch.allclose(mean, torch.tensor([0.5, 1.0, 1.5]).expand(2, 3), atol=1e-4)
    with pytest.raises(ValueError, match="rows of A repeat each other; give a larger noise_std"):
        condition(
            Measurement(Matrix(M), torch.ones(7), 1e-30), torch.zeros(1, 3), BasisDiagonal(basis, torch.ones(1, 3))
        )
