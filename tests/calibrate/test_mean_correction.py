"""The correction of a mean: closed forms, an exact denoiser that it leaves alone, and where it is used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import fit_mean
from lowvar.process.basis import MatrixBasis
from lowvar.process.corrected import CorrectedDenoiser, MeanCorrection
from lowvar.process.denoiser import Denoiser
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent
from lowvar.process.path import spread_groups
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import CosineVP, Flow, Level, Schedule
from lowvar.process.twin import GaussianTwin
from lowvar.testing import rotation
from lowvar.testing.mixture import MixtureTarget

D = 6
BASIS = MatrixBasis(rotation(D, 5), (D,))
SPECTRUM = torch.tensor([4.0, 3.9, 0.5, 0.5, 0.02, 0.02], dtype=torch.float64)
MEAN = torch.linspace(-0.4, 0.8, D, dtype=torch.float64)
TWIN = GaussianTwin(MEAN, BASIS, SPECTRUM)
LOGSNR = torch.tensor([-5.0, -1.0, 1.0, 4.0], dtype=torch.float64)


class _Scaled(Denoiser):
    """D + g r + s z: a denoiser's remainder times g along each direction, with an error of its own."""

    def __init__(self, denoiser: Denoiser, twin: MixtureTwin, factor: float | Tensor, error: float = 0.0) -> None:
        self.inner, self.twin, self.factor, self.error = denoiser, twin, factor, error
        self.schedule = denoiser.schedule

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        basis = self.twin.basis
        control = self.twin.denoise(basis.forward(x), level)
        r = basis.forward(self.inner(x, level).mean) - control
        z = Independent(99).normal(range(len(x)), x.shape[1:], draw=int(1000 * float(level.t)), dtype=x.dtype)
        return Posterior(basis.inverse(control + self.factor * r + self.error * z))


def _mixture() -> MixtureTarget:
    means = torch.tensor([[2.0, 0, 0, 0.5, 0, 0], [-1.5, 1.0, 0.4, 0, 0.1, 0]], dtype=torch.float64)
    spectra = torch.stack([SPECTRUM, SPECTRUM.flip(0)]) * 0.3
    B = BASIS.matrix()
    return MixtureTarget(
        torch.tensor([0.4, 0.6], dtype=torch.float64), means @ B.T, torch.stack([B @ c.diag() @ B.T for c in spectra])
    )


def _rough(target: MixtureTarget) -> MixtureTwin:
    """A Gaussian control variate of the mixture, in the basis of the tests."""
    x = target.sample(range(2000), Independent(3))
    y = BASIS.forward(x)
    return MixtureTwin.of(GaussianTwin(BASIS.inverse(y.mean(0)[None])[0], BASIS, y.var(0)))


@pytest.mark.parametrize("schedule", [CosineVP(), Flow(shift=2.0)], ids=["cosine", "flow"])
def test_coefficient_of_a_wrong_linear_denoiser_is_the_closed_form(schedule: Schedule) -> None:
    """Target N(m, c), twin with 0.3 c, network with 4 c: r and x_0 - D are linear, a = (g - g_twin) / (g_net - g_twin).

    Centred, so that a does not depend on the mean. The corrected denoiser is then the exact one.
    """
    law, twin, net = (GaussianTwin(MEAN, BASIS, k * SPECTRUM) for k in (1.0, 0.3, 4.0))
    mixture, level = MixtureTwin.of(twin), schedule.level(LOGSNR)
    data = law.sample(Independent(1).normal(range(3000), (D,), dtype=torch.float64))
    fit = fit_mean(net.denoiser(schedule), twin, data.split(700), level, Independent(2), replicates=2)
    groups = spread_groups(mixture.within)
    for k in range(len(level)):
        alpha2, sigma2 = level.alpha[k] ** 2, level.sigma[k] ** 2
        g, g_twin, g_net = (alpha2 * c / (alpha2 * c + sigma2) for c in (SPECTRUM, 0.3 * SPECTRUM, 4 * SPECTRUM))
        v = alpha2 * SPECTRUM + sigma2
        for group in range(int(groups.max()) + 1):
            m = groups == group
            if not bool(m.any()):
                continue
            weight = (g_net - g_twin) * v
            expected = float((weight * (g - g_twin))[m].sum() / (weight * (g_net - g_twin))[m].sum())
            z = (float(fit.raw[k, group]) - expected) / float(fit.se[k, group])
            assert abs(z) < 4, (k, group, z)
    x = law.sample(Independent(7).normal(range(500), (D,), dtype=torch.float64))
    x = level[1].alpha * x + level[1].sigma * Independent(8).normal(range(500), (D,), dtype=torch.float64)
    exact, plain = law.posterior(x, level[1]).mean, net.posterior(x, level[1]).mean
    corrected = CorrectedDenoiser(net.denoiser(schedule), fit.correction)(x, level[1]).mean
    assert float((corrected - exact).square().mean()) < 0.02 * float((plain - exact).square().mean())


def test_exact_mixture_posterior_is_left_alone() -> None:
    """E u = E q: the raw coefficients are 1 within 4 se, and the correction moves the mean by less than 1% of mmse."""
    target, schedule = _mixture(), CosineVP()
    twin, level = _rough(target), schedule.level(torch.linspace(-6, 6, 9, dtype=torch.float64))
    data, exact = target.sample(range(2000), Independent(11)), target.denoiser(schedule, None)
    fit = fit_mean(exact, twin, data.split(500), level, Independent(12), replicates=2)
    z = (fit.raw - 1) / fit.se.clamp_min(1e-12)
    assert float(z.abs().max()) < 4
    assert float(fit.used.double().mean()) < 0.1
    corrected = CorrectedDenoiser(exact, fit.correction)
    fresh = target.sample(range(2000), Independent(13))
    for k in range(len(level)):
        eps = Independent(14).normal(range(2000), (D,), draw=k, dtype=torch.float64)
        x = level.alpha[k] * fresh + level.sigma[k] * eps
        mean = exact(x, level[k]).mean
        moved = float((corrected(x, level[k]).mean - mean).square().mean())
        assert moved < 0.01 * float((fresh - mean).square().mean())


def test_scaled_remainder_has_the_inverse_coefficient() -> None:
    """a of D + g r is a of D + r over g: an identity on the same draws, 1e-9. Above 1 it is taken as 1."""
    target, schedule = _mixture(), CosineVP()
    twin, level = _rough(target), schedule.level(LOGSNR)
    data, exact = target.sample(range(400), Independent(21)), target.denoiser(schedule, None)
    one, five, half = (fit_mean(_Scaled(exact, twin, g), twin, [data], level, Independent(22)) for g in (1.0, 5.0, 0.5))
    torch.testing.assert_close(5 * five.raw, one.raw, rtol=1e-9, atol=0)
    torch.testing.assert_close(0.5 * half.raw, one.raw, rtol=1e-9, atol=0)
    assert bool((half.correction.coefficient <= 1).all())
    assert not half.used.any()
    assert bool(five.used[1].any())


def test_a_network_of_pure_error_gives_way_to_the_twin() -> None:
    schedule, twin = CosineVP(), MixtureTwin.of(TWIN)
    level = schedule.level(LOGSNR)
    data = TWIN.sample(Independent(31).normal(range(600), (D,), dtype=torch.float64))
    noisy = _Scaled(TWIN.denoiser(schedule), twin, 0.0, error=2.0)
    fit = fit_mean(noisy, twin, data.split(600), level, Independent(32))
    assert bool(fit.used.all())
    assert float(fit.correction.coefficient.max()) < 0.1
    x = Independent(33).normal(range(50), (D,), dtype=torch.float64)
    exact, off = TWIN.posterior(x, level[2]).mean, noisy(x, level[2]).mean
    left = (CorrectedDenoiser(noisy, fit.correction)(x, level[2]).mean - exact).square().mean()
    assert float(left) < 0.01 * float((off - exact).square().mean())


def test_gain_is_the_error_saved_on_the_other_half() -> None:
    """Four images by hand: the a of images 0, 2 scored on 1, 3 and the other way round."""
    law, wide = (GaussianTwin(torch.zeros(1), MatrixBasis(torch.eye(1), (1,)), torch.tensor([c])) for c in (0.5, 4.0))
    schedule, level = CosineVP(), CosineVP().level(torch.tensor([0.0], dtype=torch.float64))
    data = torch.tensor([[0.3], [-1.0], [0.9], [0.2]], dtype=torch.float64)
    fit = fit_mean(wide.denoiser(schedule), law, [data], level, Independent(41))
    x = level.alpha[0] * data + level.sigma[0] * Independent(41).normal(range(4), (1,), dtype=torch.float64)
    control, mean = law.posterior(x, level[0]).mean, wide.posterior(x, level[0]).mean
    r, y = (mean - control)[:, 0], (data - control)[:, 0]
    gains = torch.zeros(4, dtype=torch.float64)
    for one, other in (([0, 2], [1, 3]), ([1, 3], [0, 2])):
        u, q = r[one] * y[one], r[one] ** 2
        a = u.sum() / q.sum()
        se2 = ((u - a * q) ** 2).sum() / q.sum() ** 2
        a = 1 + max(0.0, 1 - float(se2 / (a - 1) ** 2)) * (a.clamp(0, 1) - 1)
        gains[other] = (y[other] - r[other]) ** 2 - (y[other] - a * r[other]) ** 2
    assert float(fit.gain) == pytest.approx(float(gains.mean()), rel=1e-9)
    assert float(fit.gain_se) == pytest.approx(float(gains.std() / 2), rel=1e-9)


def test_levels_of_single_samples_clipping_and_ends() -> None:
    schedule, twin = CosineVP(), MixtureTwin.of(TWIN)
    groups = int(spread_groups(twin.within).max()) + 1
    coefficient = torch.linspace(0, 1, 3, dtype=torch.float64)[:, None].expand(3, groups)
    knots = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)
    correction = MeanCorrection(twin, knots, coefficient)
    for logsnr, a in ((-7.0, 0.0), (-1.0, 0.25), (0.5, 0.75), (1.0, 1.0), (9.0, 1.0), (float("-inf"), 0.0)):
        assert float(correction.at(logsnr)[0]) == pytest.approx(a)
    x = Independent(51).normal(range(3), (D,), dtype=torch.float64)
    network = GaussianTwin(MEAN + 1, BASIS, 2 * SPECTRUM).denoiser(schedule)
    levels = schedule.level(torch.tensor([-1.0, 3.0, -1.0], dtype=torch.float64))
    corrected = CorrectedDenoiser(network, correction)
    rows = torch.cat([corrected(x[i : i + 1], levels[i]).mean for i in range(3)])
    torch.testing.assert_close(corrected(x, levels).mean, rows, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[1], network(x[1:2], levels[1]).mean[0])
    control = TWIN.posterior(x, levels[0]).mean
    expected = control + 0.25 * (network(x, levels[0]).mean - control)
    torch.testing.assert_close(rows[0], expected[0], rtol=0, atol=1e-12)
    clipped = CorrectedDenoiser(network, dataclasses.replace(correction, clip=0.1))(x, levels[0]).mean
    torch.testing.assert_close(clipped, expected.clamp(-0.1, 0.1))
    with pytest.raises(ValueError, match="increase"):
        MeanCorrection(twin, knots.flip(0), coefficient)
    with pytest.raises(ValueError, match="groups"):
        MeanCorrection(twin, knots, coefficient[:, :1])


def test_refuses_too_few_images_and_replicates() -> None:
    schedule = CosineVP()
    level, noise = schedule.level(LOGSNR), Independent(0)
    with pytest.raises(ValueError, match="at least 4 images"):
        fit_mean(TWIN.denoiser(schedule), TWIN, [torch.zeros(3, D)], level, noise)
    with pytest.raises(ValueError, match="replicates is 0"):
        fit_mean(TWIN.denoiser(schedule), TWIN, [torch.zeros(9, D)], level, noise, 0)
