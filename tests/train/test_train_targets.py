"""Stable targets in the loop: resumed bit for bit, the plain target untouched, settings that do not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.cli.console import Console
from lowvar.cli.train import run_training
from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.train import PlainTarget, StableTarget, Trainer, Update, config_from, fit
from lowvar.train.conditional import of_classes

BASE: dict[str, Any] = {
    "updates": 7,
    "batch_size": 6,
    "warmup": 0,
    "checkpoint_every": 3,
    "validate_every": 4,
    "head": "none",
    "prediction": "epsilon",
}


class Small(nn.Module):
    """A convolution of x and t."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.linspace(-0.2, 0.2, p.numel()).reshape(p.shape))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(torch.cat([x, (t / 1000).reshape(-1, 1, 1, 1).expand_as(x)], 1))


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    parts = (digits.train.images(range(20)), digits.calibration.images(range(8)), digits.test.images(range(8)))
    return Data("few digits", *(TensorImages(p) for p in parts), levels=17, fingerprint="few")


def make(data: Data, values: dict[str, Any], folder: Path | None = None, resume: bool = False) -> Trainer:
    return Trainer(data, config_from(BASE | values), folder, network=Small(), resume=resume, device="cpu")


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.ema_network().parameters()])


def losses(trainer: Trainer, updates: int = 100) -> list[float]:
    found = []
    for record in trainer.run():
        if isinstance(record, Update):
            found.append(record.loss)
            if record.update == updates:
                break
    return found


@pytest.mark.parametrize(("references", "neighbours"), [(5, None), ("all", 3)])
def test_resumed_run_is_bit_identical(references: Any, neighbours: int | None, data: Data, tmp_path: Path) -> None:
    values = {"target": "stable", "references": references, "neighbours": neighbours}
    whole = make(data, values)
    losses(whole)
    losses(make(data, values, tmp_path), 5)
    resumed = make(data, values, tmp_path, resume=True)
    assert resumed.update == 3
    losses(resumed)
    assert torch.equal(weights(resumed), weights(whole))


def test_training_loss_reads_lower_and_validation_is_plain(data: Data) -> None:
    """The same draws: the loss of the first update lacks target noise, the validation before it does not."""
    plain, stable = make(data, {}), make(data, {"target": "stable"})
    assert repr(plain.validate().validation) == repr(stable.validate().validation)  # nan where a bin is empty
    assert losses(stable, 1)[0] < losses(plain, 1)[0]


def test_the_loop_uses_the_updates_references(data: Data) -> None:
    trainer = make(data, {"target": "stable", "references": 5, "seed": 3})
    assert trainer.references is not None
    draws = trainer.plan.draws(0, trainer.times)
    target = trainer.references.target(0)
    assert isinstance(target, StableTarget)
    denoiser = trainer.denoiser
    with torch.no_grad():
        expected = trainer.objective.losses(denoiser, draws.x0, draws.eps, draws.level, target).loss.mean()
        plain = trainer.objective.losses(denoiser, draws.x0, draws.eps, draws.level, PlainTarget()).loss.mean()
    assert float(expected) != float(plain)
    assert losses(trainer, 1)[0] == pytest.approx(float(expected), abs=1e-7)


def test_the_loop_keeps_to_the_neighbours(data: Data) -> None:
    trainer = make(data, {"target": "stable", "references": "all", "neighbours": 4, "seed": 3})
    draws = trainer.plan.draws(0, trainer.times)
    target = StableTarget(data.train.images(range(20)), "among", neighbours=4)
    denoiser = trainer.denoiser
    with torch.no_grad():
        expected = trainer.objective.losses(denoiser, draws.x0, draws.eps, draws.level, target).loss.mean()
    assert losses(trainer, 1)[0] == pytest.approx(float(expected), abs=1e-7)


def test_processes_refer_to_the_same_images(data: Data) -> None:
    """Gradients of two parts average to the whole batch's."""
    trainer = make(data, {"target": "stable", "references": 5})
    assert trainer.references is not None
    target = trainer.references.target(4)
    denoiser = trainer.denoiser

    def mean(parts: int) -> float:
        total = 0.0
        for k in range(parts):
            d = trainer.plan.draws(4, trainer.times, k, parts)
            total += float(trainer.objective.losses(denoiser, d.x0, d.eps, d.level, target).loss.detach().mean())
        return total / parts

    assert mean(2) == pytest.approx(mean(1), abs=1e-6)


def test_records_say_what_the_weights_were_like(data: Data, tmp_path: Path) -> None:
    """Means over the updates since the last validation, also over a break."""
    values = {"target": "stable", "references": 500, "seed": 5}
    losses(make(data, values, tmp_path), 3)  # the checkpoint is of update 3, the validation of update 4
    list(make(data, values, tmp_path, resume=True).run())
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trainer = make(data, values)
    assert trainer.references is not None
    ess: list[float] = []
    alone: list[float] = []
    for update in range(7):
        draws = trainer.plan.draws(update, trainer.times)
        info = trainer.references.target(update).weighted(draws.x0, draws.eps, draws.level)[1]
        ess.append(float(info.ess.mean()))
        alone.append(float((info.ess < 1.5).double().mean()))
    for record, rows in zip(found, (slice(0, 4), slice(4, 7)), strict=True):
        assert record["target"]["ess"] == pytest.approx(sum(ess[rows]) / len(ess[rows]))
        assert record["target"]["alone"] == pytest.approx(sum(alone[rows]) / len(alone[rows]))
        assert (record["target"]["warning"] is None) == (record["target"]["alone"] <= 0.5)
    assert "target" not in make(data, {}).validate().record()
    assert make(data, values).validate().target is None  # no update yet


def test_memorisation_is_said_once(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"target": "stable", "references": 500, "validate_every": 1, "updates": 4, "train_timesteps": 1000}
    config = config_from(BASE | values | {"beta_schedule": "linear", "seed": 3, "batch_size": 1})
    fit(data, config, network=Small(), device="cpu")
    assert capsys.readouterr().err.count("with all data as references the network is shown the denoiser") == 1
    fit(data, dataclasses.replace(config, references=5), network=Small(), device="cpu")
    assert "the denoiser that memorises" not in capsys.readouterr().err


def test_the_command_line_says_it_once_too(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"target": "stable", "references": "all", "validate_every": 1, "updates": 4, "seed": 3, "batch_size": 1}
    trainer = make(data, values | {"beta_schedule": "linear"}, tmp_path)
    last = run_training(trainer, tmp_path, Console())
    assert last["target"]["alone"] in (0.0, 1.0)
    assert capsys.readouterr().err.count("warning: 100% of the targets are one training image") == 1


class Classy(Small):
    """A network that knows the class."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        return super().forward(x, t) + 0.1 * self.conv.weight.sum() * class_labels.reshape(-1, 1, 1, 1)


def test_the_loop_refers_to_the_class_that_the_network_is_told() -> None:
    """Half of the classes are dropped: those draws refer to all images."""
    digits, numbers = load("digits"), range(60)
    train, labels = digits.train.images(numbers), digits.train.labels
    assert labels is not None
    calibration = TensorImages(digits.calibration.images(range(8)), torch.arange(8) % 3)
    data = Data("few", TensorImages(train, labels[:60] % 3), calibration, calibration, levels=17, fingerprint="few")
    config = config_from(BASE | {"target": "stable", "references": 60, "conditional": True, "condition_dropout": 0.5})
    trainer = Trainer(data, config, network=Classy(), device="cpu")
    assert trainer.classes is not None
    draws = trainer.plan.draws(0, trainer.times)
    told = trainer.classes.labels(draws.number, draws.image)
    assert 0 < int((told == 3).sum()) < len(told)
    denoiser = trainer.denoiser
    total = 0.0
    for i, label in enumerate(told.tolist()):
        near = train if label == 3 else train[labels[:60] % 3 == label]
        known, one = of_classes(denoiser, told[i : i + 1]), slice(i, i + 1)
        target = StableTarget(near, "among")
        with torch.no_grad():
            found = trainer.objective.losses(known, draws.x0[one], draws.eps[one], draws.level[one], target)
        total += float(found.loss)
    assert losses(trainer, 1)[0] == pytest.approx(total / len(told), abs=1e-6)


def test_checkpoints_from_before_targets_resume(data: Data, tmp_path: Path) -> None:
    losses(make(data, {}, tmp_path), 5)
    file = tmp_path / "checkpoints" / "update-0000003" / "state.json"
    state = json.loads(file.read_text())
    for key in ("target", "references"):
        del state["identity"][key]
    file.write_text(json.dumps(state))
    assert make(data, {}, tmp_path, resume=True).update == 3
    with pytest.raises(UserError, match="made with target 'plain', now it is 'stable'"):
        make(data, {"target": "stable"}, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"references": 5}, "references is 5 and target plain; references belong to target stable"),
        ({"neighbours": 5}, "neighbours is 5 and target plain; neighbours belong to target stable"),
        ({"target": "stable", "references": "some"}, "the setting references is 'some': .*integer.* or .* be 'all'"),
        ({"target": "stabel"}, "the setting target is 'stabel'"),
        ({"target": "stable", "references": 0}, "the setting references is 0"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_from(values)
