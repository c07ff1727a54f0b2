"""Variances of reverse steps: exact ratios and costs on a Gaussian, and wrong ones told by how much."""

from __future__ import annotations

import pytest
import torch

from lowvar.process import CosineVP, Independent, ReverseKernel
from lowvar.process.covariance import BasisDiagonal, Isotropic
from lowvar.process.grid import trailing
from lowvar.process.kernel import step_coefficients
from lowvar.profile.reverse import ReverseVariance, checked, lost, step_rows
from lowvar.testing import anisotropic_gaussian

torch.set_num_threads(1)

TARGET = anisotropic_gaussian((5,), 30.0)
DENOISER = TARGET.twin.denoiser(CosineVP())
GRID = trailing(CosineVP(), 5)
X = TARGET.twin.sample(Independent(3).normal(range(1024), (5,), dtype=torch.float64))


def scaled(factor: float):  # type: ignore[no-untyped-def]
    """The exact covariance times a factor."""

    def covariance(x, level, posterior):  # type: ignore[no-untyped-def]
        C = posterior.covariance
        return BasisDiagonal(C.basis, factor * C.variance)

    return covariance


def test_ratios_and_costs_are_the_closed_ones() -> None:
    """small, large, an isotropic number and C itself: within 5 standard errors of the spectrum's formulas."""
    numbers = {"isotropic": lambda x, level, p: Isotropic(p.covariance.trace() / 5, (5,))}
    made = [
        ReverseVariance("small", ReverseKernel(1.0, "small")),
        ReverseVariance("large", ReverseKernel(1.0, "large")),
        ReverseVariance("isotropic", ReverseKernel(0.7), numbers["isotropic"]),
        ReverseVariance("exact", ReverseKernel(1.0)),
    ]
    parts = list(step_rows(DENOISER, made, GRID, X.split(256), Independent(4)))
    found = checked(DENOISER, GRID, {v.name: [p[v.name] for p in parts] for v in made})
    points = DENOISER.schedule.at(GRID)
    assert len(found["small"].logsnr) == 4
    for k in range(4):
        t, s = points[k], points[k + 1]
        C = TARGET.twin.spectrum * t.sigma**2 / (t.alpha**2 * TARGET.twin.spectrum + t.sigma**2)
        for name, eta in (("small", 1.0), ("large", 1.0), ("isotropic", 0.7), ("exact", 1.0)):
            c = step_coefficients(t, s, eta)
            S = {
                "small": c.lambda2.expand(5),
                "large": c.large.expand(5),
                "isotropic": (c.lambda2 + c.kappa2 * C.mean()).expand(5),
                "exact": c.lambda2 + c.kappa2 * C,
            }[name]
            one, need = found[name], c.lambda2 + c.kappa**2 * C
            ratio = float((need / S).mean())
            bits = float((need / S - 1 + torch.log(S / c.lambda2)).mean() / 2 / torch.log(torch.tensor(2.0)))
            assert abs(one.ratio[k].value - ratio) < 5 * one.ratio[k].se + 1e-9, (name, k)
            assert abs(one.bits[k].value - bits) < 5 * one.bits[k].se + 1e-9, (name, k)
    assert found["small"].posterior == ()
    assert found["exact"].total.value < found["isotropic"].total.value


def test_a_head_that_is_four_times_too_large() -> None:
    """Its posterior ratio is a quarter at every step, and it costs bits that the right one does not."""
    made = [ReverseVariance("wrong", ReverseKernel(1.0), scaled(4.0)), ReverseVariance("right", ReverseKernel(1.0))]
    parts = list(step_rows(DENOISER, made, GRID, [X], Independent(4)))
    found = checked(DENOISER, GRID, {v.name: [p[v.name] for p in parts] for v in made})
    assert all(i.low < 0.25 < i.high or abs(i.value - 0.25) < 4 * i.se for i in found["wrong"].posterior)
    paid = lost([p["wrong"] for p in parts], [p["right"] for p in parts])
    assert paid.low > 0
    assert paid.value == pytest.approx(found["wrong"].total.value - found["right"].total.value)
    assert paid.se < (found["wrong"].total.se ** 2 + found["right"].total.se ** 2) ** 0.5


def test_refusals() -> None:
    with pytest.raises(ValueError, match="eta is 0: steps without noise"):
        ReverseVariance("ddim", ReverseKernel(0.0))
    with pytest.raises(ValueError, match="a grid of 1 steps to clean data"):
        next(step_rows(DENOISER, [], torch.tensor([1.0, 0.0]), [X], Independent(0)))
