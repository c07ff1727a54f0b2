"""The scheduler's fields: what is allowed, what a named sampler stands for, what other schedulers' configs mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lowvar.calibrate.calibration import Calibration, missing_covariance
from lowvar.calibrate.grids import FAMILIES, check_grid, is_calibrated
from lowvar.errors import UserError
from lowvar.process.denoiser import Prediction
from lowvar.process.discrete import schedule_from_config, schedule_from_diffusers
from lowvar.process.grid import GRIDS
from lowvar.process.head import HEADS
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.schedule import VE, Flow, Schedule
from lowvar.sample.named import COVARIANCES, SAMPLERS

__all__ = [
    "CALIBRATED",
    "OWN",
    "PREDICTIONS",
    "RULES",
    "allowed",
    "check",
    "class_name",
    "has_noise",
    "make_schedule",
    "named_samplers",
    "needs_calibration",
    "needs_twin",
    "reads_head",
    "require_edm",
    "require_held",
    "sampler_fields",
    "translate",
    "translated",
    "uses_covariance",
]

RULES = ("small", "large", "learned")
CALIBRATED = (*COVARIANCES, "twin")
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
    "edm": "edm",
}
OWN = ("kernel", "multistep", "twin")  # samplers made of this config's fields; the others have names
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
_SHARED = (
    *_TABLE,
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
    "timestep_spacing",
    "steps_offset",
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
)
_SPACED = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "uniform-logsnr",
    "use_lu_lambdas": "uniform-logsnr",
}

_VARIANCES = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned",
}


def named_samplers() -> tuple[str, ...]:
    """The samplers of `lowvar.sample.SAMPLERS` that have a solver of their own."""
    own = (ReverseKernel, MultistepSolver)
    return tuple(n for n, s in SAMPLERS.items() if s.noise or not isinstance(s.solver, own))


def has_noise(c: Mapping[str, Any]) -> bool:
    """Whether the sampler adds noise that was calibrated for its grid."""
    return c["sampler"] not in OWN and SAMPLERS[c["sampler"]].noise


def allowed(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value outside the choices."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(str(c) for c in choices)}")


def uses_covariance(c: Mapping[str, Any]) -> bool:
    """Whether the sampler reads a calibrated covariance."""
    if c["sampler"] == "kernel":
        return c["variance"] not in RULES
    return c["sampler"] not in OWN and SAMPLERS[c["sampler"]].covariance is not None


def reads_head(c: Mapping[str, Any]) -> bool:
    """Whether the covariance is made of the network's own variance head."""
    return (c["sampler"] == "kernel" and c["variance"] == "learned") or (
        uses_covariance(c) and c["variance"] == "convert"
    )


def needs_twin(c: Mapping[str, Any]) -> bool:
    """Whether the sampler has the calibrated twin for a control variate."""
    return c["sampler"] == "twin" or (c["sampler"] not in OWN and SAMPLERS[c["sampler"]].needs_twin)


def needs_calibration(grid: Any) -> bool:
    """Whether a grid's name asks for a calibration."""
    return isinstance(grid, str) and (grid == "path" or is_calibrated(grid))


def check_grid_name(grid: str | None) -> None:
    """Refuses the name of no grid."""
    if grid is not None and grid not in GRIDS and not needs_calibration(grid):
        raise UserError(f"grid is {grid!r}; allowed: None, {', '.join((*GRIDS, *FAMILIES, 'path'))}")
    if grid is not None and grid != "path":
        check_grid(grid)


def _check_kinds(c: Mapping[str, Any]) -> None:
    """Refuses values of another kind than their field's, which would fail or mean nothing later."""
    for name in ("eta", "tau", "decay", "clip_sample_range", "sigma_data"):
        if not isinstance(c[name], int | float) or not math.isfinite(c[name]):
            raise UserError(f"{name} is {c[name]!r}; give a number")
    for name in ("clip_sample_range", "sigma_data"):
        if not c[name] > 0:
            raise UserError(f"{name} is {c[name]!r}; give a number above 0")
    if not isinstance(c["steps_offset"], int) or c["steps_offset"] < 0:
        raise UserError(f"steps_offset is {c['steps_offset']!r}; give a whole number from 0")
    for name, what in (("schedule", "what Schedule.config returns"), ("calibration", "a lowvar.calibrate.Calibration")):
        if c[name] is not None and not isinstance(c[name], Mapping | Calibration):
            raise UserError(f"{name} is {c[name]!r}; give {what}, or None")
    if c["grid"] is not None and not isinstance(c["grid"], str | Sequence):
        raise UserError(f"grid is {c['grid']!r}; give a name or a list of decreasing times, or None")


def check(c: Mapping[str, Any]) -> None:
    """Refuses fields that are not allowed, or not together."""
    _check_kinds(c)
    allowed("prediction_type", c["prediction_type"], tuple(PREDICTIONS))
    allowed("timestep_spacing", c["timestep_spacing"], SPACINGS)
    allowed("sampler", c["sampler"], (*OWN, *named_samplers()))
    if c["calibration"] is None:  # else the calibration knows what it has
        allowed("variance", c["variance"], (*RULES, *CALIBRATED))
    allowed("head", c["head"], (None, *HEADS))
    if (c["head"] == "basis") != (c["spectrum"] is not None):
        raise UserError(f"head is {c['head']!r}: head 'basis', and only it, needs the data's spectrum beside it")
    allowed("start_with_twin", c["start_with_twin"], (False, True, "input"))
    allowed("time_shift_type", c["time_shift_type"], ("exponential", "linear"))
    if c["grid"] is None or isinstance(c["grid"], str):
        check_grid_name(c["grid"])
    needs = ""
    if needs_twin(c) or has_noise(c):
        needs = f"sampler {c['sampler']!r}"
    elif uses_covariance(c):
        needs = f"variance {c['variance']!r}" if c["sampler"] == "kernel" else f"sampler {c['sampler']!r}"
    elif needs_calibration(c["grid"]):
        needs = f"grid {c['grid']!r}"
    if needs and c["calibration"] is None:
        raise UserError(f"{needs} needs a calibration: make one with `lowvar calibrate --model MODEL --data DATA`")
    if c["sampler"] == "kernel" and c["variance"] == "learned" and c["head"] is None:
        raise UserError(f"variance 'learned' needs a network with a variance head: set head to {', '.join(HEADS)}")
    if reads_head(c) and c["variance"] == "convert" and c["head"] != "range":
        raise UserError("variance 'convert' needs a network with a learned-range head: set head to range")
    if c["sampler"] not in OWN and (c["eta"], c["tau"]) != (1.0, 0.0):
        raise UserError(f"sampler {c['sampler']!r} has a stochasticity of its own: eta and tau are of {', '.join(OWN)}")


def require_held(c: Mapping[str, Any]) -> None:
    """Refuses a covariance that the calibration's JSON fields do not name.

    Raises:
        UserError: naming those that they do.
    """
    fields = c["calibration"]
    if fields is None or "tables" not in fields or not uses_covariance(c):
        return
    convert = ("convert",) if "converted" in fields else ()
    held = ("analytic", *fields["tables"], *fields.get("heads", ()), *convert, "twin")
    if c["variance"] not in held:
        raise missing_covariance(c["variance"], held)


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
    if (schedule.family == "ve") != (config["prediction_type"] == "edm"):
        raise UserError(
            f"prediction_type is {config['prediction_type']!r} and the schedule is {schedule.family}; supported: 'edm' "
            "with a variance-exploding schedule, and only there"
        )
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
    if named.noise or not isinstance(named.solver, ReverseKernel):
        fields = {"sampler": name, "eta": 1.0, "tau": 0.0}  # what a kernel or a multistep solver had is not its own
        return fields | ({} if named.covariance is None else {"variance": named.covariance})
    variance = named.covariance if named.solver.variance == "posterior" else named.solver.variance
    return {"sampler": "kernel", "variance": variance, "eta": named.solver.eta}


def translate(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields for the config of the scheduler class `name`."""
    if config.get("thresholding"):
        raise UserError(f"{name} uses dynamic thresholding, which is not supported: set thresholding to False")
    if config.get("invert_sigmas"):
        raise UserError(f"{name} runs its sigmas backwards (invert_sigmas), which is not supported")
    schedule = _schedule_of(name, config)
    fields = {k: config[k] for k in _SHARED if config.get(k) is not None}
    fields.setdefault("clip_sample", False)
    if fields.get("timestep_spacing") not in SPACINGS:
        fields.pop("timestep_spacing", None)
    if config.get("variance_type") in ("learned", "learned_range"):
        fields["head"] = "range"
    grid = next((grid for key, grid in _SPACED.items() if config.get(key)), None)
    if grid is not None:
        fields["grid"] = grid
    if isinstance(schedule, Flow):
        fields |= {"schedule": schedule.config(), "prediction_type": "flow_prediction"}
        fields.setdefault("grid", "uniform")
    if config.get("snr_shift_scale"):
        fields["schedule"] = schedule.config()
    if isinstance(schedule, VE):
        require_edm(name, config)
        fields |= {"schedule": schedule.config(), "prediction_type": "edm", "clip_sample": False}
        fields["sigma_data"] = config.get("sigma_data", 0.5)
        fields.setdefault("grid", "uniform-logsnr" if config.get("sigma_schedule") == "exponential" else "uniform")
    if "DDIM" in name:
        return {**fields, "sampler": "kernel", "eta": 0.0, "variance": "small"}
    if "DDPM" in name or not name:
        kind = config.get("variance_type", "fixed_small")
        allowed("variance_type", kind, tuple(_VARIANCES))
        return {**fields, "sampler": "kernel", "variance": _VARIANCES[kind]}
    tau = 1.0 if "SDE" in name or str(config.get("algorithm_type", "")).startswith("sde") else 0.0
    return {**fields, "sampler": "multistep", "tau": tau}


def class_name(config: Mapping[str, Any]) -> str:
    """The scheduler class that a config names; one in memory has no name, and flows are known by their `shift`."""
    flow = "shift" in config and "beta_start" not in config
    return str(config.get("_class_name") or ("FlowMatchEulerDiscreteScheduler" if flow else ""))


def _schedule_of(name: str, config: Mapping[str, Any]) -> Schedule:
    try:
        return schedule_from_diffusers({**config, "_class_name": name})
    except ValueError as error:
        raise UserError(f"the noise schedule of {name or 'this config'} is not supported: {error}") from error


def translated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config as `from_config` gets it: ours as it is, what others say in fields of their own in ours."""
    if config.get("schedule") is not None:
        return config
    name = class_name(config)
    made: dict[str, Any] = {}
    if "beta_start" not in config and name.startswith(("FlowMatch", "EDM")):
        made = translate(name, config)
    elif config.get("snr_shift_scale") or config.get("timestep_type") == "continuous":
        made = {"schedule": _schedule_of(name, config).config()}
    default = [k for k in config.get("_use_default_values", []) if k not in made]
    return {**config, **made, "_use_default_values": default} if made else config


def require_edm(name: str, config: Mapping[str, Any]) -> None:
    """Refuses variance-exploding schedulers other than EDM's."""
    if not name.startswith("EDM"):
        raise UserError(f"{name} is variance-exploding; supported of these: EDM's (EDMEulerScheduler and its kin)")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{name} has prediction_type {config['prediction_type']!r}; supported: epsilon (EDM's own)")
