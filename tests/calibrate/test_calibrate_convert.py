"""C from a learned-range head: exact where the head is, the table where it only has noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import Calibration, CovarianceTable, calibrate, convert
from lowvar.calibrate.convert import Converted
from lowvar.errors import UserError
from lowvar.process import CosineVP, Denoiser, Independent, Level, Posterior, ReverseKernel, schedule_from_diffusers
from lowvar.testing import mixture2

LINEAR = schedule_from_diffusers({"beta_schedule": "linear"})
T = 1000


class _Range(Denoiser):
    """The exact posterior with the fraction that says so at the training step, and noise on it."""

    def __init__(self, spread: float = 0.0) -> None:
        self.schedule, self.spread = LINEAR, spread

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        exact = mixture2().posterior(x, level, "diagonal")
        assert exact.covariance is not None
        s = LINEAR.at((level.t - 1 / T).clamp_min(0.5 / T))
        kernel = ReverseKernel(1.0, "posterior")(x, exact, level, s)
        small, large = (ReverseKernel(1.0, v)(x, exact, level, s).covariance.diagonal() for v in ("small", "large"))  # type: ignore[arg-type]
        f = (kernel.covariance.diagonal() / small).log() / (large / small).log()
        noise = Independent(3).normal(range(len(x)), x.shape[1:], dtype=x.dtype)
        return Posterior(exact.mean, None, f + self.spread * noise)


@pytest.fixture(scope="module")
def setting() -> tuple[Calibration, Tensor]:
    data = mixture2().sample(range(600), Independent(1))
    knots = torch.linspace(-8, 6, 15, dtype=torch.float64)
    return calibrate(_Range(), lambda: [data], logsnr=knots, replicates=1), data


def test_an_exact_head_is_inverted(setting: tuple[Calibration, Tensor]) -> None:
    """The kernel's own variance in, C out: to 1e-6 at the knots of the conversion, where nothing is interpolated."""
    calibration, data = setting
    made, report = convert(_Range(), calibration.table("pixel"), data, Independent(2), knots=8, replicates=1)
    for k in range(1, 8):
        level = LINEAR.level(made.logsnr[k])
        x = mixture2().noisy(range(50), level, Independent(5))
        exact = mixture2().posterior(x, level, "diagonal").covariance
        assert exact is not None
        fraction = _Range()(x, level).fraction
        assert fraction is not None
        torch.testing.assert_close(made.variance(fraction, level.logsnr), exact.diagonal(), rtol=1e-6, atol=1e-12)
    assert int(report.informative.sum()) >= 3, report


def test_a_noisy_head_is_used_where_it_is_informative(setting: tuple[Calibration, Tensor]) -> None:
    """Noise of .05 on f: where C is near its largest it says little of log var, elsewhere it drowns it. What is not
    informative is the table to the last digit; the report says where.
    """
    calibration, data = setting
    table = calibration.table("pixel")
    made, report = convert(_Range(0.05), table, data, Independent(2), knots=15, replicates=1)
    assert bool(report.informative.any())
    assert not bool(report.informative.all())
    assert bool((report.noise[report.informative] <= 1).all())
    out = int((~report.informative).nonzero()[0])
    level = LINEAR.level(made.logsnr[out])
    x = mixture2().noisy(range(20), level, Independent(5))
    posterior = _Range(0.05)(x, level)
    torch.testing.assert_close(made(x, level, posterior).diagonal(), table(x, level).diagonal().expand(20, 2))
    broken, nothing = convert(_Range(50.0), table, data[:200], Independent(2), knots=5, replicates=1)
    assert not bool(nothing.informative.any())
    assert "kept at every logsnr" in str(nothing)
    C = broken(x, level, Posterior(x, None, -5 * torch.ones_like(x)))  # a fraction that stands for C < 0
    assert bool((C.diagonal() > 0).all())


def test_json(setting: tuple[Calibration, Tensor]) -> None:
    from dataclasses import replace

    calibration, data = setting
    made, _ = convert(_Range(), calibration.table("pixel"), data[:300], Independent(2), knots=8, replicates=1)
    again = Calibration.from_json(*replace(calibration, converted=made).to_json())
    level = LINEAR.level(torch.tensor(3.3, dtype=torch.float64))
    x = mixture2().noisy(range(5), level, Independent(5))
    a, b = (c.attach(_Range(), "convert")(x, level).covariance for c in (replace(calibration, converted=made), again))
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a.diagonal(), b.diagonal(), rtol=1e-5, atol=0)


def test_bad_input(setting: tuple[Calibration, Tensor]) -> None:
    calibration, data = setting
    with pytest.raises(UserError, match="with head 'range'"):
        calibration.model("convert")
    with pytest.raises(ValueError, match="variance a pixel"):
        convert(_Range(), calibration.table("isotropic"), data, Independent(0))
    with pytest.raises(ValueError, match="no fraction"):
        convert(mixture2().denoiser(CosineVP(), None), calibration.table("pixel"), data[:10], Independent(0))
    table = CovarianceTable("pixel", torch.tensor([0.0]), torch.ones(1, 2), (2,))
    one = torch.ones(2)
    with pytest.raises(ValueError, match="no fraction"):
        Converted(table, torch.tensor([0.0, 1.0]), one, one)(
            torch.zeros(1, 2), LINEAR.at(0.5), Posterior(torch.zeros(1, 2))
        )
