"""The Taylor control variate by Gauss-Hermite quadrature: the same expected gradient, and less variance."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from lowvar.gradients import controlled
from lowvar.process import CosineVP, Flow, Independent, NetworkDenoiser, Schedule
from lowvar.process.denoiser import Prediction
from lowvar.train import Objective, Simple, taylor_variate

Order = Literal[1, 2]


def hermite(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Nodes (n^d, d) and weights of E over N(0, I)."""
    # the Golub-Welsch matrix of the probabilists' Hermite polynomials
    off = torch.arange(1, n, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0] ** 2
    grid = torch.cartesian_prod(*([nodes] * d)).reshape(-1, d)
    chance = torch.cartesian_prod(*([weights] * d)).reshape(-1, d).prod(1)
    return grid, chance


class MLP(nn.Module):
    """2 -> 5 -> 2 with the time, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.sin(torch.arange(15, dtype=torch.float64)).reshape(5, 3))
        self.b = nn.Parameter(torch.cos(torch.arange(10, dtype=torch.float64)).reshape(2, 5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        inputs = torch.cat([x, t.double()[:, None].expand(len(x), 1) / 1000], 1)
        return torch.tanh(inputs @ self.a.mT) @ self.b.mT


def setting(schedule: Schedule, prediction: Prediction, t: float, order: Order) -> tuple[Tensor, ...]:
    """At all nodes: weights (n,), losses, variates, expectations (n,), and per-node gradients of loss and variate."""
    network = MLP()
    eps, chance = hermite(24, 2)
    x0 = torch.tensor([[0.7, -0.4]], dtype=torch.float64).expand_as(eps)
    level = schedule.at(torch.full((len(eps),), t, dtype=torch.float64))
    denoiser = NetworkDenoiser(network, schedule, prediction)

    def loss(eps: Tensor) -> Tensor:
        return Objective(Simple()).losses(denoiser, x0, eps, level).loss

    value = loss(eps)
    variate, mean = taylor_variate(loss, eps, order)

    def gradients(v: Tensor) -> Tensor:
        eye = torch.eye(len(v), dtype=torch.float64)
        found = torch.autograd.grad(v, list(network.parameters()), eye, retain_graph=True, is_grads_batched=True)
        return torch.cat([g.flatten(1) for g in found], 1)

    return chance, value.detach(), variate.detach(), mean.detach(), gradients(value), gradients(variate - mean)


CASES: list[tuple[Schedule, Prediction, float]] = [
    (CosineVP(), "epsilon", 0.15),
    (CosineVP(), "v_prediction", 0.6),
    (Flow(), "flow", 0.1),
    (Flow(), "sample", 0.4),
]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("schedule", "prediction", "t"), CASES, ids=str)
def test_expectations_are_exact(schedule: Schedule, prediction: Prediction, t: float, order: Order) -> None:
    chance, _, variate, mean, plain, difference = setting(schedule, prediction, t, order)
    assert float(mean.std()) < 1e-12
    assert abs(float((chance * variate).sum() - mean[0])) < 1e-9
    expected = chance @ plain
    for beta in (0.4, 1.0):
        assert torch.allclose(chance @ (plain - beta * difference), expected, atol=1e-9)
    assert float(expected.abs().max()) > 0.01


@pytest.mark.parametrize(("order", "most"), [(1, 0.5), (2, 0.05)])
def test_gradient_varies_less_at_little_noise(order: Order, most: float) -> None:
    """At t = 0.1 of Flow, sigma = 0.1: the gradient's variance against the plain one's, by quadrature."""
    chance, _, _, _, plain, difference = setting(Flow(), "sample", 0.1, order)

    def variance(g: Tensor) -> float:
        return float((chance @ (g - chance @ g) ** 2).sum())

    assert variance(plain - difference) < most * variance(plain)


@pytest.mark.parametrize("order", [1, 2])
def test_explained_share_falls_with_the_noise(order: Order) -> None:
    """R^2 of the loss's value by quadrature: nearly all at sigma = 0.02, less at 0.9."""
    shares = []
    for t in (0.02, 0.5, 0.9):
        chance, value, variate, _, _, _ = setting(Flow(), "sample", t, order)
        value, variate = value - chance @ value, variate - chance @ variate
        shares.append(float((chance @ (value * variate)) ** 2 / ((chance @ value**2) * (chance @ variate**2))))
    assert shares[0] > 0.97
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.8


def test_quadratic_loss_is_its_own_expansion() -> None:
    """A linear network: order 2 leaves no variance at all."""
    w = torch.tensor([[0.5, 0.2], [-0.3, 0.8]], dtype=torch.float64)
    eps, chance = hermite(5, 2)
    schedule = CosineVP()
    level = schedule.at(torch.full((len(eps),), 0.5, dtype=torch.float64))
    x0 = torch.full_like(eps, 0.3)
    denoiser = NetworkDenoiser(lambda x, t: x @ w, schedule, "epsilon")

    def loss(eps: Tensor) -> Tensor:
        return Objective(Simple()).losses(denoiser, x0, eps, level).loss

    variate, mean = taylor_variate(loss, eps, 2)
    assert torch.allclose(variate, loss(eps), atol=1e-12)
    assert torch.allclose(mean, (chance * loss(eps)).sum().expand_as(mean), atol=1e-12)
    left = controlled(loss(eps), variate, mean, ridge=0.0)
    assert float(left.std()) < 1e-9


@pytest.mark.parametrize("order", [1, 2])
def test_stock_network_with_attention(order: Order) -> None:
    """Directional derivatives through diffusers' fused attention: as central differences say, with a gradient."""
    size: Any = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
    blocks: Any = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(**size, **blocks, block_out_channels=(8,), attention_head_dim=4).double()
    denoiser, x0 = NetworkDenoiser(network, Flow(), "flow"), Independent(0).normal(range(2), (1, 4, 4)).double()
    eps, level = Independent(1).normal(range(2), (1, 4, 4)).double(), Flow().at(torch.tensor([0.2, 0.7]).double())

    def loss(eps: Tensor) -> Tensor:
        return Objective(Simple()).losses(denoiser, x0, eps, level).loss

    h = 1e-3
    near = [loss(k * h * eps) for k in (-1, 0, 1)]
    expected = near[1] + (near[2] - near[0]) / (2 * h)
    if order == 2:
        expected = expected + (near[2] - 2 * near[1] + near[0]) / (2 * h**2)
    variate, mean = taylor_variate(loss, eps, order)
    assert torch.allclose(variate, expected, atol=1e-5)
    (variate - mean).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_images_and_refusals() -> None:
    """Events of any shape, the gradient reaches the network, and what does not fit is said."""
    network = nn.Conv2d(1, 1, 3, padding=1)
    eps = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    variate, mean = taylor_variate(lambda e: (network(e).tanh() ** 2).flatten(1).mean(1), eps, 2)
    (variate - mean).sum().backward()
    assert network.weight.grad is not None
    assert float(network.weight.grad.abs().max()) > 0
    assert math.isfinite(float(mean.detach().sum()))
    with pytest.raises(ValueError, match="order is 3"):
        taylor_variate(lambda e: e.sum(1), eps, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one number a sample"):
        taylor_variate(lambda e: e.sum(), eps)
