"""The scheduler's fields: what is allowed, what a named sampler stands for, what other schedulers' configs mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowvar.errors import UserError
from lowvar.process.denoiser import Prediction
from lowvar.process.discrete import schedule_from_config, schedule_from_diffusers
from lowvar.process.grid import GRIDS
from lowvar.process.head import HEADS
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.schedule import Flow, Schedule
from lowvar.sample.named import SAMPLERS

__all__ = ["CALIBRATED", "PREDICTIONS", "RULES", "allowed", "check", "make_schedule", "sampler_fields", "translate"]

RULES = ("small", "large", "learned")
CALIBRATED = ("analytic", "isotropic", "channel", "pixel", "basis", "twin")
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}
SPACINGS = ("leading", "linspace", "trailing")

# Fields that mean the same in diffusers' configs: the training's table, then the rest.
_TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
_SHARED = (*_TABLE, "prediction_type", "clip_sample", "clip_sample_range", "timestep_spacing", "steps_offset")

_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}


def allowed(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value outside the choices."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(str(c) for c in choices)}")


def check(c: Mapping[str, Any]) -> None:
    """Refuses fields that are not allowed, or not together."""
    allowed("prediction_type", c["prediction_type"], tuple(PREDICTIONS))
    allowed("timestep_spacing", c["timestep_spacing"], SPACINGS)
    allowed("sampler", c["sampler"], ("kernel", "multistep", "twin"))
    allowed("variance", c["variance"], (*RULES, *CALIBRATED))
    allowed("head", c["head"], (None, *HEADS))
    if (c["head"] == "basis") != (c["spectrum"] is not None):
        raise UserError(f"head is {c['head']!r}: head 'basis', and only it, needs the data's spectrum beside it")
    if c["grid"] is None or isinstance(c["grid"], str):
        allowed("grid", c["grid"], (None, *GRIDS, "variance-matched"))
    needs = ""
    if c["sampler"] == "twin":
        needs = "sampler 'twin'"
    elif c["sampler"] == "kernel" and c["variance"] in CALIBRATED:
        needs = f"variance {c['variance']!r}"
    elif c["grid"] == "variance-matched":
        needs = "grid 'variance-matched'"
    if needs and c["calibration"] is None:
        raise UserError(f"{needs} needs a calibration: make one with `lowvar calibrate --model MODEL --data DATA`")
    if c["sampler"] == "kernel" and c["variance"] == "learned" and c["head"] is None:
        raise UserError(f"variance 'learned' needs a network with a variance head: set head to {', '.join(HEADS)}")


def make_schedule(config: Mapping[str, Any]) -> Schedule:
    """The noise schedule of our own config."""
    given = config["schedule"]
    try:
        if given is not None:
            schedule = schedule_from_config(given)
        else:
            keys = (*_TABLE, "prediction_type")
            schedule = schedule_from_diffusers({k: config[k] for k in keys if config[k] is not None})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"the noise schedule cannot be made: {error}") from error
    if schedule.family == "ve":
        raise UserError("the schedule is variance-exploding; supported: variance-preserving and flow schedules")
    return schedule


def sampler_fields(name: str) -> dict[str, Any]:
    """The scheduler's fields for a sampler of `lowvar.sample.named.SAMPLERS`.

    Raises:
        UserError: if the name is unknown.

    Example:
        >>> sampler_fields("ddim")
        {'sampler': 'kernel', 'variance': 'small', 'eta': 0.0}
    """
    allowed("sampler", name, tuple(SAMPLERS))
    named = SAMPLERS[name]
    if isinstance(named.solver, MultistepSolver):
        fields = {k: getattr(named.solver, k) for k in ("predictor", "corrector", "tau", "decay")}
        return {"sampler": "twin" if named.needs_twin else "multistep", **fields}
    assert isinstance(named.solver, ReverseKernel)
    variance = named.covariance if named.solver.variance == "posterior" else named.solver.variance
    return {"sampler": "kernel", "variance": variance, "eta": named.solver.eta}


def translate(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields for the config of the scheduler class `name`."""
    if config.get("thresholding"):
        raise UserError(f"{name} uses dynamic thresholding, which is not supported: set thresholding to False")
    try:
        schedule = schedule_from_diffusers({**config, "_class_name": name})
    except ValueError as error:
        raise UserError(f"the noise schedule of {name} is not supported: {error}") from error
    if schedule.family == "ve":
        raise UserError(f"{name} is variance-exploding; supported: variance-preserving and flow schedules")
    fields = {k: config[k] for k in _SHARED if config.get(k) is not None}
    fields.setdefault("clip_sample", False)
    if isinstance(schedule, Flow):
        fields |= {"schedule": schedule.config(), "prediction_type": "flow_prediction"}
    if fields.get("timestep_spacing") not in SPACINGS:
        fields.pop("timestep_spacing", None)
    if "DDIM" in name:
        return {**fields, "sampler": "kernel", "eta": 0.0, "variance": "small"}
    if "DDPM" in name or not name:
        kind = config.get("variance_type", "fixed_small")
        allowed("variance_type", kind, tuple(_VARIANCES))
        variance = _VARIANCES[kind]
        return {**fields, "sampler": "kernel", "variance": variance, "head": "range" if variance == "learned" else None}
    tau = 1.0 if "SDE" in name or str(config.get("algorithm_type", "")).startswith("sde") else 0.0
    return {**fields, "sampler": "multistep", "tau": tau}
