"""Post-hoc averages of a run: any length afterwards, exactly; kept files are thinned, and the same after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.train import PowerAverages, Trainer, Update, config_from, reconstruct_average
from lowvar.train.averaging import gamma_of, profile
from lowvar.train.kept_averages import AVERAGES, is_moment, keep_averages, kept_snapshots

BASE: dict[str, Any] = {
    "updates": 12,
    "batch_size": 8,
    "warmup": 1,
    "lr": 1e-2,
    "lr_schedule": "constant",
    "checkpoint_every": 12,
    "validate_every": 12,
    "head": "none",
    "posthoc_ema": True,
}


class Tiny(nn.Module):
    """Two convolutions, the time, and a buffer that never moves."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last, self.time = (
                nn.Conv2d(1, 4, 3, padding=1),
                nn.Conv2d(4, 1, 3, padding=1),
                nn.Linear(1, 4),
            )
        self.register_buffer("scale", torch.tensor(3.0))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.nn.functional.silu(self.first(x) + self.time(t[:, None] / 1000)[:, :, None, None]))


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    train, rest = (TensorImages(split.images(range(30))) for split in (digits.train, digits.calibration))
    return Data("few digits", train, rest, rest, levels=17, fingerprint="few")


def make(data: Data, folder: Path, resume: bool = False, **values: Any) -> Trainer:
    config = config_from(BASE | values)
    return Trainer(data, config, folder, network=Tiny(), resume=resume, device="cpu")


def weights_of(trainer: Trainer, stop: int | None = None) -> list[dict[str, Tensor]]:
    """The weights after every update."""
    found = []
    for record in trainer.run():
        if isinstance(record, Update):
            network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
            found.append({k: v.detach().clone() for k, v in network.state_dict().items()})
            if record.update == stop:
                break
    return found


@pytest.mark.parametrize("sigma_rel", [0.05, 0.08, 0.10, 0.15, 0.28])
def test_any_length_is_the_weighted_sum_of_all_weights(
    sigma_rel: float, data: Data, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Two averages after each of 12 updates span every average of 12 weights: float32 rounding, times coefficients
    of some hundreds, is all that is left."""
    history = weights_of(make(data, tmp_path))
    found = reconstruct_average(tmp_path, sigma_rel)
    share = profile(gamma_of(sigma_rel), 12, 12).tolist()
    assert found.keys() == {k for k in history[0] if k != "count"}
    for name, value in found.items():
        expected = sum(p * w[name].double() for p, w in zip(share, history, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-5)
        assert value.dtype == torch.float32
    moved = (history[-1]["first.weight"] - found["first.weight"]).abs().max()
    assert float(moved) > 1e-3  # the weights did move
    network = Tiny()
    network.load_state_dict(found, strict=False)
    assert torch.equal(network.state_dict()["last.bias"], found["last.bias"])
    earlier = reconstruct_average(tmp_path, sigma_rel, updates=7)["last.bias"].double()
    share = profile(gamma_of(sigma_rel), 7, 7).tolist()
    expected = sum(p * w["last.bias"].double() for p, w in zip(share, history[:7], strict=True))
    torch.testing.assert_close(earlier, expected, rtol=0, atol=1e-5)
    assert not [w for w in recwarn if "averages kept" in str(w.message)]


def test_interrupted_run_keeps_the_same(data: Data, tmp_path: Path) -> None:
    values: dict[str, Any] = {"checkpoint_every": 3}
    weights_of(make(data, tmp_path / "whole", **values))
    weights_of(make(data, tmp_path / "stopped", **values), stop=11)
    stray = tmp_path / "stopped" / AVERAGES / "update-0000012.safetensors"
    stray.write_bytes(b"of a future that did not come")
    resumed = make(data, tmp_path / "stopped", resume=True, **values)
    assert resumed.update == 9
    assert not stray.exists()
    weights_of(resumed)
    files = [sorted((tmp_path / name / AVERAGES).iterdir()) for name in ("whole", "stopped")]
    assert [f.name for f in files[0]] == [f"update-{u:07d}.safetensors" for u in range(1, 13)]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    for a, b in zip(*files, strict=True):
        ours, theirs = load_file(a), load_file(b)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_32_moments_are_enough(tmp_path: Path) -> None:
    """1,500 updates: lengths of 0.05 to 0.20 within 1% where weights wander."""
    averages = PowerAverages.of()
    values = [float(torch.tensor(u / 300.0).sin() + u / 2000) for u in range(1, 1501)]
    for update, value in enumerate(values, 1):
        averages = averages.updated({"w": torch.tensor(value, dtype=torch.float64)})
        if is_moment(update, 1500):
            keep_averages(tmp_path / AVERAGES, averages)
    kept = [int(path.name[7:14]) for path in sorted((tmp_path / AVERAGES).iterdir())]
    assert kept == [*range(47, 1500, 47), 1500]
    for sigma_rel in (0.05, 0.07, 0.12, 0.20):
        exact = float((profile(gamma_of(sigma_rel), 1500, 1500) * torch.tensor(values, dtype=torch.float64)).sum())
        assert float(reconstruct_average(tmp_path, sigma_rel)["w"]) == pytest.approx(exact, rel=0.01)


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has kept no averages; train with posthoc_ema: true"):
        reconstruct_average(tmp_path, 0.1)
    averages = PowerAverages.of().updated({"w": torch.ones(2)}).updated({"w": torch.zeros(2)})
    for _ in range(30):
        averages = averages.updated({"w": torch.zeros(2)})
    keep_averages(tmp_path / AVERAGES, averages)
    assert [s.updates for _, _, s in kept_snapshots(tmp_path)] == [32, 32]
    with pytest.raises(UserError, match=r"sigma_rel is 0.4; give a length above 0 and at most"):
        reconstruct_average(tmp_path, 0.4)
    with pytest.raises(UserError, match="no snapshot of at most 20 updates"):
        reconstruct_average(tmp_path, 0.1, updates=20)
    with pytest.warns(UserWarning, match=r"is met to \d+% only by the 2 averages"):
        reconstruct_average(tmp_path, 0.01)
    file = tmp_path / AVERAGES / "update-0000032.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="is damaged"):
        reconstruct_average(tmp_path, 0.1)
