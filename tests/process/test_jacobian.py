"""Products with Jacobians: every way against the dense Jacobian of a stock UNet2DModel with attention; their price."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowvar.calibrate import JacobianTrace
from lowvar.process import CosineVP, Independent, Isotropic, JacobianCovariance, NetworkDenoiser
from lowvar.process.jacobian import WAYS, Way, jacobian_product, transposed_product
from lowvar.testing import mixture8

SCHEDULE = CosineVP()
D = 32  # 2 x 4 x 4


class Counted(nn.Module):
    """Passes on to a network; counts calls."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor, t: Tensor) -> Any:
        self.calls += 1
        return self.inner(x, t.to(x.dtype))


def unet() -> Counted:
    """Small, stock, with group norms and attention, random weights; float64."""
    from diffusers import UNet2DModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        network = UNet2DModel(
            sample_size=4,
            in_channels=2,
            out_channels=2,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        )
    return Counted(network.double().eval())


@pytest.fixture(scope="module")
def network() -> Counted:
    return unet()


def normal(seed: int, *shape: int) -> Tensor:
    return Independent(seed).normal(range(shape[0]), shape[1:], dtype=torch.float64)


def dense(denoiser: NetworkDenoiser, x: Tensor, t: float) -> Tensor:
    """J (B, d, d): rows are gradients of the mean's entries, plain reverse mode."""
    state = x.clone().requires_grad_()
    mean = denoiser(state, SCHEDULE.at(t)).mean
    rows = [torch.autograd.grad(mean.flatten(1)[:, i].sum(), state, retain_graph=True)[0].flatten(1) for i in range(D)]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("t", [0.15, 0.6])
@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "enable_grad"])
def test_products_with_a_stock_unet(network: Counted, t: float, context: str) -> None:
    """Both exact forms to 1e-12; quotients to 1e-7; the network's J is not symmetric."""
    denoiser, x, v = NetworkDenoiser(network, SCHEDULE, "v_prediction"), normal(1, 2, 2, 4, 4), normal(2, 2, 2, 4, 4)
    J = dense(denoiser, x, t)
    assert float((J - J.mT).abs().max()) > 0.01 * float(J.abs().max())
    plain = (J @ v.flatten(1)[..., None]).reshape(v.shape)
    transposed = (J.mT @ v.flatten(1)[..., None]).reshape(v.shape)
    level = SCHEDULE.at(t)
    with getattr(torch, context)():
        for symmetric, expected in ((False, plain), (True, (plain + transposed) / 2)):
            found = jacobian_product(denoiser, x, level, v, "reverse", symmetric)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
            assert not found.requires_grad
            found = jacobian_product(denoiser, x, level, v, "difference", symmetric)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
        found = transposed_product(denoiser, x, level, v)
    torch.testing.assert_close(found, transposed, rtol=0, atol=1e-12 * float(transposed.abs().max()))


@pytest.mark.parametrize("symmetric", [True, False])
def test_covariance_of_a_stock_unet(network: Counted, symmetric: bool) -> None:
    """The whole covariance chooses a way that works, says which, and is (sigma^2 / alpha) times the dense Jacobian."""
    inner, level = NetworkDenoiser(network, SCHEDULE, "epsilon"), SCHEDULE.at(0.4)
    denoiser, x = JacobianCovariance(inner, steps=4, symmetric=symmetric), normal(5, 2, 2, 4, 4)
    assert denoiser.way is None
    with torch.no_grad():
        posterior = denoiser(x, level)
    assert denoiser.way == "reverse"
    assert denoiser.nfe == 1 + 3 * 4
    J = dense(inner, x, 0.4)
    expected = float(level.sigma**2 / level.alpha) * (J + J.mT) / 2
    assert posterior.covariance is not None
    found = posterior.covariance.dense()  # of J itself its symmetric part
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    assert bool(torch.isfinite(posterior.covariance.sqrt_matvec(normal(6, 2, 2, 4, 4))).all())


def test_calls_of_the_network(network: Counted) -> None:
    """Calls a product: one where autograd does the rest, two for quotients, one more for their transpose."""
    denoiser, x = NetworkDenoiser(network, SCHEDULE), normal(1, 1, 2, 4, 4)
    calls = {}
    cases: tuple[tuple[Way, bool], ...] = (
        ("reverse", False),
        ("reverse", True),
        ("difference", False),
        ("difference", True),
    )
    for way, symmetric in cases:
        network.calls = 0
        jacobian_product(denoiser, x, SCHEDULE.at(0.5), x, way, symmetric)
        calls[way, symmetric] = network.calls
    assert list(calls.values()) == [1, 1, 2, 3]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_ways_on_a_target(way: Way, symmetric: bool) -> None:
    """Each way on a mixture with known posterior, with the price it declares."""
    target, level = mixture8(), SCHEDULE.at(0.4)
    x = target.noisy(range(3), level)
    denoiser = JacobianCovariance(target.denoiser(SCHEDULE, None), 8, symmetric, way)
    found, exact = denoiser(x, level).covariance, target.posterior(x, level, "dense").covariance
    assert found is not None
    assert exact is not None
    tolerance = (1e-7 if way == "difference" else 1e-10) * float(exact.trace().max())
    torch.testing.assert_close(found.dense(), exact.dense(), rtol=0, atol=tolerance)
    cost = {"forward": (1, 3), "reverse": (3, 3), "difference": (2, 4)}[way][symmetric]
    assert denoiser.way == way
    assert denoiser.nfe == 1 + 8 * cost


class Fused(torch.autograd.Function):
    """tanh without forward mode and without a second derivative, as attention of other libraries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (1 - ctx.saved_tensors[0] ** 2)


def test_quotients_where_nothing_else_works() -> None:
    """Float32 too: to 1e-3, as its epsilon allows; per-sample levels; directions of any length."""
    scale = torch.linspace(0.5, 2, 6)
    level = SCHEDULE.at(torch.tensor([0.2, 0.7], dtype=torch.float64))
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        inner = NetworkDenoiser(lambda x, t: Fused.apply(scale.to(x) * x), SCHEDULE, "sample")
        x, v = normal(1, 2, 6).to(dtype), 1e3 * normal(2, 2, 6).to(dtype)
        for symmetric, nfe in ((True, 1 + 4 * 8), (False, 1 + 2 * 8)):
            denoiser = JacobianCovariance(inner, symmetric=symmetric)
            found = denoiser(x, level).covariance
            assert found is not None
            assert (denoiser.way, denoiser.nfe) == ("difference", nfe)
            J = scale.to(dtype) * (1 - torch.tanh(scale.to(dtype) * x) ** 2)
            expected = ((level.sigma**2 / level.alpha)[:, None] * J).to(dtype) * v
            torch.testing.assert_close(found.matvec(v), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_trace_of_a_stock_unet(network: Counted) -> None:
    """Reverse mode: all 2^m signs cannot be enumerated at d = 32, so z^T J z of the very probes; NFE 1 + 2 m."""
    inner, level, x = NetworkDenoiser(network, SCHEDULE), SCHEDULE.at(0.4), normal(5, 2, 2, 4, 4)
    denoiser = JacobianTrace(inner, 3, Independent(9))
    with torch.no_grad():
        found = denoiser(x, level).covariance
    assert isinstance(found, Isotropic)
    assert (denoiser.way, denoiser.nfe) == ("reverse", 7)
    J, total = dense(inner, x, 0.4), torch.zeros(2, dtype=torch.float64)
    for k in range(3):
        z = (
            Independent(9)
            .normal(range(2), (2, 4, 4), draw=round(0.4 * (1 << 20)) + (k << 21))
            .sign()
            .double()
            .flatten(1)
        )
        total += torch.einsum("bi,bij,bj->b", z, J, z) / 3
    expected = (float(level.sigma**2 / level.alpha) * total / D).clamp_min(0)
    torch.testing.assert_close(found.variance, expected, rtol=1e-10, atol=1e-12)


def test_lack_of_memory_is_no_refusal() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        if x.requires_grad:
            raise torch.OutOfMemoryError("full")
        return x

    with pytest.raises(torch.OutOfMemoryError):
        JacobianCovariance(NetworkDenoiser(network, SCHEDULE))(torch.ones(1, 2), SCHEDULE.at(0.5))


def test_errors_name_what_is_allowed(network: Counted) -> None:
    inner = NetworkDenoiser(network, SCHEDULE)
    with pytest.raises(ValueError, match="allowed: forward, reverse, difference"):
        JacobianCovariance(inner, way="backward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="allowed: forward, reverse, or None"):
        JacobianTrace(inner, way="difference")
