"""Schedules keep the laws; equal formulas have equal fingerprints, different ones different."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lowvar.process.discrete import DiscreteVP, schedule_from_config, schedule_from_diffusers
from lowvar.process.schedule import VE, CosineVP, Flow, LinearVP, Schedule
from lowvar.testing.laws.schedule import ScheduleLaws

DIFFUSERS = {
    "ddpm": {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "stable diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine table": {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    "short table": {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 0.9},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_end": 0.02},
    "zero terminal snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}
SCHEDULES: dict[str, Schedule] = {
    "cosine": CosineVP(),
    "cosine s=.02": CosineVP(s=0.02, logsnr_min=-10.0),
    "linear": LinearVP(),
    "linear slow": LinearVP(0.2, 12.0),
    "ve": VE(),
    "ve small": VE(sigma_max=10.0, rho=3.0),
    "flow": Flow(),
    "flow shift 3": Flow(3.0),
    **{name: schedule_from_diffusers(config) for name, config in DIFFUSERS.items()},
    "given numbers": DiscreteVP(torch.linspace(0.99, 0.01, 25, dtype=torch.float64)),
}


class TestSchedules(ScheduleLaws):
    @pytest.fixture(params=SCHEDULES.values(), ids=list(SCHEDULES))
    def schedule(self, request: pytest.FixtureRequest) -> Schedule:
        return request.param


def test_fingerprints_tell_formulas_apart() -> None:
    for (a, one), (b, two) in itertools.combinations(SCHEDULES.items(), 2):
        assert one.fingerprint != two.fingerprint, f"{a} and {b}"


def test_fingerprints_agree_for_one_table_by_two_routes() -> None:
    config = DIFFUSERS["ddpm"]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    by_name, by_numbers = schedule_from_diffusers(config), schedule_from_diffusers({"trained_betas": betas.tolist()})
    by_table = DiscreteVP(torch.cumprod(1 - betas, 0))
    assert by_name.fingerprint == by_numbers.fingerprint == by_table.fingerprint
    assert schedule_from_diffusers({}).fingerprint == by_name.fingerprint  # diffusers' defaults


@pytest.mark.parametrize("name", [n for n in DIFFUSERS if n != "zero terminal snr"])
def test_table_is_the_peers(name: str) -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(**DIFFUSERS[name])  # pyright: ignore[reportArgumentType]
    schedule = SCHEDULES[name]
    n = torch.arange(peer.config["num_train_timesteps"], dtype=torch.float64)
    level = schedule.at((n + 1) / len(n))
    torch.testing.assert_close(schedule.timestep(level.t), n, rtol=0, atol=1e-9)
    torch.testing.assert_close(level.alpha**2, peer.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)  # theirs is float32
    exact = torch.cumprod(1 - peer.betas.double(), 0)
    torch.testing.assert_close(level.alpha**2, exact, rtol=2e-5, atol=1e-7)


def test_zero_terminal_snr_is_the_peers() -> None:
    from diffusers import DDIMScheduler

    config = DIFFUSERS["zero terminal snr"]
    peer, schedule = DDIMScheduler(**config), SCHEDULES["zero terminal snr"]  # pyright: ignore[reportArgumentType]
    level = schedule.at(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(level.alpha, peer.alphas_cumprod.double().sqrt(), rtol=1e-3, atol=1e-5)
    assert float(level.alpha[-1]) == 0
    assert float(level.logsnr[-1]) == -float("inf")


def test_closed_forms_of_the_continuous_schedules() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    cosine = CosineVP().at(t).alpha
    expected = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2))
    torch.testing.assert_close(cosine, expected.double(), rtol=1e-7, atol=0)
    torch.testing.assert_close(LinearVP().at(t).alpha, torch.exp(-0.05 * t - 19.9 / 4 * t**2), rtol=1e-12, atol=0)
    torch.testing.assert_close(VE().at(t).sigma, 80 * t**7, rtol=1e-12, atol=0)
    torch.testing.assert_close(Flow(3.0).at(t).sigma, 3 * t / (1 + 2 * t), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearVP(0.0, 1.0), "beta_min"),
        (lambda: VE(-1.0), "positive"),
        (lambda: Flow(0.0), "shift"),
        (lambda: Flow(1.0, 0.0), "timesteps"),
        (lambda: DiscreteVP(torch.tensor([0.5, 0.6])), "decrease"),
        (lambda: DiscreteVP(torch.tensor([1.0, 0.5])), r"\[0, 1\)"),
        (lambda: schedule_from_diffusers({"beta_schedule": "nope"}), "squaredcos_cap_v2"),
        (lambda: schedule_from_config({"schedule": "nope"}), "cosine"),
        (
            lambda: schedule_from_diffusers({"_class_name": "IPNDMScheduler"}),
            "no table of betas",
        ),
        (lambda: schedule_from_diffusers({"_class_name": "DDPMWuerstchenScheduler", "s": 0.008}), "no table of betas"),
        (lambda: schedule_from_diffusers({"timestep_type": "continuous"}), "supported: discrete"),
    ],
)
def test_errors_name_what_is_allowed(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_diffusers_configs_of_other_families() -> None:
    from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    flow = schedule_from_diffusers(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", **FlowMatchEulerDiscreteScheduler(shift=3.0).config}
    )
    assert flow == Flow(3.0)
    edm = schedule_from_diffusers({"_class_name": "EDMEulerScheduler", **EDMEulerScheduler().config})
    assert isinstance(edm, VE)
    assert edm.sigma_max == 80


def test_a_flow_of_few_timesteps_is_conditioned_as_diffusers_does() -> None:
    """The network of a flow trained with T timesteps sees T sigma."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=2.0)
    schedule = schedule_from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", **peer.config})
    assert schedule == schedule_from_config(schedule.config()) == Flow(2.0, 100.0)
    peer.set_timesteps(5)
    level = schedule.at(schedule.time_of(peer.timesteps))
    torch.testing.assert_close(level.sigma, peer.sigmas[:-1].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.timestep(level.t), peer.timesteps.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero", [False, True])
def test_shifted_snr_is_the_peers(zero: bool) -> None:
    """CogVideoX: the snr is divided by 3, then rescaled to zero terminal snr."""
    from diffusers import CogVideoXDDIMScheduler

    peer = CogVideoXDDIMScheduler(rescale_betas_zero_snr=zero, snr_shift_scale=3.0)
    schedule = schedule_from_diffusers({"_class_name": "CogVideoXDDIMScheduler", **peer.config})
    level = schedule.at(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(level.alpha**2, peer.alphas_cumprod.double(), rtol=0, atol=1e-6)
    assert schedule.fingerprint == schedule_from_config(schedule.config()).fingerprint
    assert schedule.fingerprint != schedule_from_diffusers({**peer.config, "snr_shift_scale": 1.0}).fingerprint
