"""The fitted mixture twin: what it is for (denoising images it has not seen), and who says what belongs together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import fit_mixture, fit_twin
from lowvar.calibrate.mixture import SHARES, _Whitened, denoising_ratio  # pyright: ignore[reportPrivateUsage]
from lowvar.process.basis import MatrixBasis
from lowvar.process.mixture import MixtureTwin
from lowvar.process.noise import Independent
from lowvar.process.twin import GaussianTwin

WEIGHT = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
SCALE = torch.tensor([0.01, 0.2, 5.0], dtype=torch.float64)


def _scales(n: int, d: int) -> Tensor:
    """Rows of one Gaussian shape at three scales."""
    u = Independent(1).uniform(range(n), (), dtype=torch.float64)
    k = torch.searchsorted(WEIGHT.cumsum(0), u, right=True).clamp(max=2)
    shape = torch.linspace(2.0, 0.2, d, dtype=torch.float64)
    return (SCALE[k, None] * shape).sqrt() * Independent(2).normal(range(n), (d,), dtype=torch.float64)


def test_denoises_nearly_as_the_law_itself() -> None:
    """A scale mixture in 24 dimensions, 1,000 rows: within 3% of the law's own denoising error."""
    d = 24
    x = _scales(1500, d)
    twin = fit_twin([x[:1000]], "pca")
    found = fit_mixture([x[:1000]], [x[1000:]], twin)
    spectrum = SCALE[:, None] * torch.linspace(2.0, 0.2, d, dtype=torch.float64)
    law = MixtureTwin(WEIGHT, torch.zeros(3, d), spectrum, MatrixBasis(torch.eye(d), (d,)))
    fresh = _scales(3000, d)[1500:]
    assert denoising_ratio(law, fresh, twin) < 0.77
    assert denoising_ratio(found, fresh, twin) < 1.03 * denoising_ratio(law, fresh, twin)


def test_gaussian_data_keep_the_gaussian_twin() -> None:
    x = Independent(3).normal(range(600), (6,), dtype=torch.float64)
    twin = fit_twin([x[:400]], "pca")
    assert fit_mixture([x[:400]], [x[400:]], twin).components == 1


def test_one_component_is_the_gaussian_twin() -> None:
    x = _scales(500, 5)
    twin = fit_twin([x], "pca")
    whitened = _Whitened.of(twin)
    one, gaussian = whitened.fitted(whitened.rows(x), 1, 1.0, (1.0,), 0), MixtureTwin.of(twin)
    torch.testing.assert_close(one.spectrum, gaussian.spectrum, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.mean, gaussian.mean, rtol=0, atol=1e-6)


def _grain(n: int) -> Tensor:
    """Four clusters in two large directions; 40 small ones whose size says nothing of the cluster."""
    u = Independent(5).uniform(range(n), (2,), dtype=torch.float64)
    corner = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)[(4 * u[:, 0]).long()]
    z = Independent(6).normal(range(n), (42,), dtype=torch.float64)
    size = torch.where(u[:, 1] < 0.5, 0.003, 0.03)[:, None]
    return torch.cat([corner + 0.3 * z[:, :2], size * z[:, 2:]], 1)


def test_leading_directions_say_who_belongs_together() -> None:
    """With all directions four components split by the grain's size; with the leading two they find the clusters."""
    x = _grain(2000)
    twin = fit_twin([x[:1500]], "pca")
    whitened = _Whitened.of(twin)
    rows = whitened.rows(x[:1500])
    assert [whitened.leading(s) for s in (*SHARES, 0.5)] == [2, 42, 1]
    leading, every = (whitened.fitted(rows, 4, s, (1.0,), 3) for s in (0.98, 1.0))
    error = torch.cdist(twin.basis.inverse(leading.mean)[:, :2].abs(), torch.ones(1, 2, dtype=torch.float64))
    assert float(error.max()) < 0.1
    at_large = [denoising_ratio(m, x[1500:], twin) for m in (leading, every)]
    assert at_large[0] < at_large[1] - 0.05


def test_directions_are_ordered_by_their_variance() -> None:
    """A basis whose leading direction is not the first: the mixture has its means and variances in its own order."""
    x = _grain(800).flip(1)
    plain = fit_twin([x], "pca")
    assert isinstance(plain.basis, MatrixBasis)
    backwards = MatrixBasis(plain.basis.directions.flip(1), (42,))
    flipped = GaussianTwin(plain.mean, backwards, plain.spectrum.flip(0))
    one, other = (fit_mixture([x[:600]], [x[600:]], t, (4,)) for t in (plain, flipped))
    torch.testing.assert_close(other.mean.flip(1), one.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.spectrum.flip(1), one.spectrum, rtol=1e-4, atol=1e-9)


def test_the_seed_decides_and_few_images_limit_the_components() -> None:
    x = _grain(300)
    twin = fit_twin([x[:200]], "pca")
    one, same = (fit_mixture([x[:200]], [x[200:]], twin, (4, 10, 30), seed=2) for _ in range(2))
    assert torch.equal(one.mean, same.mean)
    assert torch.equal(one.weight, same.weight)
    assert fit_mixture([x[:70]], [x[200:]], twin, (4, 10)).components == 1  # 70 / 20 < 4


def test_a_direction_without_variance_stays_without() -> None:
    x = torch.cat([_grain(600), torch.full((600, 1), 0.25, dtype=torch.float64)], 1)
    twin = fit_twin([x[:400]], "pca")
    found = fit_mixture([x[:400]], [x[400:]], twin, (4,))
    assert found.components > 1
    drawn = found.sample(Independent(8).uniform(range(50), ()), Independent(9).normal(range(50), (43,)))
    torch.testing.assert_close(drawn[:, -1], torch.full((50,), 0.25), rtol=0, atol=1e-5)


def test_no_images_are_refused() -> None:
    twin = fit_twin([_grain(100)], "pca")
    with pytest.raises(ValueError, match="no images"):
        fit_mixture([], [], twin)
