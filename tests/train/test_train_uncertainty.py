"""Uncertainty weighting finds the log of the expected loss; curves are the weightings' formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.train import LikelihoodOnly, MinSNR, Trainer, Update, Validation, config_from
from lowvar.train.uncertainty import Uncertainty, weighting_curves


def test_optimum_is_the_log_of_the_expected_loss() -> None:
    """Minimising the convex loss in (amplitude, offset): u is the log of a loss that varies smoothly."""
    logsnr = torch.linspace(-10, 10, 200, dtype=torch.float64)
    target = -1.0 + 0.8 * torch.sin(logsnr / 5)
    weigh = Uncertainty(features=48, seed=3).double()
    optimiser = torch.optim.LBFGS(weigh.parameters(), max_iter=400, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = weigh(target.exp(), logsnr).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        assert float((weigh.log_uncertainty(logsnr) - target).abs().max()) < 0.02
        assert float((weigh.weight(logsnr) * target.exp() - 1).abs().max()) < 0.02  # every level contributes 1
        assert float(weigh(target.exp(), logsnr).mean()) == pytest.approx(float((1 + target).mean()), abs=1e-3)


def test_gradient_for_the_network_is_a_weight() -> None:
    weigh = Uncertainty(seed=1)
    with torch.no_grad():
        weigh.amplitude.normal_(generator=torch.Generator().manual_seed(0))
        weigh.offset.fill_(0.3)
    loss = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    logsnr = torch.tensor([-torch.inf, 0.0, 4.0], dtype=torch.float64)
    (found,) = torch.autograd.grad(weigh(loss, logsnr).sum(), loss)
    torch.testing.assert_close(found, weigh.weight(logsnr))
    assert bool(torch.isfinite(found).all())


def test_state_and_seed() -> None:
    one, two, other = Uncertainty(seed=1), Uncertainty(seed=1), Uncertainty(seed=2)
    assert torch.equal(one.get_buffer("phase"), two.get_buffer("phase"))
    assert not torch.equal(one.get_buffer("phase"), other.get_buffer("phase"))
    with torch.no_grad():
        one.amplitude.add_(1)
    other.load_state_dict(one.state_dict())
    x = torch.linspace(-5, 5, 7)
    assert torch.equal(one.log_uncertainty(x), other.log_uncertainty(x))
    assert one.label == "changes the objective"
    with pytest.raises(ValueError, match="features is 0"):
        Uncertainty(0)


def test_curves() -> None:
    levels = torch.tensor([3.0, 0.0])
    curves = {c.name: c for c in weighting_curves("v_prediction", levels)}
    assert list(curves) == ["simple", "min-snr", "p2", "edm"]
    assert curves["simple"].logsnr.tolist() == [0, 3]
    snr = torch.tensor([0.0, 3.0], dtype=torch.float64).exp()
    torch.testing.assert_close(curves["simple"].weight, 1 + snr)
    torch.testing.assert_close(curves["min-snr"].weight, snr.clamp(max=5))
    torch.testing.assert_close(curves["p2"].weight, snr / (1 + snr))
    torch.testing.assert_close(curves["edm"].weight, snr + 4)
    assert all(float(c.relative.mean()) == pytest.approx(1) for c in curves.values())
    assert torch.equal(curves["simple"].relative, torch.ones(2, dtype=torch.float64))


def test_curves_with_what_was_learned() -> None:
    learned = Uncertainty()
    with torch.no_grad():
        learned.offset.add_(2.0)
    found = weighting_curves("epsilon", weightings={"m": MinSNR(), "none": LikelihoodOnly()}, uncertainty=learned)
    assert [c.name for c in found] == ["m", "none", "uncertainty"]
    torch.testing.assert_close(found[2].relative, torch.ones(121, dtype=torch.float64))
    assert float(found[1].relative.abs().max()) == 0
    with pytest.raises(ValueError, match="not finite"):
        weighting_curves("epsilon", torch.tensor([torch.inf]))


# ------------------------------------------------------------------------------------------------------------ in a run

BASE: dict[str, Any] = {
    "updates": 8,
    "batch_size": 8,
    "warmup": 1,
    "lr": 1e-2,
    "checkpoint_every": 3,
    "validate_every": 8,
    "weighting": "uncertainty",
    "head": "none",
    "train_timesteps": 100,
}


class Tiny(nn.Module):
    """Two convolutions and the time."""

    def __init__(self, out: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, out, 3, padding=1)
            self.time = nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.nn.functional.silu(self.first(x) + self.time(t[:, None] / 100)[:, :, None, None]))


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    train, rest = (TensorImages(split.images(range(30))) for split in (digits.train, digits.calibration))
    return Data("few digits", train, rest, rest, levels=17, fingerprint="few")


def make(data: Data, values: dict[str, Any], folder: Path | None = None, resume: bool = False) -> Trainer:
    network = Tiny(2 if values.get("head") == "range" else 1)
    return Trainer(data, config_from(BASE | values), folder, network=network, resume=resume, device="cpu")


def ends(trainer: Trainer, updates: int | None = None) -> Tensor:
    for record in trainer.run():
        if isinstance(record, Update) and record.update == updates:
            break
        if isinstance(record, Validation) and trainer.config.head == "none":
            assert record.validation.loss == record.validation.error  # validation is of the plain loss
    network = trainer.accelerator.unwrap_model(trainer._network)  # pyright: ignore[reportPrivateUsage]
    assert trainer.uncertainty is not None
    return torch.cat([p.detach().flatten() for p in [*network.parameters(), *trainer.uncertainty.parameters()]])


@pytest.mark.parametrize("values", [{}, {"times": "loss-second-moment", "stratified": True}, {"head": "range"}])
def test_resumed_run_is_bit_identical(values: dict[str, Any], data: Data, tmp_path: Path) -> None:
    expected = ends(make(data, values))
    ends(make(data, values, tmp_path), 5)
    resumed = make(data, values, tmp_path, resume=True)
    assert resumed.update == 3
    assert resumed.uncertainty is not None
    assert float(resumed.uncertainty.offset.detach()) != 0
    assert torch.equal(ends(resumed), expected)


def test_gradient_in_a_run_is_that_of_the_weighted_error(data: Data) -> None:
    """With a learned weight that is not 1: e^-u on the squared error, the head's term as it was."""
    trainer = make(data, {"head": "range"})
    weigh = trainer.uncertainty
    assert weigh is not None
    with torch.no_grad():
        weigh.amplitude.copy_(torch.linspace(-1, 2, 64))
        weigh.offset.fill_(0.4)
    draws = trainer.plan.draws(0, trainer.times)
    denoiser, whole = trainer.denoiser, trainer.batch.objective
    found = whole.losses(denoiser, draws.x0, draws.eps, draws.level)
    plain = trainer.objective.losses(denoiser, draws.x0, draws.eps, draws.level)
    assert plain.variance is not None
    u = weigh.log_uncertainty(draws.level.logsnr)
    assert whole.variance is not None
    expected = plain.error * torch.exp(-u) + u + whole.variance.factor(denoiser) * plain.variance
    torch.testing.assert_close(found.loss, expected)
    assert torch.equal(found.error, plain.error)
    assert whole.label == "changes the objective"
    assert dataclasses.replace(whole, variance=None).label == "changes the objective"


def test_times_learn_from_the_weighted_error_without_its_price(data: Data) -> None:
    """u = 5 everywhere: the error e^-5 is below 0.02, the loss with its price above 5."""
    trainer = make(data, {"times": "loss-second-moment"})
    assert trainer.uncertainty is not None
    with torch.no_grad():
        trainer.uncertainty.offset.fill_(5.0)
    record = next(trainer.run())
    assert isinstance(record, Update)
    assert record.loss > 5
    learnt = torch.cat([v.flatten().double() for k, v in trainer.times.state().items() if k != "counts"])
    assert 1e-4 < float(learnt.abs().max()) < 0.05


def test_levels_come_to_contribute_alike(data: Data) -> None:
    """300 updates: the weighted error is nearer to 1 at every level than the error is."""
    trainer = make(data, {"updates": 300, "batch_size": 16, "validate_every": 300})
    ends(trainer)
    weigh = trainer.uncertainty
    assert weigh is not None
    bins = trainer.validate().validation.bins
    for b in bins:
        ratio = b.error * float(weigh.weight(torch.tensor(b.logsnr)))
        assert abs(torch.tensor(ratio).log()) < 0.5 * abs(torch.tensor(b.error).log()) + 0.1, b


def test_two_processes_learn_the_weighting_of_one(
    on_one_and_two_processes: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    on_one_and_two_processes(BASE | {"network": {"width": 8, "levels": 2}, "updates": 6, "lr": 1e-3})
    one, two = (load_file(tmp_path / n / "checkpoints" / "update-0000006" / "uncertainty.safetensors") for n in "12")
    assert one.keys() == two.keys()
    assert float(one["offset"].abs()) > 1e-3
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def test_entropy_rate_cannot_read_the_error() -> None:
    with pytest.raises(UserError, match="weighting uncertainty changes what they are in training; give another"):
        config_from({"weighting": "uncertainty", "times": "entropy-rate"})
