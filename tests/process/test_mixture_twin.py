"""The mixture twin: its denoiser against the exact posterior of a mixture, and a Gaussian as one component."""

from __future__ import annotations

import pytest
import torch

from lowvar.process.basis import MatrixBasis, PixelBasis
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, Schedule
from lowvar.process.twin import GaussianTwin
from lowvar.testing import rotation
from lowvar.testing.mixture import MixtureTarget

D, K = 5, 3
BASIS = MatrixBasis(rotation(D, 3), (D,))
WEIGHT = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
MEAN = 2 * Independent(1).normal(range(K), (D,), dtype=torch.float64)
SPECTRUM = torch.exp(Independent(2).normal(range(K), (D,), dtype=torch.float64) - 2)
TWIN = MixtureTwin(WEIGHT, MEAN, SPECTRUM, BASIS)


def target() -> MixtureTarget:
    B = BASIS.matrix()
    return MixtureTarget(WEIGHT, MEAN @ B.T, torch.stack([B @ torch.diag(c) @ B.T for c in SPECTRUM]))


@pytest.mark.parametrize("schedule", [CosineVP(), VE(), Flow(shift=3.0)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [1.0, 0.7, 0.2, 0.004])
def test_denoiser_is_the_exact_posterior_mean(schedule: Schedule, t: float) -> None:
    level = schedule.at(t)
    x = target().noisy(range(40), level).double()
    exact = target().posterior(x, level, None).mean
    torch.testing.assert_close(TWIN.posterior(x, level).mean, exact, rtol=0, atol=1e-9)


def test_float32_keeps_four_digits_at_high_snr() -> None:
    narrow = MixtureTwin(WEIGHT, MEAN, 1e-4 * SPECTRUM, BASIS)
    level = CosineVP().at(0.004)
    x = BASIS.inverse(MEAN) + 0.01 * Independent(4).normal(range(K), (D,), dtype=torch.float64)
    wide = narrow.posterior(x, level).mean
    torch.testing.assert_close(narrow.posterior(x.float(), level).mean.double(), wide, rtol=0, atol=1e-4)


def test_one_component_is_the_gaussian_twin() -> None:
    gaussian = GaussianTwin(BASIS.inverse(MEAN[:1])[0], BASIS, SPECTRUM[0])
    level = CosineVP().at(0.4)
    x = Independent(5).normal(range(7), (D,), dtype=torch.float64)
    mixture = MixtureTwin.of(gaussian)
    torch.testing.assert_close(mixture.posterior(x, level).mean, gaussian.posterior(x, level).mean)
    torch.testing.assert_close(mixture.gaussian.spectrum, gaussian.spectrum)


def test_moments_are_those_of_its_samples() -> None:
    n = 40_000
    u = Independent(6).uniform(range(n), (1,), dtype=torch.float64)[:, 0]
    x = TWIN.sample(u, Independent(7).normal(range(n), (D,), dtype=torch.float64))
    y = BASIS.forward(x)
    torch.testing.assert_close(y.mean(0), TWIN.centre, rtol=0, atol=5 * float(y.std(0).max()) / n**0.5)
    torch.testing.assert_close(y.var(0), TWIN.gaussian.spectrum, rtol=0.04, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="positive weight"):
        MixtureTwin(torch.tensor([1.0, 0.0]), MEAN[:2], SPECTRUM[:2], BASIS)
    with pytest.raises(ValueError, match="negative variances"):
        MixtureTwin(WEIGHT, MEAN, -SPECTRUM, BASIS)
    with pytest.raises(ValueError, match="do not fit"):
        MixtureTwin(WEIGHT, MEAN, SPECTRUM, PixelBasis((4,)))
