"""Parity with diffusers' DDPMScheduler and DDIMScheduler, given the same noise.

Two peers: the scheduler as shipped (float32 tables), to 1e-4, and the same scheduler with its tables recomputed in
float64 from its own config and float64 samples, to 1e-10, by step and over the whole chain.

Where we differ on purpose: the step to clean data adds no noise, whatever its timestep; DDPMScheduler does where the
last timestep is not 0.
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.kernel import ReverseKernel
from lowvar.schedulers import ReverseVarianceScheduler, _solvers

torch.set_num_threads(1)
SPACINGS = ("leading", "trailing", "linspace")
TABLES: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "latent": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
}
STEPS = {"linear": (10, 50), "cosine": (10, 50), "latent": (10,)}
VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}


def betas64(config: Any) -> np.ndarray:
    """The table that a diffusers config describes, in float64."""
    T, start, end = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["beta_schedule"] == "linear":
        return np.linspace(start, end, T)
    if config["beta_schedule"] == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, T) ** 2

    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / T) / bar(i / T), 0.999) for i in range(T)])


def widened(peer: Any) -> Any:
    """The peer with float64 tables."""
    peer.betas = torch.from_numpy(betas64(peer.config))
    peer.alphas = 1 - peer.betas
    peer.alphas_cumprod = torch.cumprod(peer.alphas, 0)
    return peer


def network(x: Tensor, t: Tensor, head: bool) -> Tensor:
    """A smooth function of state and time, with a variance head beside it where asked."""
    out = torch.sin(x + 0.003 * float(t)) * 0.9
    return torch.cat([out, torch.cos(3 * x - 0.002 * float(t))], 1) if head else out


def start(dtype: torch.dtype, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, channels, 4, 4, generator=generator, dtype=torch.float64).to(dtype)


def seeded(k: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + k)


def loop(ours: Any, peer: Any, steps: int, dtype: torch.dtype, head: bool, **extra: Any) -> tuple[float, float]:
    """Largest difference of a step taken from the peer's own states, and of the whole chains, in units of the states.

    The unit is 1 or the largest entry of the peer's state, where that is more (latents without clipping reach 20).
    """
    ours.set_timesteps(steps)
    peer.set_timesteps(steps)
    assert ours.timesteps.tolist() == peer.timesteps.tolist()
    x = y = start(dtype)
    step_error = 0.0
    last = len(peer.timesteps) - 1
    for k, t in enumerate(peer.timesteps):
        there = peer.step(network(y, t, head), t, y, generator=seeded(k), **extra)
        wanted = there.pred_original_sample if k == last else there.prev_sample
        here = ours.step(network(y, t, head), t, y, generator=seeded(k)).prev_sample
        unit = max(1.0, float(wanted.abs().max()))
        step_error = max(step_error, float((here - wanted).abs().max()) / unit)
        x = ours.step(network(x, t, head), t, x, generator=seeded(k)).prev_sample
        y = wanted
    return step_error, float((x - y).abs().max()) / max(1.0, float(y.abs().max()))


CASES = [
    (table, spacing, variance, prediction)
    for table in TABLES
    for spacing in SPACINGS
    for variance in VARIANCES
    for prediction in ("epsilon", "v_prediction", "sample")
]


@pytest.mark.parametrize(("table", "spacing", "variance", "prediction"), CASES)
def test_ddpm(table: str, spacing: str, variance: Any, prediction: Any) -> None:
    fields = {**TABLES[table], "timestep_spacing": spacing, "prediction_type": prediction}
    head = variance == "learned_range"
    ours = ReverseVarianceScheduler(**fields, variance=VARIANCES[variance], head="range" if head else None)
    peer = diffusers.DDPMScheduler(**fields, variance_type=variance)
    shipped = [loop(ours, peer, steps, torch.float32, head) for steps in STEPS[table]]
    wide = [loop(ours, widened(peer), steps, torch.float64, head) for steps in STEPS[table]]
    assert max(map(max, wide)) < 1e-10
    assert max(map(max, shipped)) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("table", list(TABLES))
def test_ddim(table: str, spacing: Any, prediction: Any, eta: float) -> None:
    """Its noise prediction taken from the clipped x_0 (`use_clipped_model_output`), as a Gaussian step needs it."""
    fields = {**TABLES[table], "timestep_spacing": spacing, "prediction_type": prediction}
    ours = ReverseVarianceScheduler(**fields, variance="small", eta=eta)
    peer = diffusers.DDIMScheduler(**fields)
    extra = {"eta": eta, "use_clipped_model_output": True}
    shipped = [loop(ours, peer, steps, torch.float32, False, **extra) for steps in STEPS[table]]
    wide = [loop(ours, widened(peer), steps, torch.float64, False, **extra) for steps in STEPS[table]]
    assert max(map(max, wide)) < 1e-10
    assert max(map(max, shipped)) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_linspace(eta: float, steps: int) -> None:
    """With linspace DDIMScheduler steps to t - T // K, not to the next timestep: single steps to there agree."""
    peer = widened(diffusers.DDIMScheduler(timestep_spacing="linspace"))
    peer.set_timesteps(steps)
    ours = ReverseVarianceScheduler(eta=eta)
    x = start(torch.float64)
    for t in peer.timesteps.tolist():
        to = t - 1000 // steps
        ours.set_timesteps(timesteps=[t, to] if to >= 0 else [t])
        out = network(x, torch.tensor(t), False)
        there = peer.step(out, t, x, generator=seeded(t), eta=eta, use_clipped_model_output=True)
        wanted = there.prev_sample if to >= 0 else there.pred_original_sample
        here = ours.step(out, t, x, generator=seeded(t)).prev_sample
        assert float((here - wanted).abs().max()) < 1e-10


# ---------------------------------------------------------------------------------------------------------- golden sums


def counted(flip: bool = False) -> Tensor:
    """The fixed sample of diffusers' scheduler tests: 0, 1/n, 2/n .. with the batch as the fastest axis."""
    n = 4 * 3 * 8 * 8
    values = torch.arange(n).flip(-1) if flip else torch.arange(n)
    return (values.reshape(3, 8, 8, 4) / n).permute(3, 0, 1, 2)


def dummy(x: Tensor, t: Any) -> Tensor:
    return x * t / (t + 1)


@pytest.mark.parametrize(
    ("prediction", "total", "mean"), [("epsilon", 258.9606, 0.3372), ("v_prediction", 202.0296, 0.2631)]
)
def test_golden_full_loop(prediction: str, total: float, mean: float) -> None:
    scheduler = ReverseVarianceScheduler(prediction_type=prediction, variance="small")
    x, generator = counted(), torch.Generator().manual_seed(0)
    for t in reversed(range(len(scheduler))):
        x = scheduler.step(dummy(x, t), t, x, generator=generator).prev_sample
    assert abs(float(x.abs().sum()) - total) < 1e-2
    assert abs(float(x.abs().mean()) - mean) < 1e-3


def test_golden_from_a_noisy_start() -> None:
    """The third golden sum, 387.9466, holds float32 error of 1 - alpha_bar near t = 0; the peer in float64 has ours."""

    def run(scheduler: Any, x: Tensor) -> float:
        generator = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps[998:]:
            x = scheduler.step(dummy(x, t), t, x, generator=generator).prev_sample
        return float(x.abs().sum())

    ours, peer = ReverseVarianceScheduler(), widened(diffusers.DDPMScheduler())
    t = ours.timesteps[998:999]
    x = ours.add_noise(counted(), counted(flip=True), t)
    assert torch.allclose(x, peer.add_noise(counted(), counted(flip=True), t), atol=1e-6)
    assert abs(run(ours, x) - 387.9466) < 5e-2
    assert abs(run(ours, x.double()) - run(peer, x.double())) < 1e-6


# ---------------------------------------------------------------------------------------- where we differ, planted bugs


def test_the_last_step_adds_no_noise() -> None:
    """DDPMScheduler adds noise of standard deviation .32 to the final image with `trailing` and `fixed_large`."""
    fields: dict[str, Any] = {"timestep_spacing": "trailing"}
    peer: Any = diffusers.DDPMScheduler(**fields, variance_type="fixed_large")
    ours = ReverseVarianceScheduler(**fields, variance="large")
    x, t = torch.zeros(64, 3, 8, 8), 99
    for scheduler in (peer, ours):
        scheduler.set_timesteps(10)
    there, here = (s.step(torch.zeros_like(x), t, x, generator=seeded(0)).prev_sample for s in (peer, ours))
    assert abs(float(there.std()) - 0.32) < 0.01
    assert float(here.std()) == 0


@pytest.mark.parametrize("bug", ["noise at the last step", "fraction mis-scaled", "large for small", "no clip"])
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails for each."""
    variance: Any
    variance, head = ("fixed_small", False) if bug != "fraction mis-scaled" else ("learned_range", True)
    fields: dict[str, Any] = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    ours = ReverseVarianceScheduler(**fields, variance=VARIANCES[variance], head="range" if head else None)
    peer = widened(diffusers.DDPMScheduler(**fields, variance_type=variance))
    assert loop(ours, peer, 10, torch.float64, head)[0] < 1e-10
    if bug == "noise at the last step":
        kept = ReverseVarianceScheduler.step

        def noisy(self: Any, *args: Any, **kwargs: Any) -> Any:
            made = kept(self, *args, **kwargs)
            if args[1] == self.timesteps[-1]:
                made.prev_sample = made.prev_sample + 1e-3 * start(made.prev_sample.dtype)
            return made

        monkeypatch.setattr(ReverseVarianceScheduler, "step", noisy)
    elif bug == "fraction mis-scaled":
        right = NetworkDenoiser.interpret

        def wrong(self: Any, x: Any, level: Any, out: Any, raw: Any) -> Any:
            return right(self, x, level, out, 2 * raw + 1)  # f = v + 1 in the place of (v + 1) / 2

        monkeypatch.setattr(NetworkDenoiser, "interpret", wrong)
    elif bug == "large for small":
        monkeypatch.setattr(_solvers, "solver_of", lambda *_: ReverseKernel(1.0, "large"))
    else:
        ours.register_to_config(clip_sample=False)
    assert loop(ours, peer, 10, torch.float64, head)[0] > 1e-5
