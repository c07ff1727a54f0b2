"""Verdicts on denoisers that were trained or sampled wrongly: the fault is named first; a sound one has none."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import Data, TensorImages
from lowvar.process import CosineVP, Independent, NetworkDenoiser, ReverseKernel
from lowvar.process.covariance import Isotropic
from lowvar.process.grid import trailing
from lowvar.profile import (
    TECHNIQUES,
    ReverseVariance,
    TrainingProfile,
    profile_reverse,
    profile_training,
    ranked,
    sampling,
)
from lowvar.profile.faults import variance_fault
from lowvar.testing import rotation

torch.set_num_threads(1)

D, BUMPS = 8, 8
SCHEDULE = CosineVP()


class Bumps(nn.Module):
    """sum_k phi_k(t) W_k x, phi_k bumps in t that sum to 1: what is learned at a time stays at that time."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(BUMPS, D, D))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        centres = torch.linspace(0, 1, BUMPS, dtype=x.dtype)
        phi = torch.softmax(-(((timestep[:, None].to(x.dtype) / 1000 - centres) * BUMPS) ** 2), 1)
        return torch.einsum("nk,kij,nj->ni", phi, self.W.to(x.dtype), x)


@lru_cache(maxsize=1)
def rows() -> tuple[TensorImages, TensorImages, TensorImages]:
    """Training, calibration and test rows of a Gaussian with standard deviations .35 to .05 in turned axes."""
    z = Independent(0).normal(range(1200), (D,))
    x = (z * torch.linspace(0.35, 0.05, D) @ rotation(D, 3).float().T).clamp(-1, 1)
    return TensorImages(x[:800]), TensorImages(x[800:1000]), TensorImages(x[1000:])


def trained(batch: int = 64, updates: int = 400, lr: float = 0.03, first: float = 0.0, decay: bool = True) -> Bumps:
    """Adam at times uniform over [first, 1], on the loss of v."""
    network = Bumps()
    optimizer = torch.optim.Adam(network.parameters(), lr)
    images, noise, n = rows()[0], Independent(1), batch * updates
    x0 = images.images((noise.uniform([0], (n,), draw=0)[0] * len(images)).long())
    t = first + (1 - first) * noise.uniform([1], (n,), draw=0, dtype=torch.float64)[0]
    eps = noise.normal([2], (n, D), draw=0)[0]
    level = SCHEDULE.at(t.clamp_min(1e-4))
    a, s = level.alpha.float()[:, None], level.sigma.float()[:, None]
    for u in range(updates):
        rows_of = slice(u * batch, (u + 1) * batch)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - u / updates if decay else 1.0)
        x = a[rows_of] * x0[rows_of] + s[rows_of] * eps[rows_of]
        target = a[rows_of] * eps[rows_of] - s[rows_of] * x0[rows_of]
        loss = (network(x, 1000 * t[rows_of]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def denoiser_of(network: nn.Module) -> NetworkDenoiser:
    """It predicts v."""
    return NetworkDenoiser(network, SCHEDULE, "v_prediction")


def profiled(network: Bumps, batch_size: int = 64, blocks_of_time: float = 0.002) -> TrainingProfile:
    train, held_out, _ = rows()
    return profile_training(
        denoiser_of(network),
        train,
        held_out=held_out,
        techniques=TECHNIQUES[:1],
        minutes=blocks_of_time,
        batch_size=batch_size,
    )


@lru_cache(maxsize=1)
def sound() -> Bumps:
    return trained()


def test_a_sound_one_has_no_fault() -> None:
    """Its errors are those of the linear denoiser, which is the best there is here."""
    found = profiled(sound())
    assert not [line for line in found.verdict if line.fault]
    assert all(0.9 < e.excess.value < 1.1 for e in found.errors)
    assert len(found.errors) == BUMPS


def test_times_near_one_end() -> None:
    """Trained at the last quarter of the times alone: the first line says which levels were left out."""
    found = profiled(trained(first=0.75))
    first = found.verdict[0]
    assert first.fault
    assert first.do.startswith("train at the noise levels that were left out: logsnr ")
    bad = [e for e in found.errors if e.excess.low > 1.25]
    assert min(e.logsnr_low for e in bad) > float(SCHEDULE.logsnr(0.75)) - 0.1
    assert dict(first.settings) == {"times": "uniform"}
    assert first.low > 1.5
    assert found.errors[-1].excess.high < 1.1


def test_a_batch_of_two() -> None:
    """A constant learning rate that its noise does not bear: errors everywhere, and a noise scale of many batches."""
    found = profiled(trained(batch=2, updates=1000, lr=0.1, decay=False), batch_size=4, blocks_of_time=0.02)
    first = found.verdict[0]
    assert first.fault
    assert first.do.startswith("a batch of "), first
    assert first.settings["batch_size"] >= 16
    assert found.sources.noise_scale.low > 8
    assert len([line for line in found.verdict if "batch_size" in line.settings]) == 1


def wrong_by(factor: float) -> ReverseVariance:
    """A head that says C, isotropic and exact but for a factor."""
    spectrum = torch.linspace(0.35, 0.05, D).double() ** 2

    def covariance(x, level, posterior):  # type: ignore[no-untyped-def]
        c = spectrum * level.sigma**2 / (level.alpha**2 * spectrum + level.sigma**2)
        return Isotropic((factor * c.mean()).float(), (D,))

    return ReverseVariance("the head", ReverseKernel(1.0), covariance)


@lru_cache(maxsize=1)
def data() -> Data:
    train, calibration, test = rows()
    return Data("rows", train, calibration, test, None, "0" * 16)


@pytest.mark.parametrize(("factor", "said"), [(4.0, "large"), (0.25, "small"), (1.0, None)])
def test_a_head_that_is_wrong_by_a_factor(factor: float, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdict says so first, and by how much; it has nothing to say of the right one."""
    monkeypatch.setattr(sampling, "seconds_per_evaluation", lambda denoiser, x0: 1e-6)  # all images, however busy
    denoiser: NetworkDenoiser = denoiser_of(sound())
    grid = trailing(SCHEDULE, 6)
    found = profile_reverse(denoiser, data(), own=wrong_by(factor), grid=grid, seconds=0.5)
    assert found.paid is not None
    fault = variance_fault(found.checks["the head"], found.paid, "the head", {"sampler": "ddpm-basis"}, "calibrate")
    lines: list[Any] = [*profiled(sound()).verdict, *([] if fault is None else [fault])]
    first = ranked(lines)[0]
    if said is None:
        assert fault is None
        return
    assert first is fault
    assert first.do == f"another reverse variance: the head is too {said}"
    assert 3.5 < first.factor < 5  # the worst level's, so it errs upwards
    assert all(abs(i.value - 1 / factor) < 5 * i.se + 0.05 / factor for i in found.checks["the head"].posterior)
