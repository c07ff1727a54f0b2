"""Gradient accumulation: the samples and the gradient of the whole batch, with a piece of it in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.data import Data, TensorImages, load
from lowvar.errors import UserError
from lowvar.train import Trainer, Update, config_from

BASE: dict[str, Any] = {
    "updates": 3,
    "batch_size": 12,
    "warmup": 0,
    "lr": 1e-3,
    "head": "none",
    "network": {"width": 8},
}


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load("digits")
    splits = (digits.train.images(range(24)), digits.calibration.images(range(8)), digits.test.images(range(8)))
    return Data("few digits", *(TensorImages(x) for x in splits), levels=17, fingerprint="few")


class Counting(nn.Module):
    """A linear network that remembers how many samples it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((8, 8), 0.5)), nn.Parameter(torch.zeros(8, 8))
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(len(x))
        return torch.tanh(x * self.weight + t[:, None, None, None] / 1000 * self.bias)


PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "auto": {"variance_reduction": "auto", "references": 8},
    "losses": {"times": "loss-second-moment", "train_timesteps": 4, "updates": 14},
    "transport": {"coupling": "optimal-transport"},
    "uncertainty": {"weighting": "uncertainty"},
}


@pytest.mark.parametrize("plan", PLANS)
def test_pieces_end_where_the_whole_batch_does(plan: str, data: Data) -> None:
    """Weights, losses, gradient norms and learned times to 1e-5; 12 samples in 4 pieces are 3 at a time."""

    def ended(pieces: int) -> tuple[list[Update], Trainer, Counting]:
        network = Counting()
        config = config_from(BASE | PLANS[plan] | {"gradient_accumulation_steps": pieces})
        trainer = Trainer(data, config, network=network, device="cpu")
        return [r for r in trainer.run() if isinstance(r, Update)], trainer, network

    (whole, a, first), (parts, b, second) = ended(1), ended(4)
    for one, other in zip(whole, parts, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    assert torch.allclose(first.weight, second.weight, atol=1e-5)
    assert not torch.allclose(first.weight, torch.full((8, 8), 0.5), atol=1e-4)
    for key, value in a.times.state().items():
        assert torch.allclose(b.times.state()[key].double(), value.double(), rtol=1e-4, atol=1e-6), key
    assert max(first.seen) == 12
    assert max(second.seen) == 3


@pytest.mark.parametrize("plan", ["plain", "auto"])
def test_noise_scale_is_measured_in_pieces(plan: str, data: Data) -> None:
    """The same squared norm and variance of the gradient, and never more samples than a piece at once."""

    def ended(pieces: int) -> tuple[dict[str, Tensor], Counting]:
        more = {"noise_scale_every": 1, "gradient_accumulation_steps": pieces}
        network = Counting()
        trainer = Trainer(data, config_from(BASE | PLANS[plan] | more), network=network, device="cpu")
        list(trainer.run())
        assert trainer.noise_scale is not None
        return trainer.noise_scale.state(), network

    (whole, _), (parts, second) = ended(1), ended(6)
    for key, value in whole.items():
        assert torch.allclose(parts[key].double(), value.double(), rtol=1e-3, atol=1e-7), key
    assert max(second.seen) == 2


def test_pieces_that_do_not_divide_are_refused(data: Data) -> None:
    config = config_from(BASE | {"gradient_accumulation_steps": 5})
    with pytest.raises(UserError, match=r"gradient_accumulation_steps is 5 .* give a divisor of 12"):
        Trainer(data, config, device="cpu")
    with pytest.raises(UserError, match="gradient_accumulation_steps is 0"):
        config_from(BASE | {"gradient_accumulation_steps": 0})
