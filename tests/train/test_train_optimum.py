"""Bounds of the optimal loss around the optimum of a Gaussian, where it is known."""

from __future__ import annotations

import torch

from lowvar.calibrate import fit_twin
from lowvar.process import CosineVP, Independent
from lowvar.train.optimum import linear_high, memorising_low

SCHEDULE = CosineVP()


def test_bounds_enclose_the_optimum_of_a_gaussian() -> None:
    """x_0 ~ N(0, diag(1, 1/4)): 40 data sets of 50 training images, mean of the bounds against the exact mmse."""
    c = torch.tensor([1.0, 0.25], dtype=torch.float64)
    for t in (0.3, 0.7):
        level = SCHEDULE.at(t)
        optimum = float((c * level.sigma**2 / (level.alpha**2 * c + level.sigma**2)).mean())
        lows, highs = [], []
        for seed in range(40):
            x = c.sqrt() * Independent(seed).normal(range(100), (2,), dtype=torch.float64)
            train, held_out = x[:50], x[50:]
            image = torch.arange(200) % 50
            eps = Independent(seed).normal(range(200), (2,), draw=1, dtype=torch.float64)
            here = SCHEDULE.at(torch.full((200,), t, dtype=torch.float64))
            lows.append(memorising_low(train, image, eps, here).mean())
            highs.append(linear_high(fit_twin([train]), held_out, level))
        low, high = torch.stack(lows), torch.stack(highs)
        assert float(low.mean() - 3 * low.std() / 40**0.5) < optimum
        assert float(high.mean() + 3 * high.std() / 40**0.5) > optimum
        if t == 0.3:  # with little noise the memorised images are far apart: strictly below
            assert float(low.mean() + 3 * low.std() / 40**0.5) < optimum


def test_linear_high_is_the_twin_on_its_own_images() -> None:
    x = Independent(1).normal(range(30), (4,), dtype=torch.float64)
    twin, level = fit_twin([x]), SCHEDULE.at(0.4)
    torch.testing.assert_close(linear_high(twin, x, level), twin.mmse(level), rtol=1e-10, atol=0)
