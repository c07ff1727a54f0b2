"""What pipelines ask of a scheduler beyond plain steps: all solvers, late starts, a timestep a sample, flows, EDM."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowvar.errors import UserError
from lowvar.process.denoiser import NetworkDenoiser, to_target
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.grid import make_grid
from lowvar.process.noise import Independent
from lowvar.process.schedule import VE
from lowvar.process.twin import GaussianTwin
from lowvar.sample import SAMPLERS, named_sampler
from lowvar.sample.trajectory import trajectory
from lowvar.schedulers import ReverseVarianceScheduler, sampler_fields

torch.set_num_threads(1)
Scheduler = ReverseVarianceScheduler
SHAPE = (3, 4, 4)
HELD = [n for n, s in SAMPLERS.items() if s.covariance is None and not s.needs_twin and not s.noise]
OTHERS = [n for n in HELD if sampler_fields(n)["sampler"] == n]
numpy2 = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own, under NumPy 2


def network(x: Tensor, t: Any) -> Tensor:
    return 0.7 * x + 0.1 * torch.sin(3 * x)


def start(rows: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return Independent(8).normal(range(rows), SHAPE, dtype=dtype)


def run(scheduler: Scheduler, x: Tensor, source: Any, first: int = 0, **kwargs: Any) -> Tensor:
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(network(x, t), t, x, generator=source, **kwargs).prev_sample
    return x


# -------------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize("name", HELD)
@pytest.mark.parametrize("grid", ["trailing", "uniform"])
def test_every_solver_is_its_trajectory(name: str, grid: str) -> None:
    """By name, with the noise of a source: same states as `trajectory`, twice in a row."""
    schedule = schedule_from_diffusers({"beta_schedule": "squaredcos_cap_v2"})
    fields: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "grid": grid, "clip_sample_range": 2.0}
    scheduler = Scheduler(**fields, **sampler_fields(name))
    denoiser = NetworkDenoiser(network, schedule, clip=2.0)
    x, times = start(), make_grid(grid, schedule, 6)
    wanted = [s.x for s, _ in trajectory(denoiser, named_sampler(name).solver, times, x, Independent(7))][-1]
    for _ in range(2):
        scheduler.set_timesteps(6)
        assert torch.allclose(run(scheduler, x, Independent(7)), wanted, atol=1e-12)
    assert len(scheduler.timesteps) == SAMPLERS[name].solver.nfe(6)


def test_the_solvers_are_all_there() -> None:
    assert {"dpmpp-2m", "unipc", "sa", "heun"} <= set(OTHERS)
    with pytest.raises(UserError, match="'unipc' has a stochasticity of its own"):
        Scheduler(sampler="unipc", eta=0.0)
    with pytest.raises(UserError, match="'ddim-noise' needs a calibration"):
        Scheduler(**sampler_fields("ddim-noise"))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", [n for n in HELD if n not in ("ddpm-large",)])
def test_learned_variance_networks_with_every_solver(name: str, channels: int) -> None:
    """2C outputs: the mean is that of the first C channels; only `learned` reads the others."""
    x = torch.rand(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    head = torch.rand(2, channels, 4, 4, generator=torch.Generator().manual_seed(2))
    results = []
    for extra in ([], [head]):
        scheduler = Scheduler(**sampler_fields(name), head="range", grid="trailing")
        scheduler.set_timesteps(4)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.cat([network(y, t), *extra], 1), t, y, generator=Independent(3)).prev_sample
        results.append(y)
    assert torch.equal(*results)


@numpy2
def test_heun_has_its_timesteps_twice() -> None:
    """As diffusers' HeunDiscreteScheduler: 2 K - 1 of them, found by their place; a step begins with the second."""
    peer, ours = diffusers.HeunDiscreteScheduler(), Scheduler(sampler="heun", timestep_spacing="linspace")
    for scheduler in (peer, ours):
        scheduler.set_timesteps(5)
    assert ours.order == peer.order == 2
    assert ours.timesteps.tolist() == pytest.approx(peer.timesteps.tolist(), abs=1)  # ours are rounded to whole ones
    x = start(dtype=torch.float32)
    whole = run(ours, x, None)
    ours.set_timesteps(5)
    values = [float(t) for t in ours.timesteps]  # without views of the tensor
    y = x
    for t in values:
        y = ours.step(network(y, t), t, y).prev_sample
    assert torch.equal(y, whole)
    # image to image: from the third level, whose two evaluations are numbers 3 and 4
    ours.set_timesteps(5)
    ours.set_begin_index(4)
    late = run(ours, x, None, first=4)
    fresh = Scheduler(sampler="heun")
    fresh.set_timesteps(timesteps=sorted(set(values[4:]), reverse=True))
    assert torch.allclose(late, run(fresh, x, None), atol=1e-6)
    ours.set_timesteps(5)
    ours.set_begin_index(3)
    with pytest.raises(UserError, match="begun with the second"):
        run(ours, x, None, first=3)


# ---------------------------------------------------------------------------------------------------------- late starts


def test_begin_index() -> None:
    scheduler = Scheduler(sampler="multistep", corrector=2, grid="trailing")
    scheduler.set_timesteps(6)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)
    scheduler.set_begin_index(2)
    assert (scheduler.begin_index, scheduler.step_index) == (2, None)
    t = scheduler.timesteps[2]
    x = start()
    scheduler.step(network(x, t), t, x)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(6)
    assert (scheduler.begin_index, scheduler.step_index) == (None, None)


# -------------------------------------------------------------------------------------------------- a timestep a sample


@pytest.mark.parametrize("name", ["ddpm-small", "adams-sde", "twin-like", "heun", "sa"])
def test_a_timestep_a_sample(name: str) -> None:
    """Samples that stand at different timesteps go their own ways, as if they were alone."""
    fields = {"sampler": "multistep", "corrector": 2, "tau": 0.5} if name == "twin-like" else sampler_fields(name)
    scheduler, alone = (Scheduler(**fields, grid="trailing") for _ in range(2))
    x, source = start(4), Independent(7)
    wanted = []
    for rows, first in (([0, 2], 0), ([1], 2), ([3], 4)):
        alone.set_timesteps(6)
        alone.set_begin_index(first)
        wanted.append((rows, run(alone, x[rows], source, first, index=rows)))
    scheduler.set_timesteps(6)
    places, y = torch.tensor([0, 2, 0, 4]), x
    last = len(scheduler.timesteps)
    while bool((places < last).any()):
        t = torch.where(places < last, scheduler.timesteps[places.clamp(max=last - 1)], -1)
        y = scheduler.step(network(y, t), t, y, generator=source).prev_sample
        places += 1
    for rows, expected in wanted:
        assert torch.allclose(y[rows], expected, atol=1e-12), rows


def test_timesteps_a_sample_from_generators() -> None:
    """One generator draws for the whole batch at once, a list one a sample; equal timesteps are the plain step."""
    scheduler, x = Scheduler(), start(3, torch.float32)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[4]
    for make in (
        lambda: torch.Generator().manual_seed(3),
        lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    ):
        plain = scheduler.step(network(x, t), t, x, generator=make()).prev_sample
        each = scheduler.step(network(x, t), t.expand(3), x, generator=make()).prev_sample
        assert torch.allclose(plain, each, atol=1e-6)
    with pytest.raises(UserError, match="2 timesteps for 3 samples"):
        scheduler.step(x, torch.tensor([900, 800]), x)
    with pytest.raises(UserError, match="timestep 5 is not among the 10"):
        scheduler.step(x, torch.tensor([900, 800, 5]), x)


# ---------------------------------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize(
    "extra",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift": 2.0},
        {"use_dynamic_shifting": True, "shift_terminal": 0.1},
        {"shift": 2.0, "shift_terminal": 0.05},
    ],
)
def test_sigmas_and_mu_are_those_of_flow_matching(extra: dict[str, Any]) -> None:
    peer: Any = diffusers.FlowMatchEulerDiscreteScheduler(**extra)
    for ours in (Scheduler.from_scheduler(peer), Scheduler.from_config(peer.config)):
        assert isinstance(ours, Scheduler)
        assert {k: v for k, v in extra.items() if k != "shift"}.items() <= dict(ours.config).items()
        assert ours.config["prediction_type"] == "flow_prediction"
        for sigmas in ([1.0, 0.7, 0.2], torch.linspace(1, 1 / 28, 28).tolist()):
            for scheduler in (peer, ours):
                scheduler.set_timesteps(sigmas=sigmas, mu=0.8)
            assert torch.allclose(ours.timesteps.float(), peer.timesteps.float(), atol=1e-2)
            assert ours.num_inference_steps == len(sigmas)
        ours.set_timesteps(7, mu=0.8)
        assert float(ours.timesteps[0]) == pytest.approx(1000, abs=1e-3)
        assert len(ours.timesteps) == 7
    x = start(dtype=torch.float32)
    peer.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=0.8)
    ours = Scheduler.from_scheduler(peer, sampler="ddim")
    ours.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=0.8)
    y = x
    for t, s in zip(peer.timesteps, ours.timesteps, strict=True):
        x = peer.step(network(x, t), t, x).prev_sample
        y = ours.step(network(y, s), s, y).prev_sample
    assert torch.allclose(x, y, atol=1e-5)
    t = ours.timesteps[1][None]
    assert torch.allclose(ours.scale_noise(x, t, 2 * x), peer.scale_noise(x, peer.timesteps[1][None], 2 * x), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "arguments", "says"),
    [
        ({"use_dynamic_shifting": True, "grid": "uniform"}, {"num_inference_steps": 4}, "give mu"),
        ({}, {"sigmas": [1.5, 0.5]}, r"must be in \(0, 1\]"),
        ({}, {"sigmas": [0.5, 0.7]}, "decrease"),
        ({}, {"sigmas": [0.5, 0.2], "num_inference_steps": 3}, "and there are 2 sigmas"),
        ({}, {"sigmas": [0.5, 0.2], "timesteps": [3, 2]}, "not both"),
    ],
)
def test_sigmas_that_cannot_be(fields: dict[str, Any], arguments: dict[str, Any], says: str) -> None:
    scheduler = Scheduler(schedule={"schedule": "flow"}, prediction_type="flow_prediction", **fields)
    with pytest.raises(UserError, match=says):
        scheduler.set_timesteps(**arguments)


@numpy2
def test_sigmas_of_a_table() -> None:
    """sigma / alpha, as diffusers' EulerDiscreteScheduler means it."""
    peer: Any = diffusers.EulerDiscreteScheduler()
    peer.set_timesteps(8)
    ours = Scheduler()
    ours.set_timesteps(sigmas=peer.sigmas.tolist())  # the 0 at the end included
    assert torch.allclose(ours.timesteps.float(), peer.timesteps.float(), atol=0.05)  # ours are between two knots


# ------------------------------------------------------------------------------------------------------------------ EDM


def test_edm_from_its_config() -> None:
    """A config on disk names its class; one that went from ours through EDM's and back is still ours."""
    peer: Any = diffusers.EDMEulerScheduler(sigma_data=0.4)
    made: Any = Scheduler.from_config({**peer.config, "_class_name": "EDMEulerScheduler"})
    assert (made.config["prediction_type"], made.config["sigma_data"]) == ("edm", 0.4)
    there: Any = diffusers.EDMEulerScheduler.from_config(Scheduler(prediction_type="v_prediction").config)
    back: Any = Scheduler.from_config(there.config)
    assert back.schedule.family == "vp"


@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
def test_edm(kind: Any) -> None:
    """EDM's own protocol: same timesteps, scaling of inputs, start and Euler steps."""
    peer: Any = kind(sigma_data=0.4, sigma_max=20.0, rho=5.0)
    ours = Scheduler.from_scheduler(peer, sampler="ddim", eta=0.0)
    assert ours.config["sigma_data"] == 0.4
    assert ours.init_noise_sigma == pytest.approx(peer.init_noise_sigma)
    for scheduler in (peer, ours):
        scheduler.set_timesteps(6)
    assert torch.allclose(ours.timesteps, peer.timesteps, atol=1e-5)
    x = y = start(dtype=torch.float32) * ours.init_noise_sigma
    for t, s in zip(peer.timesteps, ours.timesteps, strict=True):
        a, b = peer.scale_model_input(x, t), ours.scale_model_input(y, s)
        assert torch.allclose(a, b, atol=1e-5)
        if kind is diffusers.EDMEulerScheduler:
            x = peer.step(0.3 * torch.sin(a), t, x).prev_sample
            y = ours.step(0.3 * torch.sin(b), s, y).prev_sample
            assert torch.allclose(x, y, atol=2e-5)
        else:
            break


@pytest.mark.parametrize("name", HELD)
def test_edm_with_every_solver(name: str) -> None:
    """With the exact network of a Gaussian, every solver's samples have its variance, and those of `trajectory`."""
    schedule = VE(20.0)
    twin = GaussianTwin(torch.zeros(SHAPE), named_basis(), torch.full(SHAPE, 0.36))
    denoiser = twin.denoiser(schedule)
    scheduler = Scheduler(
        schedule=schedule.config(), prediction_type="edm", clip_sample=False, grid="uniform", **sampler_fields(name)
    )
    scheduler.set_timesteps(12)
    source = Independent(3)
    x0 = scheduler.start(source.normal(range(64), SHAPE, dtype=torch.float64))
    x = x0
    for t in scheduler.timesteps:
        level = schedule.at(schedule.time_of(t))
        mean = denoiser(x, level).mean
        out = to_target("edm", mean, (x - mean) / level.sigma, level)
        x = scheduler.step(out, t, x, generator=source).prev_sample
    grid = make_grid("uniform", schedule, 12)
    wanted = [s.x for s, _ in trajectory(denoiser, named_sampler(name).solver, grid, x0, source)][-1]
    assert torch.allclose(x, wanted, atol=1e-4)  # timesteps are float32


def named_basis() -> Any:
    from lowvar.process.basis import PixelBasis

    return PixelBasis(SHAPE)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"schedule": {"schedule": "ve"}, "prediction_type": "epsilon"}, "supported: 'edm' with a variance-exploding"),
        ({"prediction_type": "edm"}, "supported: 'edm' with a variance-exploding"),
        ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic'"),
    ],
)
def test_processes_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Scheduler(**fields)


# -------------------------------------------------------------------------------------------------------- kept variance


def test_kept_heads() -> None:
    scheduler = Scheduler(variance="learned", head="range")
    scheduler.set_timesteps(10)
    x, head, t = start(2, torch.float32), start(2, torch.float32).tanh().flip(0), scheduler.timesteps[3]
    out = network(x, t)

    def step(output: Tensor) -> Tensor:
        return scheduler.step(output, t, x, generator=torch.Generator().manual_seed(0)).prev_sample

    whole = step(torch.cat([out, head], 1))
    for kept in (head, torch.cat([-head, head])):  # (unconditional, conditional)
        scheduler.keep_head(kept)
        assert torch.equal(step(out), whole)
    with pytest.raises(UserError, match="cuts the head off"):  # each is used once
        step(out)
    scheduler.keep_head(head[:1])
    with pytest.raises(UserError, match="kept variance head has shape"):
        step(out)


# ---------------------------------------------------------------------------------------------------------- no transfer


class NoTransfer(TorchDispatchMode):
    """Raises where the host would read from the device, or copy to it; the device is played by `meta`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, Tensor)]
        on_device = any(a.device.type == "meta" for a in tensors)
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal") and on_device:
            raise AssertionError(f"{name} waits for the device")
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and {a.device.type for a in [*tensors, out]} == {"cpu", "meta"}:
            raise AssertionError(f"{name} copies between host and device")
        return out


def device_chain(scheduler: Scheduler, fields: dict[str, Any], strict: bool) -> None:
    y = torch.empty(2, *SHAPE, device="meta")
    for t in scheduler.timesteps:
        out = network(y, t)
        out = torch.cat([out, out], 1) if "head" in fields else out
        if strict:
            with NoTransfer():
                y = scheduler.step(out, t, y).prev_sample
        else:
            y = scheduler.step(out, t, y).prev_sample
    assert y.shape == (2, *SHAPE)


@pytest.mark.parametrize("name", [*HELD, "learned", "edm"])
def test_steps_neither_wait_nor_copy(name: str) -> None:
    """After the first chain; `test_no_transfers_in_the_loop` says the same on a GPU, and with calibrations."""
    fields: dict[str, Any] = sampler_fields(name) if name in HELD else {}
    fields |= {"head": "range", "variance": "learned"} if name == "learned" else {}
    fields |= {"schedule": {"schedule": "ve"}, "prediction_type": "edm"} if name == "edm" else {}
    scheduler = Scheduler(**fields, grid="uniform")
    scheduler.set_timesteps(5, device="meta")
    device_chain(scheduler, fields, strict=False)
    device_chain(scheduler, fields, strict=True)


def test_transfers_would_be_seen() -> None:
    x = torch.zeros(1, device="meta")
    with NoTransfer(), pytest.raises(AssertionError, match="copies"):
        torch.ones(3).to("meta")
    with NoTransfer(), pytest.raises(AssertionError, match="waits"):
        x.item()
