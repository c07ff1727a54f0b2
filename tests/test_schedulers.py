"""ReverseVarianceScheduler keeps diffusers' scheduler protocol: what its common scheduler tests check, and more."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.noise import Antithetic, Independent
from lowvar.sample.named import SAMPLERS
from lowvar.schedulers import ReverseVarianceScheduler, sampler_fields

torch.set_num_threads(1)
Scheduler = ReverseVarianceScheduler

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {},
    "large, v": {"variance": "large", "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "learned": {"variance": "learned", "head": "range", "beta_schedule": "squaredcos_cap_v2"},
    "logvar": {"variance": "learned", "head": "logvar", "clip_sample": False},
    "ddim, x0": {"eta": 0.0, "prediction_type": "sample", "rescale_betas_zero_snr": True, "clip_sample_range": 0.5},
    "ode": {"sampler": "multistep", "corrector": 2, "grid": "karras"},
    "sde": {"sampler": "multistep", "tau": 1.0, "predictor": 3, "grid": "uniform-logsnr"},
    "flow": {"sampler": "multistep", "prediction_type": "flow_prediction", "grid": "trailing"},
    "flow, shifted": {"schedule": {"schedule": "flow", "shift": 3.0}, "prediction_type": "flow_prediction", "eta": 0.5},
    "cosine": {"schedule": {"schedule": "cosine"}, "grid": "quadratic"},
    "listed": {"grid": [1.0, 0.7, 0.3, 0.2, 0.1]},
}
every = pytest.mark.parametrize("fields", list(CONFIGS.values()), ids=list(CONFIGS))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def sample(channels: int = 3, batch: int = 4) -> Tensor:
    return torch.rand(batch, channels, 8, 8, generator=torch.Generator().manual_seed(5))


def output(x: Tensor, fields: dict[str, Any]) -> Tensor:
    return torch.cat([0.1 * x, 0.2 - x], 1) if "head" in fields else 0.1 * x


def run(scheduler: Scheduler, fields: dict[str, Any], x: Tensor, **kwargs: Any) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, fields), t, x, **kwargs).prev_sample
    return x


# ----------------------------------------------------------------------------------- what diffusers' common tests check


@every
@pytest.mark.parametrize("save", ["save_config", "save_pretrained"])
def test_round_trip(fields: dict[str, Any], save: str, tmp_path: Path) -> None:
    first = Scheduler(**fields)
    getattr(first, save)(tmp_path)
    second = Scheduler.from_pretrained(tmp_path)
    assert {k: v for k, v in first.config.items() if k != "_use_default_values"} == dict(second.config)
    assert second.schedule.fingerprint == first.schedule.fingerprint
    results = []
    for scheduler in (first, second):
        scheduler.set_timesteps(5)
        results.append(run(scheduler, fields, sample(), generator=seeded()))
    assert torch.equal(*results)
    assert bool(torch.isfinite(results[0]).all())


@every
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_step_keeps_shape_and_dtype(fields: dict[str, Any], channels: int) -> None:
    scheduler = Scheduler(**fields)
    scheduler.set_timesteps(5)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = sample(channels).to(dtype)
        for t in scheduler.timesteps[:2]:
            made = scheduler.step(output(x, fields), t, x, generator=seeded())
            assert made.prev_sample.shape == made.pred_original_sample.shape == x.shape
            assert made.prev_sample.dtype == made.pred_original_sample.dtype == dtype


@every
def test_tuple_and_output_agree(fields: dict[str, Any]) -> None:
    scheduler, x = Scheduler(**fields), sample()
    scheduler.set_timesteps(5)
    t, out = scheduler.timesteps[0], output(x, fields)
    record = scheduler.step(out, t, x, generator=seeded())
    plain = scheduler.step(out, t, x, generator=seeded(), return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], record.prev_sample)
    assert torch.equal(plain[1], record["pred_original_sample"])


@every
def test_public_attributes(fields: dict[str, Any]) -> None:
    scheduler, x = Scheduler(**fields), sample()
    assert scheduler.init_noise_sigma == 1.0
    assert scheduler.order == 1
    assert len(scheduler) == len(scheduler.betas) == len(scheduler.alphas_cumprod) == len(scheduler.timesteps) == 1000
    assert scheduler.betas.dtype == scheduler.alphas_cumprod.dtype == torch.float32
    assert scheduler.scale_model_input(x, 0.0) is x
    assert scheduler.config["num_train_timesteps"] == 1000
    assert Scheduler.has_compatibles
    assert Scheduler.config_name == "scheduler_config.json"


@pytest.mark.parametrize("t", [0, 500, 999])
def test_any_timestep_without_set_timesteps(t: int) -> None:
    for fields in (CONFIGS["small"], {"sampler": "multistep", "tau": 1.0}):
        scheduler, x = Scheduler(**fields), sample()
        results = [scheduler.step(0.1 * x, when, x, generator=seeded()).prev_sample for when in (t, torch.tensor(t))]
        assert torch.equal(*results)


@pytest.mark.parametrize("T", [1, 5, 100])
def test_other_numbers_of_timesteps(T: int) -> None:
    scheduler = Scheduler(num_train_timesteps=T)
    scheduler.set_timesteps(min(T, 3))
    assert bool(torch.isfinite(run(scheduler, {}, sample(), generator=seeded())).all())


def test_add_noise_and_velocity_are_those_of_ddpm() -> None:
    peer: Any = diffusers.DDPMScheduler()
    x = sample()
    scheduler, noise = Scheduler(), torch.flip(sample(), [0])
    for t in (torch.tensor([3]), torch.tensor([0, 10, 500, 999])):
        assert torch.allclose(scheduler.add_noise(x, noise, t), peer.add_noise(x, noise, t), atol=1e-6)
        assert torch.allclose(scheduler.get_velocity(x, noise, t), peer.get_velocity(x, noise, t), atol=1e-6)
    assert torch.allclose(scheduler.alphas_cumprod, peer.alphas_cumprod, rtol=1e-4)
    assert torch.allclose(scheduler.betas, peer.betas, rtol=1e-6)


def test_add_noise_of_a_flow() -> None:
    scheduler, x = Scheduler(**CONFIGS["flow, shifted"]), sample()
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    u = float(t) / 1000
    wanted = (1 - u) * x + u * 2 * x
    assert torch.allclose(scheduler.add_noise(x, 2 * x, t[None]), wanted, atol=1e-6)
    # and it is the level of the step from there: the exact velocity gives x_0 back
    step = scheduler.step(x, t, wanted, generator=seeded())
    assert torch.allclose(step.pred_original_sample, x, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own, under NumPy 2
def test_compatibles() -> None:
    scheduler = Scheduler(variance="large", prediction_type="v_prediction", tau=0.25, grid=[1.0, 0.5])
    classes = [c for c in scheduler.compatibles if "dummy" not in c.__module__]
    assert len(classes) > 10
    for other in classes:
        there: Any = other.from_config(scheduler.config)
        back: Any = Scheduler.from_config(there.config)
        same = {k: v for k, v in back.config.items() if k in scheduler.config and k != "_use_default_values"}
        assert same == {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}, other


def test_trained_betas(tmp_path: Path) -> None:
    scheduler = Scheduler(trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert Scheduler.from_pretrained(tmp_path).betas.tolist() == scheduler.betas.tolist()
    assert scheduler.betas.tolist() == pytest.approx([0.1, 0.3])
    assert len(scheduler) == 2


def test_attributes_are_looked_up_as_diffusers_does() -> None:
    scheduler: Any = Scheduler()
    scheduler.dummy_attribute = 5
    scheduler.register_to_config(test_attribute=5)
    assert scheduler.dummy_attribute == 5
    assert scheduler.save_pretrained == scheduler.save_pretrained
    with pytest.warns(FutureWarning):
        assert scheduler.test_attribute == 5
    with pytest.raises(AttributeError, match="'ReverseVarianceScheduler' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist


def test_config_of_another_class_is_read_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    diffusers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            made: Any = Scheduler.from_config(diffusers.DPMSolverMultistepScheduler(beta_end=0.03).config)
    finally:
        diffusers_logging.disable_propagation()
    assert caplog.text == ""
    assert made.config["beta_end"] == 0.03


# ------------------------------------------------------------------------------------------------------------ timesteps


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_are_those_of_ddpm(spacing: Any) -> None:
    ours, peer = Scheduler(timestep_spacing=spacing), diffusers.DDPMScheduler(timestep_spacing=spacing)
    for steps in (1, 2, 3, 7, 10, 16, 50, 333, 999, 1000):
        ours.set_timesteps(steps)
        peer.set_timesteps(steps)
        assert ours.timesteps.tolist() == peer.timesteps.tolist(), steps
        assert ours.timesteps.dtype == torch.int64
    shifted = Scheduler(steps_offset=1)
    shifted.set_timesteps(50)
    assert shifted.timesteps[-1] == 1


def test_custom_timesteps() -> None:
    scheduler = Scheduler()
    timesteps = [100, 87, 50, 1, 0]
    scheduler.set_timesteps(timesteps=timesteps)
    assert scheduler.timesteps.tolist() == timesteps
    assert [int(scheduler.previous_timestep(t).item()) for t in timesteps] == [87, 50, 1, 0, -1]
    assert scheduler.num_inference_steps == 5


def test_fractional_timesteps() -> None:
    scheduler = Scheduler(grid="karras")
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.dtype == torch.float32
    assert run(scheduler, {}, sample(), generator=seeded()).shape == sample().shape
    assert [scheduler._steps.index(t) for t in scheduler.timesteps] == list(range(7))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "num_inference_steps, timesteps or sigmas"),
        ({"num_inference_steps": 3, "timesteps": [3, 2, 1]}, "not both"),
        ({"num_inference_steps": 0}, "steps is 0; give a whole number from 1 to 1000"),
        ({"num_inference_steps": 1001}, "steps is 1001; give a whole number from 1 to 1000"),
        ({"timesteps": [1, 2]}, "decrease"),
        ({"timesteps": [1000]}, "at most 1"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [5.0, float("nan")]}, "decrease"),
        ({"sigmas": [float("nan"), 1.0]}, "decrease"),
    ],
)
def test_steps_that_cannot_be(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Scheduler().set_timesteps(**arguments)


# --------------------------------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prediction_type": "score"}, r"prediction_type is 'score'; allowed: epsilon, sample"),
        ({"sampler": "euler"}, r"sampler is 'euler'; allowed: kernel, multistep, twin"),
        ({"variance": "medium"}, r"variance is 'medium'; allowed: small, large"),
        ({"head": "var"}, r"head is 'var'; allowed: None, range, logvar"),
        ({"grid": "random"}, r"grid is 'random'; allowed: None, uniform"),
        ({"timestep_spacing": "even"}, r"timestep_spacing is 'even'"),
        ({"eta": 1.5}, r"eta is 1.5; allowed: 0"),
        ({"eta": "a"}, r"eta is 'a'; give a number"),
        ({"clip_sample_range": 0}, r"clip_sample_range is 0; give a number above 0"),
        ({"sigma_data": float("nan")}, r"sigma_data is nan; give a number"),
        ({"steps_offset": -5}, r"steps_offset is -5; give a whole number from 0"),
        ({"schedule": "cosine"}, r"schedule is 'cosine'; give what Schedule.config returns"),
        ({"calibration": "digits"}, r"calibration is 'digits'; give a lowvar"),
        ({"grid": 5}, r"grid is 5; give a name or a list"),
        ({"eta": 0.5, "variance": "large"}, r"'large' is defined for eta = 1"),
        ({"sampler": "multistep", "tau": 2.0}, r"tau is 2.0; allowed"),
        ({"sampler": "multistep", "predictor": 9}, r"predictor is 9; allowed"),
        ({"variance": "learned"}, r"needs a network with a variance head"),
        ({"variance": "basis"}, r"variance 'basis' needs a calibration"),
        ({"sampler": "twin"}, r"sampler 'twin' needs a calibration"),
        ({"grid": "variance-matched"}, r"grid 'variance-matched' needs a calibration"),
        ({"beta_schedule": "steep"}, r"beta_schedule is 'steep'; allowed: linear"),
        ({"beta_start": 0.1, "beta_end": 2.0}, r"noise schedule cannot be made"),
        ({"schedule": {"schedule": "ve"}}, r"variance-exploding"),
        ({"schedule": {"schedule": "flow"}, "prediction_type": "v_prediction"}, r"variance-preserving"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Scheduler(**fields)


def test_outputs_that_do_not_fit() -> None:
    x = sample()
    for fields, out, says in [
        ({}, torch.cat([x, x], 1), "it has a variance head; name it"),
        ({}, x[:, :2], "returned shape"),
        ({"variance": "learned", "head": "range"}, x, "cuts the head off"),
    ]:
        with pytest.raises(UserError, match=says):
            Scheduler(**fields).step(out, 10, x)
    scheduler = Scheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(UserError, match=r"timestep 5 is not among the 10 that set_timesteps chose \(900, 800, 700"):
        scheduler.step(x, 5, x)
    with pytest.raises(UserError, match="there are 2 timesteps for 4 samples"):
        scheduler.step(x, torch.tensor([900, 800]), x)


def test_a_head_may_be_cut_off_where_it_is_not_used() -> None:
    """DiTPipeline hands the scheduler C of the 2C channels."""
    x = sample()
    results = [Scheduler(head="range").step(out, 500, x, seeded()).prev_sample for out in (x, torch.cat([x, x], 1))]
    assert torch.equal(*results)


def test_zero_terminal_snr() -> None:
    fields: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler, x = Scheduler(**fields), sample()
    scheduler.set_timesteps(5)
    with pytest.raises(UserError, match="zero signal-to-noise ratio"):
        scheduler.step(x, scheduler.timesteps[0], x)
    for prediction in ("v_prediction", "sample"):
        scheduler = Scheduler(**fields, prediction_type=prediction)
        scheduler.set_timesteps(5)
        assert bool(torch.isfinite(run(scheduler, {}, x, generator=seeded())).all())


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_sources() -> None:
    """A list of generators and a NoiseSource have one stream a sample: sample i does not depend on its batch."""
    scheduler, x = Scheduler(), sample()
    source = Antithetic(Independent(3))

    def whole(generator: Any, x: Tensor, **kwargs: Any) -> Tensor:
        scheduler.set_timesteps(6)
        return run(scheduler, {}, x, generator=generator, **kwargs)

    lists = [torch.Generator().manual_seed(i) for i in range(4)]
    together = whole(lists, x)
    alone = [whole([torch.Generator().manual_seed(i)], x[i : i + 1]) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    together = whole(source, x)
    parts = [whole(source, x[i : i + 2], index=[i, i + 1]) for i in (0, 2)]
    assert torch.allclose(together, torch.cat(parts), atol=1e-6)
    assert not torch.allclose(together, whole(Independent(4), x))
    with pytest.raises(ValueError, match="2 generators for 4 samples"):
        whole(lists[:2], x)


def test_deterministic_samplers_draw_nothing() -> None:
    for fields in (CONFIGS["ode"], CONFIGS["ddim, x0"]):
        generator = seeded()
        before = generator.get_state()
        scheduler = Scheduler(**fields)
        scheduler.set_timesteps(5)
        run(scheduler, {}, sample(), generator=generator)
        assert torch.equal(before, generator.get_state())


# ----------------------------------------------------------------------------------------------------- from_scheduler


@pytest.mark.parametrize(
    ("scheduler", "fields"),
    [
        (diffusers.DDPMScheduler(), {"sampler": "kernel", "variance": "small", "eta": 1.0, "clip_sample": True}),
        (diffusers.DDPMScheduler(variance_type="fixed_large", beta_end=0.03), {"variance": "large", "beta_end": 0.03}),
        (diffusers.DDPMScheduler(variance_type="learned_range"), {"variance": "learned", "head": "range"}),
        (diffusers.DDIMScheduler(timestep_spacing="trailing"), {"eta": 0.0, "timestep_spacing": "trailing"}),
        (diffusers.PNDMScheduler(steps_offset=1), {"sampler": "multistep", "tau": 0.0, "clip_sample": False}),
        (
            diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", prediction_type="v_prediction"),
            {"sampler": "multistep", "tau": 1.0, "prediction_type": "v_prediction"},
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            {"schedule": {"schedule": "flow", "shift": 3.0}, "prediction_type": "flow_prediction"},
        ),
        (
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=200).config,  # without a name
            {"schedule": {"schedule": "flow", "shift": 3.0, "timesteps": 200.0}, "prediction_type": "flow_prediction"},
        ),
        (diffusers.CogVideoXDDIMScheduler(), {"eta": 0.0, "beta_end": 0.012}),
        (diffusers.DDPMScheduler().config, {"sampler": "kernel"}),
        (Scheduler(variance="large", grid="karras"), {"variance": "large", "grid": "karras"}),
    ],
)
def test_from_scheduler(scheduler: Any, fields: dict[str, Any]) -> None:
    made = Scheduler.from_scheduler(scheduler)
    assert {k: made.config[k] for k in fields} == fields
    made.set_timesteps(4)
    out = sample() if made.config["head"] is None else torch.cat([sample()] * 2, 1)
    assert made.step(out, made.timesteps[0], sample(), seeded()).prev_sample.shape == sample().shape


def test_from_scheduler_takes_names_and_refuses_what_it_does_not_know() -> None:
    made = Scheduler.from_scheduler(diffusers.DDPMScheduler(), sampler="adams-sde", grid="trailing")
    assert made.config["sampler"] == "multistep"
    solver = made._made_recipe().solver
    assert solver == SAMPLERS["adams-sde"].solver
    assert sampler_fields("ddpm-basis") == {"sampler": "kernel", "variance": "basis", "eta": 1.0}
    for scheduler, ours, says in [
        (diffusers.DDPMScheduler(thresholding=True), {}, "dynamic thresholding"),
        (diffusers.DDPMScheduler(variance_type="learned"), {}, "variance_type is 'learned'; allowed: fixed_small"),
        (diffusers.ScoreSdeVeScheduler(), {}, "ScoreSdeVeScheduler is variance-exploding"),
        (diffusers.EDMEulerScheduler(prediction_type="v_prediction"), {}, "supported: epsilon"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, "backwards"),
        (diffusers.IPNDMScheduler(), {}, "IPNDMScheduler is not supported: its config holds no table of betas"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), {}, "conditions the network on log"),
        (diffusers.DDPMScheduler(), {"varience": "small"}, "has no field 'varience'; it has .*variance"),
    ]:
        with pytest.raises(UserError, match=says):
            Scheduler.from_scheduler(scheduler, **ours)


def test_from_config_keeps_what_other_schedulers_say_of_the_process() -> None:
    """A shifted snr and continuous timesteps stand beside the table of betas, and are not lost."""
    peer = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=2.0)
    made: Any = Scheduler.from_config(peer.config)
    assert torch.allclose(made.alphas_cumprod.double(), peer.alphas_cumprod, atol=1e-6)
    again: Any = Scheduler.from_config(made.config)
    assert again.schedule.fingerprint == made.schedule.fingerprint
    with pytest.raises(UserError, match="timestep_type is 'continuous'"):
        Scheduler.from_config(diffusers.EulerDiscreteScheduler(timestep_type="continuous").config)


def test_repr_is_short() -> None:
    assert repr(Scheduler()).startswith("ReverseVarianceScheduler(num_train_timesteps=1000, ")


def test_config_is_json(tmp_path: Path) -> None:
    Scheduler(**CONFIGS["listed"]).save_config(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "ReverseVarianceScheduler"
    assert stored["grid"] == CONFIGS["listed"]["grid"]
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
