"""Shares of the posterior covariance: against a Gaussian's closed form, a mixture's, and squares done wrong."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from lowvar.process import CosineVP, Independent
from lowvar.process.basis import DCTBasis, MatrixBasis
from lowvar.process.jacobian import JacobianCovariance
from lowvar.process.twin import GaussianTwin
from lowvar.profile.structure import Structure, StructureBlocks, structure_blocks
from lowvar.testing import anisotropic_gaussian
from lowvar.testing.mixture import mixture2

torch.set_num_threads(1)


class Rows:
    """Events of any size."""

    labels = None

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def images(self, indices: Tensor) -> Tensor:
        return self.values[indices]


LEVELS = CosineVP().at(torch.tensor([0.3, 0.7], dtype=torch.float64))


def measured(denoiser, images: Tensor, pca, rounds: int, rank: int = 2) -> list[Structure]:  # type: ignore[no-untyped-def]
    stream = structure_blocks(denoiser, Rows(images), LEVELS, pca, Independent(5), rank=rank, size=128)
    found = list(islice(stream, rounds))
    return [StructureBlocks.joined([r[k] for r in found]).shares() for k in range(len(LEVELS))]


def test_a_gaussian_has_the_shares_of_its_matrix() -> None:
    """C is one matrix: every share against linear algebra, in both senses, within 5 of its standard errors."""
    target = anisotropic_gaussian((6,), 20.0)
    x = target.twin.sample(Independent(2).normal(range(512), (6,), dtype=torch.float64))
    found = measured(target.denoiser(CosineVP()), x, target.twin.basis, 4)
    S = target.covariance
    for k, one in enumerate(found):
        level = LEVELS[k]
        C = level.sigma**2 * S @ torch.linalg.inv(level.alpha**2 * S + level.sigma**2 * torch.eye(6))
        whole = C.square().sum()
        wanted = {
            "isotropic": C.trace() ** 2 / 6 / whole,
            "pixel": C.diagonal().square().sum() / whole,
            "pca": torch.tensor(1.0, dtype=torch.float64),
        }
        assert one.norm.value == pytest.approx(float(whole) / 6, abs=5 * one.norm.se)
        for name, value in wanted.items():
            for share in (one.state[name], one.table[name]):
                assert abs(share.value - float(value)) < 5 * share.se + 1e-9, (k, name)
                assert share.se < 0.15
        values = torch.linalg.eigvalsh(C).flip(0)
        best = (values[:2].square().sum() + values[2:].sum() ** 2 / 4) / whole
        assert 0.7 * float(best) < one.state["low-rank"].value < float(best) + 5 * one.state["low-rank"].se


def test_a_table_catches_less_where_the_state_matters() -> None:
    """A mixture whose posterior variance varies with x_t: the isotropic table against quadrature by samples."""
    target, schedule = mixture2(), CosineVP()
    x0 = target.sample(range(4096), Independent(1))
    denoiser = target.denoiser(schedule, None)
    found = measured(denoiser, x0, target.twin.basis, 16, rank=1)
    for k, one in enumerate(found):
        level = LEVELS[k]
        x = level.alpha * x0 + level.sigma * Independent(3).normal(range(4096), (2,), dtype=torch.float64)
        C = JacobianCovariance(denoiser)(x, level).covariance
        assert C is not None
        M = C.dense()
        whole, tr = M.square().sum((1, 2)).mean(), M.diagonal(dim1=1, dim2=2).sum(1)
        wanted = {"state": (tr**2).mean() / 2 / whole, "table": tr.mean() ** 2 / 2 / whole}
        for sense, value in wanted.items():
            share = getattr(one, sense)["isotropic"]
            assert abs(share.value - float(value)) < 5 * share.se + 0.02, (k, sense)
        assert wanted["table"] < 0.95 * wanted["state"]


def test_one_probe_squared_is_caught() -> None:
    """The known bug, (z C z)^2 for (tr C)^2, is too large by 2 ||C||^2 / (tr C)^2 and outside the interval."""
    twin = GaussianTwin(torch.zeros(4), MatrixBasis(torch.eye(4), (4,)), torch.tensor([1.0, 0.1, 0.1, 0.1]))
    x = twin.sample(Independent(2).normal(range(256), (4,)))
    stream = structure_blocks(twin.denoiser(CosineVP()), Rows(x), LEVELS, twin.basis, Independent(5), size=256)
    blocks = next(stream)[0]
    wrong = StructureBlocks(
        blocks.logsnr,
        blocks.whole,
        {"isotropic": 4 * blocks.features["isotropic"][:, 0] ** 2 / 4},
        {},
        blocks.d,
    ).shares()
    right = blocks.shares()
    C = LEVELS[0].sigma ** 2 * twin.spectrum / (LEVELS[0].alpha ** 2 * twin.spectrum + LEVELS[0].sigma ** 2)
    truth = float(C.sum() ** 2 / 4 / C.square().sum())
    assert right.state["isotropic"].low < truth < right.state["isotropic"].high
    assert truth < wrong.state["isotropic"].low


def test_images_have_a_cosine_transform() -> None:
    """A covariance that is diagonal in the DCT: its share there is 1, in pixels below."""
    basis = DCTBasis((1, 4, 4))
    spectrum = torch.linspace(2, 0.05, 16).reshape(1, 4, 4) ** 2
    twin = GaussianTwin(torch.zeros(1, 4, 4), basis, spectrum)
    x = twin.sample(Independent(2).normal(range(64), (1, 4, 4)))
    one = measured(twin.denoiser(CosineVP()), x, twin.basis, 4)[1]
    assert one.state["dct"].low < 1 < one.state["dct"].high
    assert one.table["pixel"].high < one.table["dct"].low
    assert "low-rank" in one.state
    assert "low-rank" not in one.table


def test_too_few_states() -> None:
    with pytest.raises(ValueError, match="3 states; an interval needs at least 16"):
        StructureBlocks(0.0, torch.ones(3), {}, {}, 1).shares()
