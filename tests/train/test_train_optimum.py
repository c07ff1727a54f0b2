"""Bounds of the optimal loss around the optimum of a Gaussian, where it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.calibrate import fit_twin
from lowvar.data import Data, TensorImages, load
from lowvar.process import CosineVP, Independent
from lowvar.train import Trainer, UniformTimes, Update, Validation, config_from
from lowvar.train.linear_loss import bin_nodes
from lowvar.train.optimum import linear_high, memorising_low, optimum_bounds

SCHEDULE = CosineVP()


def test_bounds_enclose_the_optimum_of_a_gaussian() -> None:
    """x_0 ~ N(0, diag(1, 1/4)): 40 data sets of 50 training images, mean of the bounds against the exact mmse."""
    c = torch.tensor([1.0, 0.25], dtype=torch.float64)
    for t in (0.3, 0.7):
        level = SCHEDULE.at(t)
        optimum = float((c * level.sigma**2 / (level.alpha**2 * c + level.sigma**2)).mean())
        lows, highs = [], []
        for seed in range(40):
            x = c.sqrt() * Independent(seed).normal(range(100), (2,), dtype=torch.float64)
            train, held_out = x[:50], x[50:]
            image = torch.arange(200) % 50
            eps = Independent(seed).normal(range(200), (2,), draw=1, dtype=torch.float64)
            here = SCHEDULE.at(torch.full((200,), t, dtype=torch.float64))
            lows.append(memorising_low(train, image, eps, here).mean())
            highs.append(linear_high(fit_twin([train]), held_out, level))
        low, high = torch.stack(lows), torch.stack(highs)
        assert float(low.mean() - 3 * low.std() / 40**0.5) < optimum
        assert float(high.mean() + 3 * high.std() / 40**0.5) > optimum
        if t == 0.3:  # with little noise the memorised images are far apart: strictly below
            assert float(low.mean() + 3 * low.std() / 40**0.5) < optimum


def test_linear_high_is_the_twin_on_its_own_images() -> None:
    x = Independent(1).normal(range(30), (4,), dtype=torch.float64)
    twin, level = fit_twin([x]), SCHEDULE.at(0.4)
    torch.testing.assert_close(linear_high(twin, x, level), twin.mmse(level), rtol=1e-10, atol=0)


def pairs(n: int, first: int = 0) -> Tensor:
    """n pictures of two pixels, independent normal with variances .04 and .01."""
    c = torch.tensor([0.04, 0.01])
    return (c.sqrt() * Independent(3).normal(range(first, first + n), (2,))).reshape(n, 1, 1, 2)


@pytest.mark.parametrize("steps", [None, 12])
def test_bounds_by_bin_enclose_the_optimum_of_a_gaussian(steps: int | None) -> None:
    """v prediction: k = 1 + snr; 4,096 of 5,000 images, 2,000 draws a bin. Linear is optimal: `high` is near by."""
    times = UniformTimes(steps)
    train, held_out = TensorImages(pairs(5_000)), [pairs(3_000, 5_000), pairs(5_000, 8_000)]
    found = optimum_bounds(train, held_out, SCHEDULE, times, "v_prediction", draws=2_000)
    u, weight = bin_nodes(times, 8)
    level = SCHEDULE.at(times.at(u.flatten()).t)
    c = torch.tensor([0.04, 0.01], dtype=torch.float64)[:, None]
    mmse = (c * level.sigma**2 / (level.alpha**2 * c + level.sigma**2)).mean(0)
    optimum = (((1 + level.logsnr.exp()) * mmse).reshape(u.shape) * weight).sum(1)
    low, high = torch.tensor(found.bins, dtype=torch.float64).T
    assert float((high / optimum - 1).abs().max()) < 0.03
    assert float((low / optimum).max()) < 1 + 4 * (1.5 / 2_000) ** 0.5  # a squared normal error's spread, 4 deviations
    assert float((low / optimum)[4:].min()) > 0.9  # with much noise 4,096 images are as good as all
    assert found.low == pytest.approx(float(low.mean()), rel=1e-12)
    assert found.high == pytest.approx(float(high.mean()), rel=1e-12)


def test_the_bound_of_a_network_that_knows_the_class() -> None:
    """One image a class: given the class nothing is left to know; without it all is, where there is noise alone."""
    train, labels = TensorImages(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1)), torch.tensor([0, 1])
    for known, low in ((labels, 0.0), (None, 1.0)):
        found = optimum_bounds(
            train, [pairs(4)[..., :1]], SCHEDULE, UniformTimes(), "sample", labels=known, bins=64, draws=512
        )
        assert found.bins[-1][0] == pytest.approx(low, abs=0.02)


BASE: dict[str, Any] = {
    "updates": 9,
    "batch_size": 8,
    "warmup": 0,
    "checkpoint_every": 4,
    "validate_every": 3,
    "network": {"width": 8, "levels": 2},
    "train_timesteps": 50,
}


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    train, rest = (TensorImages(split.images(range(30))) for split in (digits.train, digits.calibration))
    return Data("few digits", train, rest, rest, levels=17, fingerprint="few")


def test_records_of_a_run_and_of_a_resumed_one(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE)
    trainer = Trainer(data, config, tmp_path / "whole", device="cpu")
    tables, changes = [], []
    values_of = trainer.watch.validation.values
    trainer.watch.validation.values = lambda *words: tables.append(values_of(*words)) or tables[-1]  # type: ignore[method-assign]
    for record in trainer.run():
        if isinstance(record, Validation):
            changes.append(record.change)
            assert record.optimum == trainer.watch.optimum
            assert record.validation.error_low < record.validation.error < record.validation.error_high
    assert changes[0] is None
    for k in (1, 2):
        change, validation = changes[k], trainer.watch.validation
        assert change is not None
        assert change.since == 3 * k
        difference = tables[k] - tables[k - 1]
        difference[:, 3:] = tables[k][:, 3:]
        total = validation.measured(difference).total
        assert (change.value, change.low, change.high) == pytest.approx((total.value, *total.interval), rel=1e-12)
        apart = [validation.measured(t).total for t in tables[k - 1 : k + 1]]
        assert change.value == pytest.approx(apart[1].value - apart[0].value, abs=4 * total.se + 2e-2)
        assert total.se < 0.7 * sum(a.se**2 for a in apart) ** 0.5  # what common noise is for
    for record in Trainer(data, config, tmp_path / "stopped", device="cpu").run():
        if isinstance(record, Update) and record.update == 7:
            break
    resumed = Trainer(data, config, tmp_path / "stopped", resume=True, device="cpu")
    assert resumed.update == 4
    for _ in resumed.run():
        pass
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    )
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in r.items() if k not in timing} for r in whole] == [
        {k: v for k, v in r.items() if k not in timing} for r in stopped
    ]
    last = whole[-1]
    assert last["change"].keys() == {"since", "value", "low", "high"}
    assert last["optimum_low"] < last["optimum_high"]
    assert sum(b["optimum_low"] for b in last["bins"]) / 8 == pytest.approx(last["optimum_low"])
    assert sum(b["error"] for b in last["bins"]) / 8 == pytest.approx(last["validation_error"])
