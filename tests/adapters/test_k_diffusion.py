"""k-diffusion models as denoisers and the other way round: exact posteriors, and its samplers against our kernels.

k-diffusion's wrappers and samplers are written down here from its formulas (external.py, layers.py, sampling.py of
commit 4601bf0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvar.adapters import KDenoiser, KModel
from lowvar.errors import UserError
from lowvar.process import grid
from lowvar.process.denoiser import Denoiser, NetworkDenoiser
from lowvar.process.discrete import DiscreteVP, schedule_from_diffusers
from lowvar.process.kernel import ReverseKernel
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE, CosineVP, Flow, LinearVP, Schedule
from lowvar.sample import trajectory
from lowvar.testing import GaussianTarget, anisotropic_gaussian, random_mixture

LINEAR = schedule_from_diffusers({"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2})
SCHEDULES: dict[str, Schedule] = {
    "ve": VE(20.0, 5.0),
    "cosine": CosineVP(),
    "linear": LinearVP(0.2, 12.0),
    "flow": Flow(2.0),
    "discrete": LINEAR,
}
MIXTURE = random_mixture(3, 4, seed=2)


def states(n: int, d: int, draw: int = 0) -> Tensor:
    return Independent(5).normal(range(n), (d,), draw=draw, dtype=torch.float64)


def mixture_model(y: Tensor, s: Tensor) -> Tensor:
    """E[x_0 | y] of the mixture, for y = x_0 + s eps."""
    return MIXTURE.posterior(y, VE().level(-2 * torch.log(s))).mean


# ---------------------------------------------------------------------------------------------------------- posteriors


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_exact_posterior_on_every_schedule(schedule: Schedule) -> None:
    """D(x / alpha, sigma / alpha) is the mixture's E[x_0 | x_t]; 1e-10: float64 through logarithms and exponentials."""
    level = schedule.at(torch.tensor([0.07, 0.4, 0.93]))
    x = 2 * states(3, 3)
    exact = MIXTURE.denoiser(schedule)(x, level).mean
    torch.testing.assert_close(KDenoiser(mixture_model, schedule)(x, level).mean, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_there_and_back(schedule: Schedule) -> None:
    """A denoiser as a model as a denoiser of another schedule: mean and variances are the exact ones."""
    model = KModel(MIXTURE.denoiser(schedule))
    back = KDenoiser(model, CosineVP(), extra_args={"return_variance": True}, variance="output")
    level = CosineVP().at(torch.tensor([0.1, 0.5, 0.7]))
    x = 2 * states(3, 3)
    exact, found = MIXTURE.denoiser(CosineVP())(x, level), back(x, level)
    assert exact.covariance is not None
    assert found.covariance is not None
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.covariance.diagonal(), exact.covariance.diagonal(), rtol=1e-9, atol=1e-10)


def test_clip_and_scalar_levels() -> None:
    denoiser = KDenoiser(mixture_model, VE(), clip=0.5)
    x, level = 3 * states(4, 3), VE().at(0.6)
    free = KDenoiser(mixture_model, VE())(x, level).mean
    assert float(free.abs().max()) > 0.5
    assert torch.equal(denoiser(x, level).mean, free.clamp(-0.5, 0.5))


class Karras:
    """`layers.DenoiserWithVariance`, its network exact for data N(0, c I) with c other than sigma_data^2."""

    def __init__(self, c: float, sigma_data: float) -> None:
        self.c, self.sigma_data, self.calls = c, sigma_data, 0

    def get_scalings(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s**2 + self.sigma_data**2
        return self.sigma_data**2 / total, s * self.sigma_data / total**0.5, 1 / total**0.5

    def inner_model(self, z: Tensor, s: Tensor, return_variance: bool = False, shift: float = 0.0) -> Any:
        self.calls += 1
        c_skip, c_out, c_in = self.get_scalings(s)
        column = s[:, None]
        gain = (self.c / (self.c + column**2) - c_skip[:, None]) / (c_out * c_in)[:, None]
        h = torch.log(self.c * s**2 / (self.c + s**2) / c_out**2)
        return (gain * z + shift, h) if return_variance else gain * z + shift


@pytest.mark.parametrize("name", ["cosine", "ve", "flow"])
def test_learned_log_variance(name: str) -> None:
    """C = c_out^2 exp(h) I is the Gaussian's posterior covariance, in one evaluation of the network."""
    schedule, wrapper = SCHEDULES[name], Karras(c=1.7, sigma_data=0.5)
    denoiser = KDenoiser(wrapper, schedule, variance="logvar")  # type: ignore[arg-type]
    level = schedule.at(torch.tensor([0.1, 0.5, 0.9]))
    x = states(3, 4)
    exact = GaussianTarget(torch.zeros(4), 1.7 * torch.eye(4, dtype=torch.float64)).denoiser(schedule)(x, level)
    found = denoiser(x, level)
    assert wrapper.calls == denoiser.nfe == 1
    assert exact.covariance is not None
    assert found.covariance is not None
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.covariance.diagonal(), exact.covariance.diagonal(), rtol=1e-10, atol=0.0)
    shifted = KDenoiser(wrapper, schedule, "logvar", extra_args={"shift": 1.0})  # type: ignore[arg-type]
    assert not torch.equal(shifted(x, level).mean, found.mean)


class OpenAI:
    """`external.OpenAIDenoiser`: a network in the words of DDPM, its index interpolated in log s."""

    def __init__(self, network: Callable[..., Tensor], table: Tensor) -> None:
        self.inner_model = network
        self.log_sigmas = torch.log((1 - table) / table) / 2

    def get_scalings(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return -s, 1 / (s**2 + 1) ** 0.5

    def sigma_to_t(self, s: Tensor) -> Tensor:
        low = torch.searchsorted(self.log_sigmas, torch.log(s)).sub(1).clamp(0, len(self.log_sigmas) - 2)
        left, right = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + ((torch.log(s) - left) / (right - left)).clamp(0, 1)


def test_learned_range() -> None:
    """The wrapper of a DDPM network is the network itself, between the timesteps too; 2e-6: indices are float32."""
    assert isinstance(LINEAR, DiscreteVP)

    def network(x: Tensor, n: Tensor) -> Tensor:
        n = n.double()[:, None]
        return torch.cat([torch.tanh(x + n / 50), torch.sin(x - n / 20)], 1)

    wrapped = KDenoiser(OpenAI(network, LINEAR.alphas_cumprod), LINEAR, "range")  # type: ignore[arg-type]
    direct = NetworkDenoiser(network, LINEAR, "epsilon", "range")
    level = LINEAR.at(torch.tensor([0.013, 0.25, 0.5, 0.999]))
    found, exact = wrapped(states(4, 3), level), direct(states(4, 3), level)
    assert found.fraction is not None
    assert exact.fraction is not None
    assert found.covariance is None
    torch.testing.assert_close(found.mean, exact.mean, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.fraction, exact.fraction, rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------------------------------------------------ samplers


def euler(model: Callable[..., Tensor], y: Tensor, sigmas: Tensor, eta: float = 0.0, z: Any = None) -> Tensor:
    """`sample_euler` (eta = 0) and `sample_euler_ancestral` of k-diffusion."""
    for i, (s, r) in enumerate(pairwise(sigmas)):
        up = eta * r * torch.sqrt((s**2 - r**2) / s**2)
        down = torch.sqrt(r**2 - up**2)
        d = (y - model(y, s.expand(len(y)))) / s
        y = y + d * (down - s)
        if eta and r > 0:
            y = y + up * z(i)
    return y


def heun(model: Callable[..., Tensor], y: Tensor, sigmas: Tensor) -> Tensor:
    """`sample_heun` of k-diffusion (Karras et al. 2022, Algorithm 1): the trapezoidal rule, Euler in the last step."""
    for s, r in pairwise(sigmas):
        d = (y - model(y, s.expand(len(y)))) / s
        ahead = y + d * (r - s)
        y = ahead if r == 0 else y + (d + (ahead - model(ahead, r.expand(len(y)))) / r) / 2 * (r - s)
    return y


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["cosine", "flow", "ve"])
def test_euler_is_our_first_order_kernel(name: str, eta: float) -> None:
    """Its Euler steps on a denoiser of ours are DDIM, its ancestral ones DDPM with the small variance, on one noise."""
    schedule = SCHEDULES[name]
    denoiser = MIXTURE.denoiser(schedule, None)
    times = grid.uniform_logsnr(schedule, 7, t_start=0.9)
    start, noise = schedule.at(times[0]), Independent(9)
    y = states(5, 3) * start.sigma / start.alpha
    kernel = ReverseKernel(eta, "small")
    *_, (ours, _) = trajectory(denoiser, kernel, times, y * start.alpha, noise)

    def z(i: int) -> Tensor:
        return noise.normal(range(5), (3,), draw=i + 1, dtype=torch.float64)

    theirs = euler(KModel(denoiser), y, torch.exp(-schedule.at(times).logsnr / 2), eta, z)
    torch.testing.assert_close(theirs, ours.x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_heun_on_our_denoiser_is_of_second_order(name: str) -> None:
    """Against the Gaussian's flow y_s = m + sqrt((c + s^2) / (c + S^2)) (y_S - m), direction by direction."""
    target = anisotropic_gaussian((4,), 30.0, seed=3)
    model = KModel(target.denoiser(SCHEDULES[name]))
    values, B = torch.linalg.eigh(target.covariance)
    top, low = 5.0, 0.2
    y = target.mean + states(6, 4) * top
    scale = torch.sqrt((values + low**2) / (values + top**2))
    exact = target.mean + ((y - target.mean) @ B * scale) @ B.T
    errors = []
    for steps in (20, 40, 80):
        sigmas = torch.exp(torch.linspace(math.log(top), math.log(low), steps + 1, dtype=torch.float64))
        errors.append(float((heun(model, y, sigmas) - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(1.8 < order < 2.3 for order in orders), orders


def test_ends() -> None:
    model = KModel(MIXTURE.denoiser(VE(20.0, 5.0)))
    assert math.isclose(model.sigma_min, 0.002, rel_tol=1e-9)
    assert math.isclose(model.sigma_max, 20.0, rel_tol=1e-9)
    assert KModel(MIXTURE.denoiser(Flow())).sigma_max == math.inf
    y = states(2, 3)
    assert model(y.float(), torch.tensor(1.0)).dtype == torch.float32
    assert model.posterior(y, torch.tensor([1.0, 2.0])).covariance is not None


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    x = states(2, 4)
    with pytest.raises(UserError, match="variance is 'learned'; allowed: None, logvar, range, output"):
        KDenoiser(mixture_model, variance="learned")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"DenoiserWithVariance, and function has no inner_model and no get_scalings"):
        KDenoiser(mixture_model, variance="logvar")
    with pytest.raises(UserError, match=r"sigma / alpha = inf: start the grid below t = 1"):
        KDenoiser(lambda y, s: y, Flow())(x, Flow().at(1.0))
    with pytest.raises(UserError, match=r"returned shape \(2, 3\) for states \(2, 4\)"):
        KDenoiser(lambda y, s: y[:, :3])(x, VE().at(0.5))
    model: Any = OpenAI(lambda x, n: x, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    with pytest.raises(UserError, match="needs 8 output channels, the network has 4"):
        KDenoiser(model, variance="range")(x, VE().at(0.5))
    bare: Denoiser = KDenoiser(lambda y, s: y)
    with pytest.raises(UserError, match="return_variance needs a denoiser with a covariance"):
        KModel(bare)(x, torch.tensor(1.0), return_variance=True)
