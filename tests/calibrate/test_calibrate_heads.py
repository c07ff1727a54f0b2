"""Heads against exact posteriors: what they regress, what they find, where they are used, and their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowvar.calibrate import HEADS, OCM, Calibration, CovarianceTable, FitConfig, HeadEstimator, add_head, calibrate
from lowvar.calibrate import make_head as make
from lowvar.calibrate.estimator import Draw, Trust, proportional_loss, square_loss
from lowvar.calibrate.fitting import fit_head, rounds
from lowvar.errors import UserError
from lowvar.process import (
    CosineVP,
    DCTBasis,
    Denoiser,
    Flow,
    GaussianTwin,
    Independent,
    Level,
    MatrixBasis,
    PixelBasis,
    Posterior,
    Schedule,
)
from lowvar.process.basis import Basis
from lowvar.process.covariance import LowRankPlusDiagonal
from lowvar.testing import GaussianTarget, anisotropic_gaussian, mixture2

KNOTS = torch.linspace(-5, 5, 11, dtype=torch.float64)
QUICK = FitConfig(rounds=4, pool=4000, epochs=5, batch=200, rate=3e-3, knots=6, replicates=1, chunk=4000)


def flat_table(basis: Basis, value: float = 1.0) -> CovarianceTable:
    pixel = isinstance(basis, PixelBasis)
    variance = torch.full((2, *basis.event_shape), value, dtype=torch.float64)
    ends = torch.tensor([-6.0, 6.0])
    return CovarianceTable("pixel" if pixel else "basis", ends, variance, basis.event_shape, None if pixel else basis)


def untrained(name: str, basis: Basis, value: float = 1.0, reference: CovarianceTable | None = None) -> HeadEstimator:
    shape = basis.event_shape
    twin = GaussianTwin(torch.zeros(shape), basis, torch.ones(shape))
    return make(name, flat_table(basis, value), twin, Independent(8), rank=2, width=16, reference=reference)


# --------------------------------------------------------------------------------- what is regressed, without training


class _Offset(Denoiser):
    """The exact posterior mean of a Gaussian, off by a constant."""

    def __init__(self, twin: GaussianTwin, schedule: Schedule, offset: Tensor) -> None:
        self.twin, self.schedule, self.offset = twin, schedule, offset

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        posterior = self.twin.posterior(x, level)
        return replace(posterior, mean=posterior.mean + self.offset.to(x))


def _at_one_state(denoiser: _Offset, level: Level, basis: Basis, n: int) -> tuple[Draw, Tensor]:
    """n draws of x_0 from the exact posterior at one state, and the exact C, dense in the basis."""
    twin = denoiser.twin
    shape = twin.event_shape if isinstance(twin, GaussianTarget) else twin.mean.shape
    x = Independent(1).normal([0], shape, dtype=torch.float64)
    posterior = twin.posterior(x, level)
    assert posterior.covariance is not None
    x0 = posterior.mean + posterior.covariance.sqrt_matvec(Independent(2).normal(range(n), shape, dtype=torch.float64))
    eps = (x - level.alpha * x0) / level.sigma
    sign = torch.where(Independent(3).normal(range(n), shape, dtype=torch.float64) < 0, -1.0, 1.0)
    many = Level(*(v.expand(n) for v in (level.t, level.logsnr, level.alpha, level.sigma)))
    x = x.expand(n, *shape)
    B = basis.matrix()
    C = B.T @ posterior.covariance.dense()[0] @ B
    return Draw(x0, eps, x, denoiser(x, level).mean, many, sign.double()), C


@pytest.mark.parametrize("schedule", [CosineVP(), Flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("offset", [0.0, 0.4])
@pytest.mark.parametrize("name", ["npr", "sn", "ocm", "lowrank"])
def test_targets_mean_what_is_declared(name: str, offset: float, schedule: Schedule) -> None:
    """At one state, over 40,000 exact posterior draws: the wanted moment within 5 standard errors. With a wrong mean,
    estimators that declare `network` find C + delta delta^T, OCM still C, and SN what its module says it finds.
    """
    twin = anisotropic_gaussian((4,), ratio=20.0, seed=2).twin
    basis = DCTBasis((4,))
    level = schedule.level(torch.tensor(0.7, dtype=torch.float64))
    delta = offset * torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    denoiser = _Offset(twin, schedule, delta)
    draw, C = _at_one_state(denoiser, level, basis, 40_000)
    estimator = untrained(name, basis, 0.3)
    along = basis.forward(delta[None])[0]
    expected = torch.diagonal(C)
    if estimator.declares.centre == "network":
        expected = expected + along**2
    target = estimator.target(denoiser, draw, torch.full_like(draw.x, 0.3)).double()
    if name == "lowrank":
        found, spread = (target[:, :, None] * target[:, None]).mean(0) * 0.3, C + torch.outer(along, along)
        assert float((found - spread).abs().max()) < 5 * float(spread.diagonal().max()) * (2 / 40_000) ** 0.5
        return
    if name == "sn":  # p = q p_0 + C snr: what the loss's minimiser p = E[eps^2] makes of C
        snr = torch.exp(level.logsnr)
        eps_hat = basis.forward((draw.x[:1] - level.alpha * draw.mean[:1]) / level.sigma)[0]
        start = eps_hat**2 + snr * 0.3
        torch.testing.assert_close(target[0, 1], eps_hat**2 / start)
        values = (target[:, 0] * start - eps_hat**2) / snr
        true = basis.forward((draw.x[:1] - level.alpha * (draw.mean[:1] - delta)) / level.sigma)[0]
        expected = expected + (true**2 - eps_hat**2) / snr  # first order in delta
    else:
        values = 0.3 * (target[:, 0] if name == "ocm" else target)
    se = values.std(0) / 200
    assert bool(((values.mean(0) - expected).abs() < 5 * se + 1e-9).all()), (values.mean(0), expected, se)


@pytest.mark.parametrize("basis", [PixelBasis((2, 2)), DCTBasis((2, 2))], ids=["pixel", "dct"])
def test_ocm_over_all_signs_is_exact(basis: Basis) -> None:
    """All 16 sign patterns: their mean is the diagonal to rounding, with and without the control variate, and the
    control variate leaves no variance at all where the reference is right (Gaussian data).
    """
    target = anisotropic_gaussian((2, 2), ratio=30.0, seed=5)
    schedule = CosineVP()
    level = schedule.level(torch.full((16,), -0.4, dtype=torch.float64))
    sign = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64).reshape(16, 2, 2)
    x = Independent(3).normal([0], (2, 2), dtype=torch.float64).expand(16, 2, 2)
    denoiser = target.twin.denoiser(schedule)
    posterior = denoiser(x, level)
    assert posterior.covariance is not None
    B = basis.matrix()
    exact = torch.diagonal(B.T @ posterior.covariance.dense()[0] @ B).reshape(2, 2)
    along = posterior.covariance.variance[:1]  # type: ignore[attr-defined]
    right = CovarianceTable("basis", torch.tensor([-0.4]), along, (2, 2), target.twin.basis)
    draw = Draw(x, x, x, posterior.mean, level, sign)
    spread = {}
    for name, reference in (("none", None), ("right", right), ("double", replace(right, variance=2 * along))):
        head = untrained("ocm", basis, reference=reference)
        assert isinstance(head, OCM)
        assert (head.reference is None) == (reference is None)
        values = head.target(denoiser, draw, torch.ones_like(x))[:, 0]
        torch.testing.assert_close(values.mean(0), exact, rtol=1e-5, atol=1e-6)
        spread[name] = float(values.std(0).max())
    assert spread["right"] < 1e-5 < 1e-2 < spread["none"]
    assert spread["double"] == pytest.approx(spread["none"], rel=1e-4), "twice the control variate is its mirror image"


@pytest.mark.parametrize("loss", [proportional_loss, partial(square_loss, weight=torch.tensor(0.3))])
def test_losses_are_minimal_at_the_mean(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Exhaustive expectation over three values: the minimiser over h is log E T."""
    T = torch.tensor([0.1, 0.4, 5.5], dtype=torch.float64)
    h = torch.linspace(-2, 2, 40_001, dtype=torch.float64)
    risk = torch.stack([loss(h[:, None], t.expand(len(h), 1)) for t in T]).mean(0)
    assert float(h[risk.argmin()]) == pytest.approx(float(T.mean().log()), abs=1e-4)


def test_loss_of_sn_is_minimal_at_its_variance() -> None:
    """The same for p = q + (1 - q) e^h: q + (1 - q) e^h = E T, where that is above q; as low as h goes otherwise."""
    head = untrained("sn", PixelBasis((1,)))
    h = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for q, values in ((0.6, (0.2, 0.9, 2.0)), (0.9, (0.2, 0.3, 0.4))):
        parts = [torch.tensor([t, q], dtype=torch.float64).reshape(1, 2, 1).expand(len(h), 2, 1) for t in values]
        risk = torch.stack([head.loss(h[:, None, None], part) for part in parts]).sum(0)
        mean = sum(values) / 3
        expected = torch.tensor((mean - q) / (1 - q)).log().item() if mean > q else -4.0
        assert float(h[risk.argmin()]) == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- trained


@pytest.fixture(scope="module")
def two() -> tuple[Calibration, Denoiser, Tensor]:
    """The 2-dimensional mixture with its exact denoiser, calibrated on 4,000 samples."""
    target = mixture2()
    data = target.sample(range(4000), Independent(1)).float()
    denoiser = target.denoiser(CosineVP(), None)
    calibration = calibrate(denoiser, lambda: [data], logsnr=KNOTS, replicates=1, noise=Independent(2))
    return calibration, denoiser, data


def _log_error(model: object, name: str, level: Level) -> float:
    """Root mean square of log C_ii - log of the exact one at 2,000 states that nobody has seen."""
    x = mixture2().noisy(range(9000, 11_000), level, Independent(7)).float()
    exact = mixture2().posterior(x, level, "diagonal" if name == "pixel" else "pca-diagonal")
    C = model(x, level, exact)  # type: ignore[operator]
    assert C.variance.dtype == torch.float32
    return float(((C.variance.log() - exact.covariance.variance.log()) ** 2).mean().sqrt())  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "basis", "part"), [("npr", "pixel", 0.6), ("sn", "pca", 0.7), ("ocm", "pixel", 0.5), ("ocm", "pca", 0.5)]
)
def test_heads_find_the_posterior_variance(
    two: tuple[Calibration, Denoiser, Tensor], name: str, basis: str, part: float
) -> None:
    """In the middle, where the mixture's modes open and close, the table's log variances are off by .4 to .9; a head
    trained for seconds is at most 3/5 as far from E[. | x_t]: OCM, whose target has the probe's noise alone, half, and
    SN, whose target has the most, 7/10.
    """
    calibration, denoiser, data = two
    found, report = add_head(calibration, denoiser, data, name, Independent(3), basis=basis, width=32, config=QUICK)
    assert report.used
    assert report.gain > 3 * report.gain_se, report
    structure = "pixel" if basis == "pixel" else "basis"
    for logsnr in (-1.0, 1.0):
        level = CosineVP().level(torch.tensor(logsnr, dtype=torch.float64))
        table, head = (_log_error(found.model(m), structure, level) for m in (structure, name))
        assert table > 0.35
        assert head < part * table, (logsnr, head, table)


def test_low_rank_recovers_a_planted_covariance() -> None:
    """x_0 ~ N(0, D + U U^T), rank 2 in 8 dimensions: C is of the family, and the same at every x_t. Within a tenth of
    its Frobenius norm at a level where the posterior feels the data, and within a twentieth of the attainable gain.
    """
    variance = torch.linspace(0.05, 0.2, 8, dtype=torch.float64)
    U = Independent(11).normal(range(2), (8,), dtype=torch.float64) * 0.8
    target = GaussianTarget(torch.zeros(8), torch.diag(variance) + U.T @ U)
    schedule = CosineVP()
    data = target.sample(range(6000), Independent(1)).float()
    denoiser = target.twin.denoiser(schedule)
    knots = torch.linspace(-2, 4, 7, dtype=torch.float64)
    calibration = calibrate(denoiser, lambda: [data], logsnr=knots, replicates=1)
    head = make("lowrank", calibration.table("pixel"), calibration.twin, Independent(3), rank=2, width=32)
    fitted = fit_head(head, denoiser, data, Independent(4), replace(QUICK, rounds=5))
    level = schedule.level(torch.tensor(0.5, dtype=torch.float64))
    x = torch.zeros(1, 8)
    exact = denoiser(x.double(), level).covariance
    assert exact is not None
    C = fitted.estimator(x, level, Posterior(x))
    assert isinstance(C, LowRankPlusDiagonal)
    found, truth = C.dense()[0].double(), exact.dense()[0]
    assert float((found - truth).norm() / truth.norm()) < 0.1
    table = calibration.table("pixel")(x, level).diagonal().double()
    attainable = float((table.log().sum() - exact.logdet()) / 16)
    mine = float((table.log().sum() - C.logdet()) / 16)
    assert mine == pytest.approx(attainable, rel=0.05)


def test_a_head_that_cannot_gain_keeps_its_table() -> None:
    """For a Gaussian the table along the principal components is the exact posterior: there is nothing to learn."""
    target = anisotropic_gaussian((3,), ratio=20.0, seed=1)
    denoiser = target.twin.denoiser(CosineVP())
    data = target.sample(range(600), Independent(1)).float()
    calibration = calibrate(
        denoiser, lambda: [data], twin_batches=lambda: [target.sample(range(50_000), Independent(9))], logsnr=KNOTS
    )
    few = replace(QUICK, rounds=2, pool=600)
    found, report = add_head(calibration, denoiser, data, "npr", Independent(3), basis="pca", width=16, config=few)
    assert abs(report.gain) < 3 * report.gain_se + 2e-3
    off = found.heads["npr"].trusted(Trust((0.0,), (0.0,)))
    level = CosineVP().level(torch.tensor(0.3, dtype=torch.float64))
    x = Independent(5).normal(range(4), (3,))
    got, table = off(x, level, Posterior(x)), calibration.table("basis")(x, level)
    assert torch.equal(got.diagonal(), table.diagonal().expand(4, 3))
    if not report.used:
        assert "table is kept" in str(report)


def test_resumed_fit_is_the_undisturbed_one() -> None:
    target = mixture2()
    data = target.sample(range(60), Independent(1)).float()
    denoiser = target.denoiser(CosineVP(), None)
    config = FitConfig(rounds=3, pool=100, epochs=2, batch=32, knots=3, replicates=1, patience=9)

    def fresh() -> HeadEstimator:
        return untrained("npr", PixelBasis((2,)))

    whole = list(rounds(fresh(), denoiser, data, Independent(6), config))
    first = next(iter(rounds(fresh(), denoiser, data, Independent(6), config)))
    rest = list(rounds(fresh(), denoiser, data, Independent(6), config, resume=first))
    assert [r.number for r in rest] == [2, 3]
    for name, value in whole[-1].state["weights"].items():
        assert torch.equal(value, rest[-1].state["weights"][name]), name
    assert whole[-1].loss == rest[-1].loss


# ----------------------------------------------------------------------------------------- never negative, never narrow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.parametrize("shape", [(5,), (2, 4, 4)])
def test_variances_are_positive_and_wide(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Weights that make no sense: C is float32 or wider, finite and positive all the same, at every level."""
    estimator = untrained(name, PixelBasis(shape), 1e-4)
    with torch.no_grad():
        for k, parameter in enumerate(estimator.network.parameters()):
            parameter.add_(3 * Independent(20 + k).normal([0], tuple(parameter.shape))[0])
    x = (4 * Independent(1).normal(range(3), shape)).to(dtype)
    level = CosineVP().at(torch.tensor([1e-3, 0.4, 1.0]))
    C = estimator(x, level, Posterior(x))
    assert C.diagonal().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool(torch.isfinite(C.diagonal()).all())
    assert bool((C.diagonal() > 0).all())
    assert bool(torch.isfinite(C.sqrt_matvec(torch.ones(3, *shape).to(C.diagonal()))).all())


def test_half_precision_does_not_reach_the_variance() -> None:
    """Pitfall: E[eps^2] - eps_hat^2 in bfloat16 is off by 46% at C = .01. The head under autocast is not off at all."""
    C, n = 0.01, 4000
    level = CosineVP().level(torch.tensor(0.0, dtype=torch.float64))
    eps_hat = Independent(1).normal(range(n), ())
    narrow = (eps_hat**2 + C).bfloat16() - (eps_hat**2).bfloat16()
    assert float(((narrow.float() - C) ** 2).mean().sqrt() / C) > 0.4
    estimator = untrained("sn", PixelBasis((4,)), C)
    with torch.no_grad():
        for k, parameter in enumerate(estimator.network.parameters()):
            parameter.add_(0.1 * Independent(30 + k).normal([0], tuple(parameter.shape))[0])
    x = eps_hat.reshape(-1, 4)
    exact = estimator(x, level, Posterior(0.5 * x)).diagonal()
    with torch.autocast("cpu", torch.bfloat16):
        cast = estimator(x, level, Posterior(0.5 * x)).diagonal()
    assert torch.equal(exact, cast)


def test_levels_a_sample_equal_single_levels() -> None:
    for name in HEADS:
        estimator = untrained(name, DCTBasis((2, 3))).trusted(Trust((-2.0, 2.0), (0.0, 1.0), (0.3, -0.3)))
        with torch.no_grad():
            estimator.network.offset.add_(0.3)
        x = Independent(1).normal(range(3), (2, 3))
        t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
        together = estimator(x, CosineVP().at(t), Posterior(x)).diagonal()
        for i in range(3):
            alone = estimator(x[i : i + 1], CosineVP().at(t[i]), Posterior(x[i : i + 1])).diagonal()
            torch.testing.assert_close(together[i : i + 1], alone)


# --------------------------------------------------------------------------------------------------------- files, input


def _small(shape: tuple[int, ...] = (1, 2, 3)) -> tuple[Calibration, Denoiser, Tensor]:
    data = Independent(4).normal(range(24), shape) * torch.linspace(0.1, 1, shape[-1])
    twin = GaussianTwin(torch.zeros(shape), MatrixBasis(torch.eye(data[0].numel()), shape), torch.ones(shape))
    denoiser = twin.denoiser(CosineVP())
    return calibrate(denoiser, lambda: [data], logsnr=KNOTS, replicates=1), denoiser, data


TINY = FitConfig(rounds=1, pool=24, epochs=1, batch=8, knots=3, replicates=1)


def test_files(tmp_path: Path) -> None:
    """Heads of all kinds and bases in one calibration, through JSON and safetensors."""
    calibration, denoiser, data = _small()
    state = torch.get_rng_state()
    for name, basis in zip(HEADS, ("pixel", "dct", "pca", "dct"), strict=True):
        calibration, _ = add_head(calibration, denoiser, data, name, Independent(1), basis=basis, rank=3, config=TINY)
        head = calibration.heads[name].trusted(Trust((-1.0, 0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.2, 0.4)))
        with torch.no_grad():
            head.network.last.weight.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
        calibration = replace(calibration, heads={**calibration.heads, name: head})
    assert torch.equal(state, torch.get_rng_state()), "nothing draws from torch's own generator"
    fields, tensors = calibration.to_json()
    assert fields["heads"]["npr"]["weights"]["offset"] == {"tensor": "head.npr.offset"}
    save_file(tensors, tmp_path / "c.safetensors")
    again = Calibration.from_json(fields, load_file(tmp_path / "c.safetensors"))
    level = CosineVP().at(0.45)
    x = Independent(2).normal(range(3), (1, 2, 3))
    for name in HEADS:
        a, b = (c.attach(denoiser, name)(x, level).covariance for c in (calibration, again))
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a.dense(), b.dense(), rtol=1e-4, atol=1e-6)
        assert float((a.diagonal() - calibration.table("pixel")(x, level).diagonal()).abs().max()) > 1e-3


def test_files_without_their_weights_say_so() -> None:
    calibration, denoiser, data = _small()
    calibration, _ = add_head(calibration, denoiser, data, "npr", Independent(1), config=TINY)
    fields, tensors = calibration.to_json()
    for spoil in (dict[str, Tensor](), {"head.npr.offset": torch.zeros(3)}):
        kept = {k: v for k, v in tensors.items() if k != "head.npr.offset"} | spoil
        with pytest.raises(UserError, match="lowvar calibrate"):
            Calibration.from_json(fields, kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "npt"}, "npr, sn, ocm, lowrank"),
        ({"name": "npr", "basis": "wavelet"}, "pixel, dct, pca"),
        ({"name": "lowrank", "rank": 17}, "0 to 5"),
        ({"name": "lowrank", "rank": -1}, "0 to 5"),
    ],
)
def test_bad_input(options: dict[str, object], words: str) -> None:
    calibration, denoiser, data = _small()
    with pytest.raises(UserError, match=words):
        add_head(calibration, denoiser, data, noise=Independent(0), config=TINY, **options)  # type: ignore[arg-type]


def test_principal_components_that_are_not_there() -> None:
    calibration, denoiser, data = _small()
    shape = (1, 2, 3)
    dct = replace(calibration, twin=GaussianTwin(torch.zeros(shape), DCTBasis(shape), torch.ones(shape)))
    with pytest.raises(UserError, match="dct or pixel"):
        add_head(dct, denoiser, data, "npr", Independent(0), basis="pca")


def test_too_few_images_and_bad_settings() -> None:
    calibration, denoiser, data = _small()
    with pytest.raises(ValueError, match="at least 6"):
        add_head(calibration, denoiser, data[:5], "npr", Independent(0), config=TINY)
    with pytest.raises(ValueError, match="pool is 0"):
        FitConfig(pool=0)
    with pytest.raises(UserError, match="lowvar calibrate --head ocm"):
        calibration.attach(denoiser, "ocm")
    with pytest.raises(ValueError, match="own basis"):
        HEADS["npr"](calibration.table("isotropic"), untrained("npr", PixelBasis((1, 2, 3))).network)
