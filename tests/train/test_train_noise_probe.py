"""The noise scale measured in a run: the blocks are independent, the numbers those of gradients taken by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.train import Trainer, Update, Validation, config_from
from lowvar.train.noise_probe import Blocks, moments
from lowvar.train.noise_scale import block_moments

BASE: dict[str, Any] = {
    "updates": 20,
    "batch_size": 12,
    "warmup": 1,
    "checkpoint_every": 5,
    "validate_every": 20,
    "head": "none",
    "train_timesteps": 100,
    "noise_scale_every": 1,
}


class Tiny(nn.Module):
    """A network of 61 weights."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
            self.time, self.drop = nn.Linear(1, 3), nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(t[:, None] / 100)[:, :, None, None]
        return self.last(self.drop(torch.nn.functional.silu(hidden)))


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    train = TensorImages(digits.train.images(range(40)), torch.arange(40) % 4)
    rest = TensorImages(digits.calibration.images(range(8)))
    return Data("few digits", train, rest, rest, levels=17, fingerprint="few")


def make(data: Data, values: dict[str, Any], folder: Path | None = None, dropout: float = 0.0, **more: Any) -> Trainer:
    return Trainer(data, config_from(BASE | values), folder, network=Tiny(dropout), device="cpu", **more)


def weights(trainer: Trainer) -> Tensor:
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def by_hand(trainer: Trainer, update: int, first: int, last: int) -> Tensor:
    """The gradient of v prediction's squared error on samples first .. last - 1 of an update, in plain torch."""
    draws = trainer.plan.draws(update, trainer.times)
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    alpha, sigma = (v.float()[:, None, None, None] for v in (draws.level.alpha, draws.level.sigma))
    out = network(alpha * draws.x0 + sigma * draws.eps, draws.bin.float())
    error = ((alpha * draws.eps - sigma * draws.x0 - out) ** 2).mean((1, 2, 3))
    found = torch.autograd.grad(error[first:last].mean(), list(network.parameters()))
    return torch.cat([g.flatten() for g in found]).double()


@pytest.mark.parametrize(
    ("values", "pieces"),
    [
        ({}, [(0, 0, 6), (0, 6, 12)]),
        ({"pairing": "cross"}, [(0, 0, 6), (0, 6, 12)]),
        ({"pairing": "orthogonal"}, [(0, 0, 4), (0, 4, 8), (0, 8, 12)]),  # three groups of four: no halves
        ({"pairing": "cross", "stratified": True}, [(0, 0, 12), (1, 0, 12)]),
        ({"pairing": "sobol"}, [(0, 0, 12), (1, 0, 12)]),
        ({"batch_size": 1}, [(0, 0, 1), (1, 0, 1)]),
    ],
    ids=["plain", "pairs", "thirds", "stratified", "sobol", "one sample"],
)
def test_measurement_is_that_of_gradients_by_hand(
    values: dict[str, Any], pieces: list[tuple[int, int, int]], data: Data
) -> None:
    trainer = make(data, values)
    expected = block_moments(
        torch.stack([by_hand(trainer, *piece) for piece in pieces]), samples=pieces[0][2] - pieces[0][1]
    )
    next(trainer.run())
    assert trainer.noise_scale is not None
    found = trainer.noise_scale.sums[0]
    torch.testing.assert_close(found[:2], torch.tensor(expected, dtype=torch.float64), rtol=2e-4, atol=1e-7)
    assert float(found[2]) == 1


@pytest.mark.parametrize("values", [{"target": "stable", "references": 8}, {"strata": "class"}])
def test_what_all_draws_share_makes_the_batch_one_group(values: dict[str, Any], data: Data) -> None:
    assert make(data, values)._blocks == Blocks(2, 12, 2, whole=True)  # pyright: ignore[reportPrivateUsage]


def test_all_data_as_references_are_no_chance(data: Data) -> None:
    trainer = make(data, {"target": "stable", "references": 40})
    assert trainer._blocks == Blocks(2, 6, 2, whole=False)  # pyright: ignore[reportPrivateUsage]


def test_measuring_changes_no_update(data: Data) -> None:
    ends = []
    for every in (0, 3):
        trainer = make(data, {"noise_scale_every": every, "times": "loss-second-moment"}, dropout=0.3)
        for _ in trainer.run():
            pass
        ends.append(weights(trainer))
    assert torch.equal(*ends)


def test_records_and_exact_resume(data: Data, tmp_path: Path) -> None:
    """16 measurements make an estimate; an interrupted run gives the same one, bit for bit."""
    values = {"validate_every": 4, "pairing": "cross", "times": "loss-second-moment"}
    for record in make(data, values, tmp_path / "whole", dropout=0.3).run():
        if isinstance(record, Validation):
            assert (record.noise_scale is None) == (record.update < 16)
    for record in make(data, values, tmp_path / "stopped", dropout=0.3).run():
        if isinstance(record, Update) and record.update == 18:
            break
    resumed = make(data, values, tmp_path / "stopped", dropout=0.3, resume=True)
    assert resumed.update == 15
    for _ in resumed.run():
        pass
    lines = [
        [json.loads(line).get("noise_scale") for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]
    assert lines[0][:3] == [None] * 3
    last = lines[0][-1]
    assert last["batch_size"] == 12
    assert last["variance"] > 0
    assert last["high"] is None or last["low"] < last["value"] < last["high"]
    assert "noise scale" in last["advice"]


def test_two_processes_measure_what_one_does(
    on_one_and_two_processes: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    """Every process's share is a block: the same two halves."""
    network = {"width": 8, "levels": 2}
    values = BASE | {"updates": 17, "batch_size": 8, "pairing": "cross", "network": network, "lr": 1e-4}
    on_one_and_two_processes(values)
    one, two = (json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])["noise_scale"] for n in "12")
    assert two["square"] == pytest.approx(one["square"], rel=2e-3)
    assert two["variance"] == pytest.approx(one["variance"], rel=2e-3)


def test_shares_of_whole_batches_over_processes() -> None:
    """Blocks that all processes share: their shares' gradients are averaged first (two processes by hand)."""
    shares = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[5.0, 0.0], [1.0, 4.0]]])  # process, block, weight
    blocks = Blocks.of(batch_size=8, group=8, processes=2)
    given = iter(shares.sum(0))
    found = moments(shares[0], blocks, lambda _: next(given), processes=2)
    assert found == block_moments(shares.mean(0), samples=8)


def test_blocks_of_prime_numbers_of_groups() -> None:
    assert Blocks.of(9, 1, 1) == Blocks(3, 3, 3, whole=False)
    assert Blocks.of(7, 1, 1) == Blocks(7, 1, 7, whole=False)
    assert Blocks.of(12, 2, 3) == Blocks(3, 4, 1, whole=False)
    assert Blocks.of(12, 12, 3).whole
    assert Blocks.of(12, 4, 2).whole  # a share of 6 cannot hold whole groups of 4
