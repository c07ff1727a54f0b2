"""Residual moments, the analytic estimate and tables against exact posterior covariances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, CovarianceTable, analytic_variance, calibrate, standardised_residuals
from lowvar.calibrate.grids import calibrated_grid
from lowvar.calibrate.measurement import default_logsnr
from lowvar.calibrate.residual import residual_moments
from lowvar.errors import UserError
from lowvar.process import (
    CosineVP,
    Denoiser,
    DiscreteVP,
    Flow,
    GaussianTwin,
    Independent,
    Level,
    LinearVP,
    MatrixBasis,
    PixelBasis,
    Posterior,
    Schedule,
    schedule_from_diffusers,
)
from lowvar.testing import GaussianTarget, anisotropic_gaussian

N = 4000
LOGSNR = torch.tensor([-6.0, -2.0, 0.0, 2.0, 6.0], dtype=torch.float64)


def gaussian() -> tuple[GaussianTarget, GaussianTwin, Tensor]:
    target = anisotropic_gaussian((1, 2, 3), ratio=50.0, seed=1)
    values, vectors = torch.linalg.eigh(target.covariance)
    twin = GaussianTwin(target.mean, MatrixBasis(vectors, (1, 2, 3)), values.clamp_min(0).reshape(1, 2, 3))
    return target, twin, target.sample(range(N), Independent(4))


@pytest.mark.parametrize("schedule", [CosineVP(), Flow()])
def test_moments_are_the_posterior_variances(schedule: Schedule) -> None:
    """Exact denoiser: tables equal diag C in pixels and along the basis within 4 standard errors, and the standard
    errors themselves are those of a chi-square.
    """
    _, twin, data = gaussian()
    level = schedule.level(LOGSNR)
    moments = residual_moments(twin.denoiser(schedule), data.split(512), level, Independent(9), twin.basis)
    for k in range(len(level)):
        covariance = twin.posterior(data[:1].double(), level[k]).covariance
        assert covariance is not None
        exact = covariance.diagonal()[0]
        assert float(((moments.pixel[k] - exact) / moments.pixel_se[k]).abs().max()) < 4
        assert moments.basis is not None
        assert moments.basis_se is not None
        along = twin.spectrum * level[k].sigma ** 2 / (level[k].alpha ** 2 * twin.spectrum + level[k].sigma ** 2)
        assert float(((moments.basis[k] - along) / moments.basis_se[k]).abs().max()) < 4
        torch.testing.assert_close(moments.basis_se[k], along * (2 / N) ** 0.5, rtol=0.15, atol=0)
        assert abs(float((moments.mmse[k] - twin.mmse(level[k])) / moments.mmse_se[k])) < 4


def test_analytic_variance_of_an_exact_denoiser() -> None:
    """Bao et al. 2022a: tr C / d from the mean square of the predicted noise; 4 standard errors of the noise power."""
    _, twin, data = gaussian()
    schedule = CosineVP()
    level = schedule.level(LOGSNR[1:])
    moments = residual_moments(twin.denoiser(schedule), [data], level, Independent(9))
    estimate = analytic_variance(moments.noise_power, level)
    error = torch.exp(-level.logsnr) * (2 / (N * 6)) ** 0.5
    assert bool(((estimate - twin.mmse(level)).abs() < 4 * error).all())


def test_analytic_variance_is_bounded() -> None:
    level = CosineVP().level(LOGSNR[:2])
    assert analytic_variance(torch.tensor([-1.0, 2.0]), level, bound=1.0).tolist() == [1.0, 0.0]


class _Biased(Denoiser):
    """The exact posterior of a twin, its mean off by a constant."""

    def __init__(self, twin: GaussianTwin, schedule: Schedule, offset: float) -> None:
        self.twin, self.schedule, self.offset = twin, schedule, offset

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        posterior = self.twin.posterior(x, level)
        return replace(posterior, mean=posterior.mean + self.offset)


def test_residuals_include_the_networks_own_error() -> None:
    """A wrong mean raises the table by its square: the calibrated covariance standardises the residuals all the same,
    where the exact posterior covariance does not (the negative of the same check).
    """
    _, twin, data = gaussian()
    schedule = LinearVP()
    wrong = _Biased(twin, schedule, 0.3)
    calibration = calibrate(wrong, lambda: data[: N // 2].split(500), twin_batches=lambda: [data], replicates=1)
    level = schedule.level(torch.linspace(-5, 5, 7, dtype=torch.float64))
    held_out = [data[N // 2 :]]
    for structure in ("isotropic", "pixel", "basis"):
        check = standardised_residuals(calibration.attach(wrong, structure), held_out, level, Independent(5))
        assert bool(((check.value - 1).abs() < 0.1).all()), (structure, check.value)
    uncalibrated = standardised_residuals(wrong, held_out, level, Independent(5))
    assert bool((uncalibrated.value[-3:] > 1.4).all()), uncalibrated.value


def test_batches_do_not_change_the_result() -> None:
    _, twin, data = gaussian()
    schedule = CosineVP()
    level = schedule.level(LOGSNR)
    one, many = (
        residual_moments(twin.denoiser(schedule), data[:100].split(size), level, Independent(2), twin.basis, 2)
        for size in (100, 7)
    )
    torch.testing.assert_close(one.pixel, many.pixel, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(one.mmse_se, many.mmse_se, rtol=1e-5, atol=1e-9)


def _calibration(schedule: Schedule, shape: tuple[int, ...] = (1, 2, 3)) -> Calibration:
    data = Independent(4).normal(range(64), shape) * torch.linspace(0.1, 1, shape[-1])
    twin = GaussianTwin(torch.zeros(shape), PixelBasis(shape), torch.ones(shape))
    return calibrate(twin.denoiser(schedule), lambda: [data], logsnr=default_logsnr(schedule, 9), replicates=1)


def test_another_schedule_is_refused() -> None:
    cosine = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    linear = schedule_from_diffusers({"beta_schedule": "linear"})
    assert isinstance(cosine, DiscreteVP)
    calibration = _calibration(cosine)
    twin = calibration.twin
    with pytest.raises(UserError, match="calibrate again") as error:
        calibration.attach(twin.denoiser(linear))
    assert cosine.fingerprint in str(error.value)
    assert linear.fingerprint in str(error.value)
    with pytest.raises(UserError, match="calibrate again"):
        calibrated_grid("optimal", calibration, linear, 5)
    with pytest.raises(UserError, match="calibrate again"):
        calibration.path_grid(linear, 5)


def test_json_round_trip() -> None:
    calibration = _calibration(CosineVP())
    fields, tensors = calibration.to_json()
    assert set(tensors) == {"basis"}, "a dense basis is never JSON, small tables always are"
    again = Calibration.from_json(fields, tensors)
    level = CosineVP().at(0.37)
    x = torch.zeros(2, 1, 2, 3)
    for structure in ("isotropic", "pixel", "basis", "analytic"):
        a, b = (c.table(structure)(x, level).diagonal() for c in (calibration, again))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert again.fingerprint == calibration.fingerprint
    assert again.n == 64


def test_large_tables_leave_the_json() -> None:
    calibration = _calibration(CosineVP(), (3, 64, 64))  # 9 knots x 12,288 numbers
    fields, tensors = calibration.to_json()
    assert calibration.twin.basis.name == "dct"
    assert "basis" not in tensors
    assert {"variance.pixel", "variance.basis"} <= set(tensors)
    again = Calibration.from_json(fields, tensors)
    torch.testing.assert_close(again.table("pixel").variance.float(), calibration.table("pixel").variance.float())


def test_an_incomplete_calibration_says_so() -> None:
    fields, tensors = _calibration(CosineVP()).to_json()
    del fields["mmse"]
    with pytest.raises(UserError, match="lowvar calibrate"):
        Calibration.from_json(fields, tensors)


def test_unknown_structure_names_the_allowed() -> None:
    with pytest.raises(UserError, match="analytic, isotropic, pixel, basis"):
        _calibration(CosineVP()).table("wavelet")


def test_grid_ignores_errors_above_the_twin() -> None:
    """Where a network is worse than the linear denoiser, its error must not attract steps."""
    calibration = _calibration(CosineVP())
    noisy = calibration.logsnr < -4
    spoilt = replace(calibration, mmse=torch.where(noisy, calibration.mmse * 10, calibration.mmse))
    a, b = (calibrated_grid("variance-matched", c, CosineVP(), 6).grid for c in (calibration, spoilt))
    assert float((a - b).abs().max()) < 0.05


def test_table_interpolates_log_variance_and_falls_like_one_over_snr() -> None:
    table = CovarianceTable("pixel", torch.tensor([-2.0, 0.0, 2.0]), torch.tensor([[1.0], [0.1], [0.001]]), (1,))
    at = table.at(torch.tensor([-9.0, -1.0, 1.0, 2.0, 5.0], dtype=torch.float64))[:, 0]
    expected = torch.tensor([1.0, 0.1**0.5, 0.01, 0.001, 0.001 * torch.exp(torch.tensor(-3.0))], dtype=torch.float64)
    torch.testing.assert_close(at, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("structure", ["isotropic", "pixel", "basis"])
def test_levels_a_sample_equal_single_levels(structure: str) -> None:
    calibration = _calibration(CosineVP())
    table = calibration.table(structure)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = torch.zeros(3, 1, 2, 3)
    together = table(x, CosineVP().at(t)).diagonal()
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], table(x[:1], CosineVP().at(t[i])).diagonal())


@pytest.mark.parametrize(
    ("variance", "words"),
    [(torch.tensor([-1.0]), "not negative"), (torch.tensor([float("nan")]), "finite"), (torch.ones(2), "one row")],
)
def test_bad_tables_are_refused(variance: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CovarianceTable("isotropic", torch.tensor([0.0]), variance, (1,))


def test_no_data() -> None:
    _, twin, _ = gaussian()
    with pytest.raises(ValueError, match="no data"):
        residual_moments(twin.denoiser(CosineVP()), [], CosineVP().level(LOGSNR), Independent(0))
