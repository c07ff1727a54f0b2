"""Shrinkage of a mixture's variances at their own scale: exact on scale mixtures, where the fit prefers it."""

from __future__ import annotations

import torch

from lowvar.calibrate.mixture import _pooled, denoising_ratio, fit_mixture  # pyright: ignore[reportPrivateUsage]
from lowvar.calibrate.twin import fit_twin
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent

SHAPE = torch.tensor([3.0, 1.0, 0.5, 0.1], dtype=torch.float64)
SCALE = torch.tensor([0.01, 0.2, 5.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def test_pooled_variances_are_those_of_a_scale_mixture() -> None:
    """v_k = s_k q: what each component is shrunk towards is itself. The plain mean is far from the smallest."""
    variance = SCALE[:, None] * SHAPE
    torch.testing.assert_close(_pooled(WEIGHT, variance, True), variance, rtol=1e-9, atol=0)
    plain = _pooled(WEIGHT, variance, False)
    torch.testing.assert_close(plain, (WEIGHT * SCALE).sum() * SHAPE)
    assert float(plain[0] / variance[0, 0]) > 100


def test_equal_scales_pool_to_the_mean() -> None:
    variance = torch.stack([SHAPE, SHAPE.flip(0)])
    even = torch.tensor([0.5, 0.5], dtype=torch.float64)
    scaled = _pooled(even, variance / variance.mean(0).mean(), True)
    torch.testing.assert_close(scaled[0], scaled[1], rtol=1e-6, atol=0)


def test_fit_finds_the_scales() -> None:
    """Three scales of one Gaussian: the smallest is found within a factor 2, and denoising is near the true law's."""
    d, n = 24, 1500
    u, z = Independent(1).uniform(range(n), (1,))[:, 0], Independent(2).normal(range(n), (d,), dtype=torch.float64)
    k = torch.searchsorted(WEIGHT.cumsum(0), u.double(), right=True).clamp(max=2)
    x = SCALE[k, None].sqrt() * z
    train, held = x[:1000], x[1000:]
    twin = fit_twin([train], "pca")
    found = fit_mixture([train], [held], twin, (3,))
    smallest = float(found.spectrum.mean(1).min())
    assert 0.005 < smallest < 0.02
    law = MixtureTwin(WEIGHT, torch.zeros(3, d), SCALE[:, None].expand(3, d), twin.basis)
    assert denoising_ratio(found, held, twin) < 1.1 * denoising_ratio(law, held, twin)
