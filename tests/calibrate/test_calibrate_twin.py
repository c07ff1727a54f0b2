"""Fitting the Gaussian twin: one streaming pass equals the direct moments, in any split into batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import fit_twin
from lowvar.process import CosineVP, DCTBasis, Independent
from lowvar.testing import anisotropic_gaussian


def events(n: int = 200, shape: tuple[int, ...] = (2, 3, 4)) -> Tensor:
    target = anisotropic_gaussian(shape, ratio=1e4, seed=3)
    return (
        target.sample(range(n), Independent(1)).double() + 1e3
    )  # a mean far from 0: naive sums of squares lose digits


def dense(x: Tensor) -> Tensor:
    centred = (x - x.mean(0)).flatten(1)
    return centred.T @ centred / len(x)


@pytest.mark.parametrize("size", [1, 7, 200])
def test_pca_twin_equals_direct_moments(size: int) -> None:
    x = events()
    twin = fit_twin(iter(x.split(size)), "pca")
    B, c = twin.basis.matrix(), twin.spectrum.flatten()
    torch.testing.assert_close(twin.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(B @ torch.diag(c) @ B.T, dense(x), rtol=0, atol=1e-9)
    assert bool((c.diff() <= 1e-12).all()), "directions are ordered by variance"


@pytest.mark.parametrize("size", [1, 13, 200])
def test_dct_twin_keeps_the_diagonal(size: int) -> None:
    x = events()
    twin = fit_twin(x.split(size), "dct")
    basis = DCTBasis(x.shape[1:])
    B = basis.matrix()
    expected = torch.diagonal(B.T @ dense(x) @ B).reshape(x.shape[1:])
    torch.testing.assert_close(twin.spectrum, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(twin.mean, x.mean(0), rtol=1e-12, atol=0)


def test_linear_denoiser_identity_on_any_data() -> None:
    """E ||x0 - D_lin||^2 is the twin's mmse for the very data it was fitted to, whatever their law.

    The error is quadratic in the noise, so the 2 d points +-sqrt(d) e_i integrate it exactly.
    """
    x = torch.sign(events(64, (5,)) - 1e3)  # binary data, nothing Gaussian about them
    twin = fit_twin([x], "pca")
    level = CosineVP().at(0.6)
    eye = torch.eye(5, dtype=torch.float64) * 5**0.5  # +-sqrt(d) e_i: mean 0, covariance I
    errors = []
    for eps in (*eye, *-eye):
        state = level.alpha * x + level.sigma * eps
        errors.append((twin.posterior(state, level).mean - x).pow(2).mean())
    torch.testing.assert_close(torch.stack(errors).mean(), twin.mmse(level), rtol=1e-10, atol=0)


def test_auto_takes_the_dct_above_the_limit() -> None:
    x = torch.zeros(3, 1, 33, 33)
    x[1] += 1
    assert fit_twin([x]).basis.name == "dct"
    assert fit_twin([x[:, :, :8, :8]]).basis.name == "pca"


@pytest.mark.parametrize(
    ("batches", "basis", "words"), [([], "auto", "two events"), ([torch.zeros(1, 2)], "pca", "two")]
)
def test_too_few_events(batches: list[Tensor], basis: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_twin(batches, basis)  # pyright: ignore[reportArgumentType]


def test_unknown_basis_names_the_allowed() -> None:
    with pytest.raises(ValueError, match="auto, pca, dct"):
        fit_twin([torch.zeros(3, 2)], "wavelet")  # pyright: ignore[reportArgumentType]
