"""Tables by class, tables of a guided model, and the Jacobian's trace."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import (
    Calibration,
    ConditionalTable,
    JacobianTrace,
    calibrate,
    calibrate_classes,
    standardised_residuals,
)
from lowvar.calibrate.table import Structure
from lowvar.errors import UserError
from lowvar.process import CosineVP, Guided, Independent, JacobianCovariance, Level, NoiseSource
from lowvar.process.covariance import Isotropic
from lowvar.testing import GaussianTarget, anisotropic_gaussian

SCHEDULE = CosineVP()
KNOTS = torch.linspace(-4, 4, 5, dtype=torch.float64)
SIZES = (400, 40, 3, 0)
Classes = tuple[Calibration, dict[Structure, ConditionalTable], list[Tensor]]


def _targets() -> list[GaussianTarget]:
    """Classes 0 and 1 of variance 1 : 4, class 2 like class 0; class 3 has no images."""
    base = anisotropic_gaussian((4,), ratio=10.0, seed=3)
    return [GaussianTarget(base.mean + k, s * base.covariance) for k, s in enumerate((1.0, 4.0, 1.0, 1.0))]


@pytest.fixture(scope="module")
def classes() -> Classes:
    targets = _targets()
    data = [t.sample(range(400), Independent(k))[:n] for k, (t, n) in enumerate(zip(targets, SIZES, strict=True))]
    pooled = calibrate(targets[0].twin.denoiser(SCHEDULE), lambda: [torch.cat(data)], logsnr=KNOTS, replicates=1)
    tables = calibrate_classes(
        lambda k: targets[k].twin.denoiser(SCHEDULE), lambda k: [data[k]], 4, pooled, Independent(7), 2
    )
    return pooled, tables, data


def test_classes_have_their_own_variance(
    classes: Classes,
) -> None:
    """Fresh events of each class have standard residuals: within 10% for 400 images, 35% for 40 (three standard errors
    of 40 chi-squares of 4 entries at 2 replicates); the class of 3 is nearer the truth than its own raw moments can be
    trusted to be.
    """
    pooled, tables, _ = classes
    calibration = replace(pooled, conditional=tables)
    level = SCHEDULE.level(KNOTS)
    for structure in ("isotropic", "pixel", "basis"):
        for k, tolerance in ((0, 0.1), (1, 0.35)):
            target = _targets()[k]
            attached = calibration.attach(target.twin.denoiser(SCHEDULE), structure, labels=torch.tensor(k))
            fresh = target.sample(range(5000, 9000), Independent(99))
            check = standardised_residuals(attached, [fresh], level, Independent(5))
            assert bool(((check.value - 1).abs() < tolerance).all()), (structure, k, check.value)
    wrong = calibration.attach(_targets()[1].twin.denoiser(SCHEDULE), "pixel", labels=torch.tensor(0))
    check = standardised_residuals(wrong, [_targets()[1].sample(range(2000), Independent(99))], level, Independent(5))
    assert float(check.value.max()) > 1.35, "the table of another class is told apart"


def test_a_class_without_images_has_the_pooled_table(
    classes: Classes,
) -> None:
    pooled, tables, _ = classes
    for structure, conditional in tables.items():
        assert torch.equal(conditional.tables[3].variance, pooled.table(structure).variance)


def test_labels_and_levels_a_sample(classes: Classes) -> None:
    _, tables, _ = classes
    level = SCHEDULE.at(torch.tensor([0.2, 0.5, 0.7]))
    labels = torch.tensor([2, 0, 1])
    x = torch.zeros(3, 4)
    for conditional in tables.values():
        together = conditional.of(labels)(x, level).diagonal()
        for i in range(3):
            alone = conditional.tables[int(labels[i])](x[:1], level[i]).diagonal()
            torch.testing.assert_close(together[i : i + 1], alone)
    with pytest.raises(ValueError, match="0 to 3"):
        tables["pixel"].of(torch.tensor([4]))


def test_json(classes: Classes) -> None:
    pooled, tables, _ = classes
    calibration = replace(pooled, conditional=tables)
    again = Calibration.from_json(*calibration.to_json())
    level, x, labels = SCHEDULE.at(0.4), torch.zeros(2, 4), torch.tensor([1, 3])
    for structure in tables:
        a, b = (c.model(structure, labels)(x, level, None).diagonal() for c in (calibration, again))  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="not calibrated by class"):
        pooled.model("pixel", labels)
    with pytest.raises(ValueError, match="at least 1"):
        calibrate_classes(lambda _: _targets()[0].twin.denoiser(SCHEDULE), lambda _: [], 0, pooled, Independent(0))


def test_a_guided_model_is_calibrated_as_it_is_used() -> None:
    """Scale 3: residuals about the guided mean are standard under the guided model's own table, and not under the
    conditional branch's.
    """
    targets = _targets()
    branch, other = targets[1].twin.denoiser(SCHEDULE), targets[0].twin.denoiser(SCHEDULE)
    guided = Guided(branch, other, 3.0)
    data = targets[1].sample(range(3000), Independent(1))
    level = SCHEDULE.level(KNOTS)
    own, conditional = (calibrate(d, lambda: [data], logsnr=KNOTS, replicates=1) for d in (guided, branch))
    fresh = [targets[1].sample(range(5000, 7000), Independent(99))]
    for structure in ("isotropic", "pixel", "basis"):
        good = standardised_residuals(own.attach(guided, structure), fresh, level, Independent(5))
        assert bool(((good.value - 1).abs() < 0.1).all()), (structure, good.value)
        bad = standardised_residuals(conditional.attach(guided, structure), fresh, level, Independent(5))
        assert float((bad.value - 1).abs().max()) > 0.5


# -------------------------------------------------------------------------------------------------------- the Jacobian


# torch's own: its forward mode scripts a decomposition when it is first used
jit = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class _Signs(NoiseSource):
    """All 2^d sign patterns as the batch's probes."""

    def __init__(self, d: int) -> None:
        self.rows = torch.tensor(list(product([-1.0, 1.0], repeat=d)), dtype=torch.float64)

    def normal(self, index, shape, *, draw=0, dtype=torch.float32, device="cpu") -> Tensor:  # type: ignore[no-untyped-def]
        return self.rows.to(dtype)

    uniform = normal


@jit
def test_trace_over_all_probes() -> None:
    """Enumerated: the mean is tr C / d exactly, the variance 2 sum_{i != j} C_ij^2 / d^2 exactly; 2 evaluations."""
    target = anisotropic_gaussian((3,), ratio=20.0, seed=4)
    level: Level = SCHEDULE.at(0.4)
    x = Independent(1).normal([0], (3,), dtype=torch.float64).expand(8, 3)
    denoiser = JacobianTrace(target.twin.denoiser(SCHEDULE), 1, _Signs(3))
    C = target.twin.posterior(x[:1], level).covariance
    assert C is not None
    found = denoiser(x, level).covariance
    assert isinstance(found, Isotropic)
    dense = C.dense()[0]
    off = dense - torch.diag(dense.diagonal())
    assert float(found.variance.mean()) == pytest.approx(float(C.trace()) / 3, rel=1e-6)
    assert float(found.variance.var(correction=0)) == pytest.approx(2 * float((off**2).sum()) / 9, rel=1e-5)


def test_products_are_counted() -> None:
    target = anisotropic_gaussian((3,), seed=4).denoiser(SCHEDULE)
    assert JacobianTrace(target, 3).nfe == 4 * target.nfe
    assert JacobianCovariance(target, steps=5).nfe == 16 * target.nfe
    assert JacobianCovariance(target, steps=5, symmetric=False).nfe == 6 * target.nfe
    assert JacobianTrace(target).declares.nfe == JacobianTrace(target).nfe - target.nfe
    with pytest.raises(ValueError, match="at least 1"):
        JacobianTrace(target, 0)


@jit
def test_probes_do_not_depend_on_the_batch() -> None:
    denoiser = JacobianTrace(anisotropic_gaussian((5,), ratio=9.0, seed=4).twin.denoiser(SCHEDULE), 2)
    x = Independent(1).normal(range(4), (5,))
    together = denoiser(x, SCHEDULE.at(0.5)).covariance
    alone = denoiser(x[:2], SCHEDULE.at(0.5)).covariance
    later = denoiser(x, SCHEDULE.at(0.45)).covariance
    assert together is not None
    assert alone is not None
    assert later is not None
    torch.testing.assert_close(together.trace()[:2], alone.trace())
    a, b = together.trace() / together.trace().mean(), later.trace() / later.trace().mean()
    assert float((a - b).abs().max()) > 1e-3, "new probes at another level"


def test_a_calibration_of_one_class(classes: Classes) -> None:
    """Its tables are the class's, whatever reads them; twin and curves stay; it is kept with its guidance."""
    pooled, tables, _ = classes
    held = replace(pooled, conditional=tables, guidance=2.0)
    again = Calibration.from_json(*held.to_json())
    assert again.guidance == 2.0
    for k in range(4):
        one, other = held.of_class(k), again.of_class(k)
        assert one.twin is pooled.twin
        assert one.conditional == {}
        for structure, table in tables.items():
            assert one.table(structure) is table.tables[k]
            torch.testing.assert_close(other.table(structure).variance, table.tables[k].variance, rtol=1e-6, atol=0)
    assert not torch.equal(held.of_class(1).table("pixel").variance, pooled.table("pixel").variance)
    with pytest.raises(UserError, match="0 to 3"):
        held.of_class(4)
    with pytest.raises(UserError, match="no tables by class"):
        pooled.of_class(0)
