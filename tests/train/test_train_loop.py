"""The loop: it learns, an interrupted run ends in the same bits, and what goes wrong is said in a sentence."""

from __future__ import annotations

import errno
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.process import GaussianTwin, MatrixBasis
from lowvar.process.head import head_channels
from lowvar.train import (
    NonFiniteError,
    Saved,
    TrainConfig,
    Trainer,
    Update,
    Validation,
    checkpoints,
    config_from,
    fit,
    spectrum,
)

BASE: dict[str, Any] = {
    "updates": 8,
    "batch_size": 6,
    "warmup": 2,
    "checkpoint_every": 3,
    "validate_every": 4,
    "network": {"width": 8},
}


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    return Data(
        "few digits",
        TensorImages(digits.train.images(range(20))),
        TensorImages(digits.calibration.images(range(8))),
        TensorImages(digits.test.images(range(8))),
        levels=17,
        fingerprint="few",
    )


def trained(trainer: Trainer) -> Tensor:
    """All weights, raw and averaged, in one vector."""
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    both = [*network.parameters(), *trainer.ema_network().parameters()]
    return torch.cat([p.detach().flatten() for p in both])


def run(trainer: Trainer, updates: int | None = None) -> list[Any]:
    """Records up to a number of updates; then the generator is dropped, as a killed process would be."""
    records = []
    for record in trainer.run():
        records.append(record)
        if updates is not None and isinstance(record, Update) and record.update == updates:
            break
    return records


VARIANTS: list[dict[str, Any]] = [
    {},
    {
        "head": "logvar",
        "prediction": "v_prediction",
        "times": "loss-second-moment",
        "train_timesteps": 4,
        "updates": 14,
    },
    {"head": "none", "weighting": "min-snr", "lr_schedule": "constant"},
    {"head": "basis", "basis": "pca", "detach_mean": False},
    {"head": "lowrank", "rank": 2, "head_loss": "vlb", "weighting": "none", "detach_mean": False},
]


class Tiny(nn.Module):
    """A network for tests of the loop, with dropout."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.time = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(1, 8)
            self.drop, self.last = nn.Dropout(0.2), nn.Conv2d(8, out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        return self.last(self.drop(torch.nn.functional.silu(hidden)))


def make(data: Data, config: TrainConfig, folder: Path | None = None, resume: bool = False) -> Trainer:
    outputs = head_channels(config.network_head, 1, config.head_rank)
    return Trainer(data, config, folder, network=Tiny(outputs), resume=resume, device="cpu")


@pytest.mark.parametrize("variant", VARIANTS, ids=["hybrid", "logvar-importance", "min-snr", "basis", "low rank bound"])
def test_resumed_run_is_bit_identical(variant: dict[str, Any], data: Data, tmp_path: Path) -> None:
    config = config_from(BASE | variant)
    undisturbed = make(data, config, tmp_path / "whole")
    run(undisturbed)
    expected = trained(undisturbed)
    for stop in (1, 3, 5, 7):
        folder = tmp_path / f"stopped-{stop}"
        run(make(data, config, folder), stop)
        resumed = make(data, config, folder, resume=True)
        # the generator is left right after the update, before its checkpoint
        assert resumed.update == (stop - 1) // 3 * 3
        run(resumed)
        assert torch.equal(trained(resumed), expected), f"stopped after update {stop}"
    whole, last = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped-7")
    )
    timing = ("seconds", "images_per_second")
    assert [{k: v for k, v in r.items() if k not in timing} for r in whole] == [
        {k: v for k, v in r.items() if k not in timing} for r in last
    ]


def test_resumed_unet_is_bit_identical(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE | {"updates": 6})
    whole = Trainer(data, config, device="cpu")
    run(whole)
    run(Trainer(data, config, tmp_path, device="cpu"), 5)
    resumed = Trainer(data, config, tmp_path, resume=True, device="cpu")
    assert resumed.update == 3
    run(resumed)
    assert torch.equal(trained(resumed), trained(whole))


def test_resumed_basis_is_the_checkpoints(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors of another machine (here: turned round) do not reach a resumed run."""
    config = config_from(BASE | {"head": "basis", "basis": "pca", "updates": 6})
    whole = make(data, config)
    run(whole)
    run(make(data, config, tmp_path), 5)
    fit_twin = spectrum.fit_twin

    def elsewhere(*words: Any) -> GaussianTwin:
        twin = fit_twin(*words)
        shape = twin.basis.event_shape
        return GaussianTwin(twin.mean, MatrixBasis(twin.basis.matrix().flip(0), shape), twin.spectrum)

    monkeypatch.setattr(spectrum, "fit_twin", elsewhere)
    resumed = make(data, config, tmp_path, resume=True)
    run(resumed)
    assert torch.equal(trained(resumed), trained(whole))
    fresh = make(data, config)
    run(fresh)
    assert not torch.equal(trained(fresh), trained(whole))


def test_checkpoints_from_before_a_setting_resume(data: Data, tmp_path: Path) -> None:
    """A setting that a checkpoint does not know had the meaning of its default."""
    config = config_from(BASE)
    run(make(data, config, tmp_path), 5)
    file = tmp_path / "checkpoints" / "update-0000003" / "state.json"
    state = json.loads(file.read_text())
    for key in ("rank", "basis", "head_loss", "detach_mean"):
        del state["identity"][key]
    file.write_text(json.dumps(state))
    assert make(data, config, tmp_path, resume=True).update == 3
    with pytest.raises(UserError, match="made with detach_mean True, now it is False"):
        make(data, config_from(BASE | {"detach_mean": False}), tmp_path, resume=True)


def test_stopped_twice_and_between_validation_and_checkpoint(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE | {"validate_every": 3})
    expected = make(data, config)
    run(expected)
    first = make(data, config, tmp_path)
    for record in first.run():
        if isinstance(record, Validation) and record.update == 6:
            break  # the line of update 6 is written, its checkpoint is not
    second = make(data, config, tmp_path, resume=True)
    assert second.update == 3
    run(second, 4)
    third = make(data, config, tmp_path, resume=True)
    run(third)
    assert torch.equal(trained(third), trained(expected))
    lines = [json.loads(line)["update"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [3, 6, 8]


def test_records_and_files(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE)
    trainer = Trainer(data, config, tmp_path, device="cpu")
    records = run(trainer)
    assert [r.update for r in records if isinstance(r, Update)] == list(range(1, 9))
    assert [r.update for r in records if isinstance(r, Validation)] == [4, 8]
    assert [r.update for r in records if isinstance(r, Saved)] == [3, 6, 8]
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["update-0000006", "update-0000008"]
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["low"] < record["validation_loss"] < record["high"]
    assert len(record["bins"]) == 8
    assert {"logsnr", "logsnr_low", "logsnr_high", "n", "loss", "se"} <= record["bins"][0].keys()
    assert record["images_per_second"] > 0
    rates = [r.lr for r in records if isinstance(r, Update)]
    assert rates[0] == 0.0  # diffusers' warm-up begins at 0
    assert max(rates) == pytest.approx(config.lr)


def test_it_learns(data: Data) -> None:
    config = config_from(BASE | {"updates": 40, "batch_size": 16, "lr": 5e-3, "ema": 0.9, "validate_every": 40})
    fitted = fit(data, config, device="cpu", progress=False)
    assert fitted.last.validation.error < 0.7  # 1 for an untrained network
    assert fitted.last.validation.variance is not None
    assert not fitted.network.training


def test_processes_make_the_gradient_of_one(data: Data) -> None:
    """Mean of the parts' gradients = the whole batch's gradient (what DDP averages), 1e-6."""
    trainer = Trainer(data, config_from(BASE), device="cpu")
    denoiser, objective = trainer.denoiser, trainer.objective

    def gradient(parts: int) -> Tensor:
        network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
        network.zero_grad()
        for k in range(parts):
            d = trainer.plan.draws(5, trainer.times, k, parts)
            loss = (d.weight.float() * objective.losses(denoiser, d.x0, d.eps, d.level).loss).mean() / parts
            loss.backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    assert torch.allclose(gradient(1), gradient(3), atol=1e-6)


# ----------------------------------------------------------------------------------------------------- what goes wrong


class Breaks(nn.Module):
    """A network that overflows at noise levels above a time once it has been called a number of times."""

    def __init__(self, calls: int, where: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.calls, self.where = calls, where

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls -= 1
        out = torch.cat([x, x], 1) * self.weight.repeat_interleave(x.shape[1])[:, None, None]
        if self.calls >= 0:
            return out
        if self.where == "loss":
            return torch.where((t >= 500)[:, None, None, None], out * float("inf"), out)
        out.register_hook(lambda g: g * float("nan"))
        return out


def test_loss_that_is_not_finite(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE | {"validate_every": 100, "updates": 100})
    trainer = Trainer(data, config, tmp_path, network=Breaks(4, "loss"), device="cpu")
    with pytest.raises(NonFiniteError) as caught:
        run(trainer)
    message = str(caught.value)
    assert message.startswith("the loss is not finite at update 5 in the logsnr bin ")
    assert "the last checkpoint is kept" in message
    assert "\n" not in message
    assert bool(torch.isfinite(trained(trainer)).all())
    kept = checkpoints.latest(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.state["update"] == 3


def test_gradient_that_is_not_finite(data: Data) -> None:
    trainer = Trainer(data, config_from(BASE), network=Breaks(2, "gradient"), device="cpu")
    with pytest.raises(NonFiniteError, match="the gradient is not finite at update 3; lower lr"):
        run(trainer)
    assert bool(torch.isfinite(trained(trainer)).all())


@pytest.mark.parametrize(
    ("error", "caught"),
    [(OSError(errno.ENOSPC, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
    ids=["disk full", "Ctrl-C"],
)
def test_interrupted_checkpoint(
    error: BaseException, caught: type[BaseException], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_from(BASE)
    save_file, written = checkpoints.save_file, []

    def failing(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        if len(written) == 5:  # within the second checkpoint
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(caught) as raised:
        run(make(data, config, tmp_path))
    if caught is UserError:
        assert "No space left on device" in str(raised.value)
        assert "--resume" in str(raised.value)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-0000003"]
    resumed, whole = make(data, config, tmp_path, resume=True), make(data, config)
    run(resumed)
    run(whole)
    assert torch.equal(trained(resumed), trained(whole))


def test_others_stop_where_the_main_process_cannot_write(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is not the main one hears of a failed checkpoint, and does not wait for ever."""
    from accelerate import Accelerator

    from lowvar.train import together

    trainer = make(data, config_from(BASE), tmp_path)
    failed = [0.0]
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    monkeypatch.setattr(together, "summed", lambda accelerator, value: value + failed[0])
    trainer._save(tmp_path)  # pyright: ignore[reportPrivateUsage]
    assert list(tmp_path.iterdir()) == []
    failed[0] = 1.0
    with pytest.raises(UserError, match=r"the main process could not write .*update-0000000"):
        trainer._save(tmp_path)  # pyright: ignore[reportPrivateUsage]


def test_refusals(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE | {"updates": 3})
    run(Trainer(data, config, tmp_path, device="cpu"))
    with pytest.raises(UserError, match=r"holds checkpoints of a run; go on with --resume"):
        Trainer(data, config, tmp_path, device="cpu")
    with pytest.raises(UserError, match=r"made with lr 0.002, now it is 0.1; resume with the same settings"):
        Trainer(data, config_from(BASE | {"updates": 3, "lr": 0.1}), tmp_path, resume=True, device="cpu")
    with pytest.raises(UserError, match="nothing to resume"):
        Trainer(data, config, resume=True, device="cpu")
    (tmp_path / "checkpoints" / "update-0000003" / "ema.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"update-0000003 is damaged"):
        Trainer(data, config, tmp_path, resume=True, device="cpu")


def test_resume_of_a_finished_run_gives_its_validation(data: Data, tmp_path: Path) -> None:
    config = config_from(BASE | {"updates": 3})
    first = fit(data, config, tmp_path, device="cpu", progress=False)
    again = fit(data, config, tmp_path, resume=True, device="cpu", progress=False)
    assert again.last.validation == first.last.validation


def test_progress_is_on_stderr(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    fit(data, config_from(BASE | {"updates": 2}), device="cpu")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "train: 100%" in captured.err


def test_bf16_runs(data: Data) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]  # one precision a process otherwise
    try:
        records = run(Trainer(data, config_from(BASE | {"mixed_precision": "bf16"}), device="cpu"))
        assert all(torch.isfinite(torch.tensor(r.loss)) for r in records if isinstance(r, Update))
        with pytest.raises(UserError, match="mixed_precision is no, and a run of this process began with bf16"):
            Trainer(data, config_from(BASE), device="cpu")
    finally:
        AcceleratorState._reset_state(True)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments(tmp_path: Path) -> None:
    """A process killed twenty times while it trains and writes checkpoints ends in the bits of an undisturbed one."""
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from lowvar.data import load\n"
        "from lowvar.train import config_from, fit\n"
        f"config = config_from({BASE | {'updates': 400, 'checkpoint_every': 2, 'validate_every': 50}!r})\n"
        "fitted = fit(load('digits'), config, sys.argv[1], resume=True, device='cpu')\n"
        "torch.save(fitted.network.state_dict(), sys.argv[1] + '/final.pt')\n"
    )

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.DEVNULL)

    def reached(folder: Path) -> int:
        """The update of the newest checkpoint, which must open; 0 without one."""
        kept = checkpoints.latest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
        return 0 if kept is None else int(kept.state["update"])

    def folders(folder: Path) -> set[str]:
        return {p.name for p in (folder / "checkpoints").glob("update-*[0-9]")}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(300) == 0
    moments, kills = random.Random(0), 0
    while kills < 20:
        before = folders(killed)
        process = start(killed)
        while process.poll() is None and not folders(killed) - before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.15))
        assert process.poll() is None, f"the run ended after {kills} kills; give it more updates"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        kills += 1
        assert reached(killed) > 0
    assert start(killed).wait(300) == 0
    a, b = (torch.load(folder / "final.pt", weights_only=True) for folder in (whole, killed))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path: Path, on_one_and_two_processes: Any) -> None:
    """The same global batch on one and on two CPU processes: predictions to 1e-5, losses to 1e-6, learned times."""
    settings = BASE | {"times": "loss-second-moment", "train_timesteps": 4, "updates": 14, "warmup": 0, "lr": 1e-4}
    (a, times_a), (b, times_b) = on_one_and_two_processes(settings)
    assert torch.allclose(a, b, atol=1e-5)
    assert torch.equal(times_a["counts"], times_b["counts"])
    assert torch.allclose(times_a["losses"], times_b["losses"], atol=1e-6)
    lines = [(tmp_path / str(n) / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    assert len(lines[0]) == len(lines[1]) == 4
    last = [json.loads(part[-1]) for part in lines]
    assert last[0]["validation_loss"] == pytest.approx(last[1]["validation_loss"], rel=1e-5)
