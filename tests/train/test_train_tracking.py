"""Trackers and pictures of a run: what is logged is what was measured, and neither changes the run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.schedule import CosineVP
from lowvar.train import Record, Sampled, Trainer, Update, Validation, config_from
from lowvar.train.tracking import check_pictures, check_trackers, contact_sheet, draw_samples, scalars

BASE: dict[str, Any] = {
    "updates": 6,
    "batch_size": 8,
    "warmup": 1,
    "checkpoint_every": 2,
    "validate_every": 3,
    "head": "none",
    "train_timesteps": 100,
}


class Tiny(nn.Module):
    """Two convolutions and the time, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
            self.time, self.drop = nn.Linear(1, 4), nn.Dropout(0.2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(t[:, None] / 100)[:, :, None, None]
        return self.last(self.drop(torch.nn.functional.silu(hidden)))


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    train, rest = (TensorImages(split.images(range(20))) for split in (digits.train, digits.calibration))
    return Data("few digits", train, rest, rest, levels=17, fingerprint="few")


def make(data: Data, folder: Path | None, resume: bool = False, **values: Any) -> Trainer:
    return Trainer(data, config_from(BASE | values), folder, network=Tiny(), resume=resume, device="cpu")


def logged(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tracking"))
    found.Reload()
    return found


def weights(trainer: Trainer) -> Tensor:
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_what_is_logged_is_what_was_measured(data: Data, tmp_path: Path) -> None:
    """With a stop after update 5, whose event is logged and made again: every step once."""
    values = {"trackers": ["tensorboard"], "sample_every": 3}
    records: dict[tuple[type, int], Record] = {}
    for record in make(data, tmp_path, **values).run():
        records[type(record), record.update] = record
        if isinstance(record, Update) and record.update == 5:
            break
    resumed = make(data, tmp_path, resume=True, **values)
    assert resumed.update == 4
    for record in resumed.run():
        records[type(record), record.update] = record
    found = logged(tmp_path)
    for name, field in (("train/loss", "loss"), ("train/gradient norm", "grad_norm"), ("train/lr", "lr")):
        events = [(e.step, e.value) for e in found.Scalars(name)]
        assert events == [(u, pytest.approx(getattr(records[Update, u], field))) for u in range(1, 7)]
    for name, field in (("loss", "loss"), ("loss low", "low"), ("loss high", "high"), ("error", "error")):
        events = [(e.step, e.value) for e in found.Scalars(f"validation/{name}")]
        expected = [records[Validation, u] for u in (3, 6)]
        assert events == [
            (r.update, pytest.approx(getattr(r.validation, field))) for r in expected if isinstance(r, Validation)
        ]
    assert [e.step for e in found.Images("samples")] == [3, 6]
    picture = records[Sampled, 6]
    assert isinstance(picture, Sampled)
    assert picture.path == tmp_path / "samples" / "update-0000006.png"
    assert (found.Images("samples")[1].width, found.Images("samples")[1].height) == (53, 53)
    shown = np.asarray(Image.open(picture.path))
    denoiser = NetworkDenoiser(resumed.ema_network(), resumed.schedule, resumed.config.prediction)
    again = contact_sheet(draw_samples(denoiser, (1, 8, 8), resumed.config.seed, None, "cpu"))
    assert np.array_equal(shown, again[:, :, 0])


def test_neither_changes_the_run(data: Data, tmp_path: Path) -> None:
    ends = []
    for values in ({}, {"trackers": ["tensorboard"], "sample_every": 1}):
        trainer = make(data, tmp_path / str(len(values)), **values)
        for _ in trainer.run():
            pass
        ends.append(weights(trainer))
        assert trainer.accelerator.trackers == []
    assert torch.equal(*ends)
    assert not (tmp_path / "0" / "tracking").exists()
    assert not (tmp_path / "0" / "samples").exists()
    assert make(data, tmp_path / "2", resume=True).update == 6  # goes on without them


def test_sheet_holds_every_pixel() -> None:
    """Six a row, a white gap of a pixel; 7 pictures take two rows. Grey 0 is 128, beyond [-1, 1] is cut."""
    images = torch.arange(7.0)[:, None, None, None].expand(7, 3, 2, 4) / 7
    images = torch.cat([images[:6], torch.full((1, 3, 2, 4), -2.0)])
    page = contact_sheet(images)
    assert page.shape == (5, 29, 3)
    assert page[0, [0, 5, 10, 15, 20, 25], 1].tolist() == [round((i / 7 + 1) * 127.5) for i in range(6)]
    assert (page[:2, 4] == 255).all()
    assert (page[2] == 255).all()
    assert (page[3:, :4] == 0).all()
    assert (page[3:, 4:] == 255).all()


def test_classes_go_round() -> None:
    seen = []

    def network(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append(class_labels)
        return torch.zeros_like(x)

    draw_samples(NetworkDenoiser(network, CosineVP()), (1, 2, 2), 0, 10, "cpu")
    assert len(seen) == 20
    assert all(labels.tolist() == [i % 10 for i in range(36)] for labels in seen)


def test_numbers_that_are_not_finite_are_left_out() -> None:
    assert set(scalars(Update(1, 0.5, float("nan"), 1e-3))) == {"train/loss", "train/lr"}


def test_what_cannot_be_is_said(tmp_path: Path, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="trackers names tensorboard, and the run has no folder for its files"):
        make(data, None, trackers=["tensorboard"])
    with pytest.raises(UserError, match="sample_every writes pictures, and the run has no folder"):
        make(data, None, sample_every=1)
    for shape in ((7,), (4, 8, 8)):
        with pytest.raises(UserError, match=rf"the data have shape \({shape[0]},.*\); leave it out"):
            check_pictures(shape, tmp_path)
    with pytest.raises(UserError, match=r"the setting trackers\.0 is 'wandb': input should be 'tensorboard'"):
        config_from({"trackers": ["wandb"]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'lowvar\[track\]', or leave trackers out"):
        check_trackers(["tensorboard"], tmp_path)
