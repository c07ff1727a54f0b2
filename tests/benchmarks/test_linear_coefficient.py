"""The trial of the twin's coefficient: its plans are the package's at 0 and 1, and beta is 1 where theory says so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from linear_coefficient import Coefficient, WithCoefficient, level_beta  # type: ignore[import-not-found]

from lowvar.process import CosineVP, Independent, MultistepSolver
from lowvar.process.grid import trailing
from lowvar.process.path import PathMoments
from lowvar.sample import generate
from lowvar.testing import anisotropic_gaussian, mixture8

SCHEDULE = CosineVP()


@pytest.mark.parametrize(("q", "c", "decay"), [(1, 0, 0.0), (2, 2, 0.0), (2, 2, 0.5), (3, 3, 0.0)])
def test_coefficient_1_is_the_twin_and_0_is_none(q: int, c: int, decay: float) -> None:
    target = mixture8()
    grid, d = trailing(SCHEDULE, 5), target.d
    denoiser = target.denoiser(SCHEDULE)
    for value, decays in ((1.0, decay), (0.0, 0.0)):
        base = MultistepSolver(target.twin, q, c, decay=decays)
        wanted = MultistepSolver(target.twin if value else None, q, c, decay=decays)
        made = WithCoefficient(base, Coefficient.constant(value, d))
        a, b = (generate(denoiser, s, grid, (d,), 16, dtype=torch.float64) for s in (made, wanted))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_beta_is_1_for_the_exact_posterior_whatever_the_law() -> None:
    """On a Gaussian to rounding; on a mixture within its sampling error (4 noises of 4,096 draws, groups of one)."""
    gaussian = anisotropic_gaussian((4,), ratio=10.0)
    data = gaussian.sample(range(64), Independent(1))
    found = level_beta(gaussian.denoiser(SCHEDULE), gaussian.twin, data, knots=5)
    torch.testing.assert_close(found.value, torch.ones_like(found.value), rtol=0, atol=1e-9)
    mixture = mixture8()
    found = level_beta(mixture.denoiser(SCHEDULE), mixture.twin, mixture.sample(range(4096), Independent(1)), knots=5)
    assert float((found.value - 1).abs().max()) < 0.08


def test_a_constant_remainder_has_kappa_1() -> None:
    target = mixture8()
    logsnr = torch.linspace(-9.3, 9.3, 5, dtype=torch.float64)
    groups = len(torch.unique(target.twin.spectrum.double()))
    paths = PathMoments(logsnr, torch.ones(groups, 5, 5).double(), torch.ones(groups), torch.ones(groups))
    base, one = MultistepSolver(target.twin, 1, 0), Coefficient.constant(1.0, target.d)
    grid = trailing(SCHEDULE, 4)
    a, b = (
        generate(
            target.denoiser(SCHEDULE), WithCoefficient(base, one, kappa), grid, (target.d,), 8, dtype=torch.float64
        )
        for kappa in (paths, None)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
