"""Draw plans in the training loop: exact resume, splits, settings that exclude each other, learned times."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.train import (
    EntropyRateTimes,
    GivenTarget,
    GradientNormTimes,
    RunningMeans,
    StableTarget,
    Trainer,
    Update,
    config_from,
    make_plan,
    make_schedule,
    make_times,
)
from lowvar.train.norm_probe import squared_norm

BASE: dict[str, Any] = {
    "updates": 6,
    "batch_size": 8,
    "warmup": 1,
    "checkpoint_every": 2,
    "validate_every": 6,
    "head": "none",
    "train_timesteps": 100,
}


class Tiny(nn.Module):
    """A network with dropout, whose random numbers a resumed run must repeat."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.time = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(1, 6)
            self.drop, self.last = nn.Dropout(0.2), nn.Conv2d(6, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.first(x) + self.time(t[:, None] / 100)[:, :, None, None]
        return self.last(self.drop(torch.nn.functional.silu(hidden)))


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    rows = range(20)
    return Data(
        "few digits",
        TensorImages(digits.train.images(rows), torch.arange(20) % 4),
        TensorImages(digits.calibration.images(range(8))),
        TensorImages(digits.test.images(range(8))),
        levels=17,
        fingerprint="few",
    )


def make(data: Data, values: dict[str, Any], folder: Path | None = None, resume: bool = False) -> Trainer:
    return Trainer(data, config_from(BASE | values), folder, network=Tiny(), resume=resume, device="cpu")


def run(trainer: Trainer, updates: int | None = None) -> Tensor:
    for record in trainer.run():
        if updates is not None and isinstance(record, Update) and record.update == updates:
            break
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    both = [*network.parameters(), *trainer.ema_network().parameters()]
    return torch.cat([p.detach().flatten() for p in both])


KINDS: list[dict[str, Any]] = [
    {"pairing": "cross", "stratified": True, "times": "gradient-norm"},
    {"pairing": "same", "times": "entropy-rate", "weighting": "min-snr"},
    {"pairing": "sobol", "times": "mode", "times_weighted": True},
    {"pairing": "orthogonal", "times": "logit-normal", "strata": "class"},
    {"coupling": "immiscible", "times": "lognormal", "times_weighted": True},
    {"coupling": "optimal-transport", "stratified": True},
    {"times": "learned-schedule", "stratified": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_resumed_run_is_bit_identical(kind: dict[str, Any], data: Data, tmp_path: Path) -> None:
    expected = run(make(data, kind))
    run(make(data, kind, tmp_path), 5)
    resumed = make(data, kind, tmp_path, resume=True)
    assert resumed.update == 4
    assert torch.equal(run(resumed), expected)
    assert not torch.equal(run(make(data, {})), expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_parts_make_the_gradient_of_the_whole(kind: dict[str, Any], data: Data) -> None:
    """Mean of the parts' gradients, which processes and accumulation take, is the whole batch's, 1e-6."""
    trainer = make(data, kind)
    network = trainer.accelerator.unwrap_model(trainer._network).eval()  # pyright: ignore[reportPrivateUsage]

    def gradient(parts: int) -> Tensor:
        network.zero_grad()
        for k in range(parts):
            d = trainer.plan.draws(5, trainer.times, k, parts)
            losses = trainer.objective.losses(trainer.denoiser, d.x0, d.eps, d.level)
            ((d.weight.float() * losses.loss).mean() / parts).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    assert torch.allclose(gradient(1), gradient(2), atol=1e-6)


def test_gradient_norms_are_those_of_one_unweighted_sample(data: Data) -> None:
    trainer = make(data, {"times": "gradient-norm", "pairing": "cross", "target": "stable", "references": 5})
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    network.drop.p = 0.0
    draws = trainer.plan.draws(11, trainer.times)
    stable = trainer.batch.target(11, draws)
    assert isinstance(stable, StableTarget)
    target = GivenTarget(stable.clean(draws.x0, draws.eps, draws.level), stable)
    bins, squares = squared_norm(trainer.batch, trainer.accelerator, network, 11, draws, target, 3)
    losses = trainer.objective.losses(trainer.denoiser, draws.x0, draws.eps, draws.level, stable)
    gradient = torch.autograd.grad(losses.loss[3], list(network.parameters()))
    assert int(bins) == int(draws.bin[3])
    assert float(squares) == pytest.approx(sum(float((g**2).sum()) for g in gradient), rel=1e-5)


def test_gradient_norms_are_rarer_once_the_density_is_in_use(data: Data) -> None:
    """The trainer measures at every update until each bin has enough, then at every fourth, the samples in turn."""
    times, due, places = GradientNormTimes(bins=1, least=2), [], []
    for update in range(11):
        if times.due(update):
            due.append(update)
            places.append(times.place(3))
            times = times.updated(torch.tensor([0]), torch.tensor([1.0]))
    assert due == [0, 1, 4, 8]
    assert places == [0, 1, 2, 0]
    trainer = make(data, {"times": "gradient-norm", "updates": 11})
    assert isinstance(trainer.times, GradientNormTimes)
    trainer.times = replace(trainer.times, bins=1, least=2, means=RunningMeans.empty(1, 0.9))
    run(trainer)
    assert isinstance(trainer.times, GradientNormTimes)
    assert int(trainer.times.means.counts) == 4
    with pytest.raises(ValueError, match="every is 0"):
        GradientNormTimes(every=0)


def test_learned_times_learn(data: Data) -> None:
    """After enough updates the density is not uniform; losses and norms come back unweighted, one an update or all."""
    norms = make(data, {"times": "gradient-norm", "updates": 5})
    run(norms)
    assert isinstance(norms.times, GradientNormTimes)
    assert int(norms.times.means.counts.sum()) == 5
    rates = make(data, {"times": "entropy-rate", "updates": 150})
    run(rates)
    assert isinstance(rates.times, EntropyRateTimes)
    assert int(rates.times.means.counts.sum()) == 150 * 8
    assert rates.times.warm
    q = rates.times.probabilities()
    assert float(q.max()) > 2 / 64
    assert float(q.min()) >= 0.1 / 64 - 1e-12


def test_checkpoints_from_before_draw_plans_resume(data: Data, tmp_path: Path) -> None:
    run(make(data, {}, tmp_path), 3)
    file = tmp_path / "checkpoints" / "update-0000002" / "state.json"
    state = json.loads(file.read_text())
    for key in ("times_weighted", "stratified", "pairing", "coupling", "strata"):
        del state["identity"][key]
    file.write_text(json.dumps(state))
    assert make(data, {}, tmp_path, resume=True).update == 2
    with pytest.raises(UserError, match="made with pairing 'independent', now it is 'cross'"):
        make(data, {"pairing": "cross"}, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"times_weighted": True}, "times_weighted is a setting of times lognormal"),
        (
            {"times": "entropy-rate", "weighting": "none", "head": "range", "detach_mean": False},
            "entropy-rate reads the squared error",
        ),
        ({"pairing": "sobol", "stratified": True}, "sobol stratifies the times already"),
        ({"pairing": "cross", "coupling": "immiscible"}, "coupling immiscible chooses noises that pairing cross"),
        ({"pairing": "same", "batch_size": 7}, "batch_size is 7 and pairing same makes groups of 2"),
        ({"pairing": "mirrored"}, "the setting pairing is 'mirrored'"),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config_from(BASE | values)
    assert "\n" not in str(caught.value)


def test_words_as_yaml_reads_them() -> None:
    """A bare `no` is false in YAML, and one tracker needs no list; numbers are finite."""
    config = config_from({"mixed_precision": False, "trackers": "tensorboard"})
    assert config == config_from({"mixed_precision": "no", "trackers": ["tensorboard"]})
    with pytest.raises(UserError, match="the setting mixed_precision is True"):
        config_from({"mixed_precision": True})
    with pytest.raises(UserError, match=r"the setting network is 'unet'; give its own settings, for example"):
        config_from({"network": "unet"})
    for name in ("lr", "weight_decay", "head_weight"):
        with pytest.raises(UserError, match=f"the setting {name} is inf: input should be a finite number"):
            config_from({name: float("inf")})


def test_no_more_orthogonal_noises_than_numbers() -> None:
    rows = TensorImages(torch.linspace(-1, 1, 12).reshape(4, 3))
    few = Data("rows", rows, rows, rows, levels=None, fingerprint="rows")
    with pytest.raises(UserError, match="4 noises orthogonal, and the data have 3 numbers each"):
        Trainer(few, config_from({"pairing": "orthogonal", "head": "none"}), device="cpu")


def test_strata_need_classes(data: Data) -> None:
    config = config_from({"strata": "class"})
    with pytest.raises(UserError, match="the data have no classes"):
        make_plan(config, data.calibration, make_schedule(config))


def test_groups_are_not_split_among_processes(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 4))
    with pytest.raises(UserError, match="batch_size 8 among 4 processes would split the groups of 4"):
        make(data, {"pairing": "orthogonal"})


def test_labels_of_configured_times() -> None:
    expected = {
        "uniform": "unbiased",
        "loss-second-moment": "unbiased",
        "gradient-norm": "unbiased",
        "entropy-rate": "unbiased",
        "learned-schedule": "unbiased",
        "lognormal": "changes the objective",
        "logit-normal": "changes the objective",
        "mode": "changes the objective",
    }
    for name, label in expected.items():
        config = config_from({"times": name})
        assert make_times(config, make_schedule(config)).label == label
        if label != "unbiased":
            config = config_from({"times": name, "times_weighted": True})
            assert make_times(config, make_schedule(config)).label == "unbiased"


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        {"pairing": "cross", "stratified": True, "times": "gradient-norm", "network": {"width": 8}},
        {"variance_reduction": "auto", "train_timesteps": 4, "strata": "cluster", "network": {"width": 8}},
        {"conditional": True, "pairing": "cross", "stratified": True, "network": {"width": 8}},
        {"variance_reduction": "auto", "gradient_accumulation_steps": 2, "network": {"width": 8}},
    ],
    ids=["probed", "auto", "conditional", "in pieces"],
)
def test_two_processes_draw_what_one_does(parts: dict[str, Any], on_one_and_two_processes: Any) -> None:
    """Pairs, strata, stable targets and learned times on one and on two CPU processes: times and predictions agree."""
    (a, times_a), (b, times_b) = on_one_and_two_processes(BASE | {"lr": 1e-4, "warmup": 0} | parts)
    assert torch.allclose(a, b, atol=1e-5)
    assert times_a.keys() == times_b.keys()
    assert all(torch.allclose(times_a[k], times_b[k], rtol=1e-4, atol=1e-6) for k in times_a)
