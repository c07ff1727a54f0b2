"""The noise scale on g = mu + L z, where it is known (oracle 8), with plain and with paired draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowvar.process import Independent
from lowvar.train.noise_scale import NoiseScale, NoiseScaleEstimate, block_moments

P = 6
MU = torch.linspace(0.2, 0.7, P, dtype=torch.float64)
L = torch.tril(torch.ones(P, P, dtype=torch.float64)) * torch.linspace(0.5, 1.5, P, dtype=torch.float64)
V = float((L**2).sum())
SQUARE = float((MU**2).sum())
BATCH = 8
EVEN = 0.6  # of z that a sign change leaves alone


def gradients(seed: int, updates: int, paired: bool) -> Tensor:
    """Gradients of samples, (updates, 8, P); in pairs the odd part of the noise changes its sign."""
    z = Independent(seed).normal(range(updates), (BATCH, P), dtype=torch.float64)
    if paired:
        other = Independent(seed).normal(range(updates), (BATCH, P), draw=1, dtype=torch.float64)
        odd, even = z[:, ::2].repeat_interleave(2, 1).clone(), other[:, ::2].repeat_interleave(2, 1)
        odd[:, 1::2] *= -1
        z = math.sqrt(1 - EVEN**2) * odd + EVEN * even
    return MU + z @ L.T


def blocks(g: Tensor, k: int = 2) -> Tensor:
    """Block means (updates, k, P) of contiguous samples: pairs are not cut."""
    return g.reshape(len(g), k, BATCH // k, P).mean(2)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_moments_are_unbiased(k: int, paired: bool) -> None:
    """4,000 updates: both moments within 3 standard errors; pairs have the effective V, 2 EVEN^2 V."""
    found = torch.tensor([block_moments(b, BATCH // k) for b in blocks(gradients(1, 4_000, paired), k)])
    truth = torch.tensor([SQUARE, V * (2 * EVEN**2 if paired else 1)])
    z = (found.double().mean(0) - truth) / (found.double().std(0) / 4_000**0.5)
    assert float(z.abs().max()) < 3


def test_formula_that_counts_samples_is_wrong_with_pairs() -> None:
    """Within-batch variances of samples miss the pairs' correlation; the square of a mean holds V / B as well."""
    g = gradients(2, 4000, paired=True)
    sample_variance = float(g.var(1).sum(1).mean())
    assert sample_variance > 1.2 * V * 2 * EVEN**2  # what blocks rightly find
    mean = g.mean(1)
    naive_square = float((mean**2).sum(1).mean())
    effective = V * 2 * EVEN**2 / BATCH
    assert naive_square == pytest.approx(SQUARE + effective, rel=0.05)
    assert naive_square > 1.5 * SQUARE
    cut = g[:, [0, 2, 4, 6, 1, 3, 5, 7]]  # blocks that cut the pairs: dependent, and far off
    wrong = torch.tensor([block_moments(b, 4) for b in blocks(cut)]).double().mean(0)
    assert abs(float(wrong[0]) - SQUARE) > 0.5 * SQUARE


@pytest.mark.parametrize("paired", [False, True])
def test_coverage_of_the_ratio(paired: bool) -> None:
    """1,000 windows of 400 equally weighted updates: 95% within 3 standard errors (2.1%)."""
    R, n, G = 1000, 400, 16
    truth = V * (2 * EVEN**2 if paired else 1) / SQUARE
    g = blocks(gradients(3, R * n, paired))
    whole, each = (g.sum(1) ** 2).sum(1), (g**2).sum((1, 2))
    square, variance = (whole - each) / 2, 4 * (each - whole / 2)
    parts = torch.stack([square, variance, torch.ones_like(square)], 1).reshape(R, n // G, G, 3).sum(1)
    found = [NoiseScale(BATCH, sums=sums, updates=n).estimate() for sums in parts]
    inside = sum(f.low < truth < f.high for f in found) / R
    assert abs(inside - 0.95) < 0.021
    logs = torch.tensor([math.log(f.value) for f in found])
    assert abs(float(logs.mean()) - math.log(truth)) < 0.3 * float(logs.std())


def test_online_equals_the_sums_and_decays() -> None:
    g = blocks(gradients(4, 64, paired=False))
    scale = NoiseScale(BATCH, decay=0.9, groups=4, run=2)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for u in range(64):
        scale = scale.updated(list(g[u]))
        expected *= 0.9
        expected[(u // 2) % 4] += torch.tensor([*block_moments(g[u], 4), 1.0], dtype=torch.float64)
    torch.testing.assert_close(scale.sums, expected, rtol=1e-12, atol=1e-12)
    back = NoiseScale(BATCH, decay=0.9, groups=4, run=2).restored(scale.state())
    assert back.updated(g[0]).estimate() == scale.updated(g[0]).estimate()


def test_no_signal_has_no_upper_end() -> None:
    scale = NoiseScale(BATCH)
    for row in blocks(gradients(5, 64, paired=False) - MU):
        scale = scale.updated(row)
    found = scale.estimate()
    assert found.high == math.inf
    assert found.low > BATCH
    assert "cannot be bounded yet" in found.advice


def test_advice_sides() -> None:
    for batch, word in ((64, "below"), (400, "at"), (4096, "above")):
        assert f"is {word} the noise scale" in NoiseScaleEstimate(400.0, 320.0, 500.0, 1.0, 400.0, batch).advice


def test_gradients_that_are_not_finite_are_left_out() -> None:
    scale = NoiseScale(BATCH)
    assert scale.updated(torch.tensor([[1.0], [math.nan]])) is scale


def test_noise_scale_refuses() -> None:
    with pytest.raises(ValueError, match="at least 2 independent blocks"):
        NoiseScale(BATCH).updated(torch.ones(1, 3))
    with pytest.raises(ValueError, match="of one size"):
        NoiseScale(BATCH).updated(torch.ones(3, 3))
    with pytest.raises(ValueError, match="train for 16 updates"):
        NoiseScale(BATCH).estimate()
    with pytest.raises(ValueError, match="decay 1"):
        NoiseScale(BATCH, decay=1)
