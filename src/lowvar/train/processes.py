r"""The processes that the trainer knows: which schedule, prediction, times and weighting belong together.

    process   schedule                         prediction                times                  weighting
    vp        a table of T betas (diffusers')  epsilon, x_0 or v         uniform on the table   simple
    edm       VE, sigma from 0.002 to 80       F of c_skip y + c_out F   lognormal sigma        edm: snr + 1 / sd^2
    flow      alpha = 1 - u, sigma = u         eps - x_0                 uniform                simple

Each is the recipe of its source; the columns are defaults of the settings of those names. edm and flow have no table:
the plain times are continuous,

    t = t_min + (1 - t_min) v,    v ~ U(0, 1),    t_min the schedule's,

With edm's lognormal times and weighting the objective is Karras et al.'s,

    E_{log s ~ N(-1.2, 1.2^2)} lambda(s) E ||D(x_0 + s eps, s) - x_0||^2 / d,    lambda = (s^2 + sd^2) / (s sd)^2,

which for the raw network F is a plain squared error. Learned times are weighted so that the objective stays that of the
process's own times, the lognormal ones here. sd, `sigma_data`, is 0.5 as published, or that of the training
data (`measured_sigma_data`): then F sees and predicts numbers of variance 1 whatever the data's unit. A flow's `shift`
s moves its uniform times towards noise, u = s t / (1 + (s - 1) t).

A variance head of kind `range` interpolates between the two variances that a table's betas give a step, and is for vp;
the others (logvar, basis, lowrank) are for every process.

Sources: Ho et al. 2020, Nichol & Dhariwal 2021 (vp); Karras et al. 2022, Table 1 (edm); Lipman et al. 2023, Liu et al.
2023 (flow); Esser et al. 2024 (shift, logit-normal times).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from lowvar.errors import UserError
from lowvar.process.discrete import schedule_from_diffusers
from lowvar.process.schedule import VE, Flow, Schedule
from lowvar.train.edm import LognormalTimes
from lowvar.train.timesteps import FixedTimes, UniformTimes

if TYPE_CHECKING:
    from lowvar.train.config import TrainConfig
    from lowvar.train.draws import ImageSource

__all__ = [
    "PROCESS_DEFAULTS",
    "Process",
    "measured_sigma_data",
    "objective_times",
    "plain_times",
    "process_schedule",
    "refusal",
    "resolved_sigma_data",
    "saved_fields",
]

Process = Literal["vp", "edm", "flow"]

# What a process sets where the settings do not: vp's defaults are those of `TrainConfig` itself.
PROCESS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "vp": {},
    "edm": {"prediction": "edm", "times": "lognormal", "weighting": "edm", "head": "none"},
    "flow": {"prediction": "flow", "head": "none"},
}
_PREDICTIONS = {"vp": ("epsilon", "v_prediction", "sample"), "edm": ("edm",), "flow": ("flow",)}
_OWNER = {"sigma_data": "edm", "shift": "flow", "beta_schedule": "vp", "train_timesteps": "vp"}
_BATCH, _IMAGES = 1024, 16384


def refusal(config: TrainConfig, defaults: Mapping[str, Any]) -> str | None:
    """The sentence that refuses settings which do not belong to the process, or None; `defaults` by field name."""
    process, allowed = config.process, _PREDICTIONS[config.process]
    if config.prediction not in allowed:
        home = next(p for p, names in _PREDICTIONS.items() if config.prediction in names)
        return (
            f"prediction is {config.prediction} and process {process}, which allows {', '.join(allowed)}; give one of "
            f"these, leave prediction out, or give process {home}"
        )
    if config.head == "range" and process != "vp":
        return (
            f"head is range and process {process}; a range lies between two variances of a table of betas, which only "
            "process vp has: give head logvar, basis, lowrank or none"
        )
    for name, owner in _OWNER.items():
        value = getattr(config, name)
        if process != owner and value != defaults[name]:
            return f"{name} is {value} and process {process}; {name} belongs to process {owner}: leave it out"
    return None


def process_schedule(config: TrainConfig) -> Schedule:
    """The noise schedule, in float64; for vp the table that diffusers' schedulers have for these settings.

    Example:
        >>> from lowvar.train import TrainConfig
        >>> process_schedule(TrainConfig(process="flow", shift=3.0)).shift
        3.0
    """
    if config.process == "edm":
        return VE()
    if config.process == "flow":
        return Flow(config.shift)
    return schedule_from_diffusers(
        {"beta_schedule": config.beta_schedule, "num_train_timesteps": config.train_timesteps}
    )


def plain_times(config: TrainConfig, schedule: Schedule) -> UniformTimes:
    """The process's uniform times: a table's, or continuous ones from the schedule's t_min.

    Example:
        >>> from lowvar.process import Flow
        >>> from lowvar.train import TrainConfig
        >>> plain_times(TrainConfig(process="flow"), Flow())
        UniformTimes(steps=None, t_min=0.001)
    """
    if config.process == "vp":
        return UniformTimes(config.train_timesteps)
    return UniformTimes(None, schedule.t_min)


def objective_times(config: TrainConfig, schedule: Schedule) -> FixedTimes:
    """The times that are part of the process's objective, which learned ones are weighted for: edm's are lognormal.

    Example:
        >>> from lowvar.process import VE
        >>> from lowvar.train import config_from
        >>> objective_times(config_from({"process": "edm", "times": "gradient-norm"}), VE()).label
        'changes the objective'
    """
    return LognormalTimes(schedule) if config.process == "edm" else plain_times(config, schedule)


def measured_sigma_data(images: ImageSource) -> float:
    """The standard deviation of all numbers of the first 16384 images at most, to 4 digits.

    Rounded, so that machines which sum in another order agree.

    Raises:
        UserError: if all numbers are equal.

    Example:
        >>> from lowvar.data import load
        >>> measured_sigma_data(load("digits").train)
        0.7527
    """
    count, total, square = 0, 0.0, 0.0
    for rows in torch.arange(min(len(images), _IMAGES)).split(_BATCH):
        x = images.images(rows).double()
        count, total, square = count + x.numel(), total + float(x.sum()), square + float((x**2).sum())
    variance = square / count - (total / count) ** 2
    if not variance > 1e-12:
        raise UserError("sigma_data is data, and all numbers of the training data are equal; give a number above 0")
    return float(f"{math.sqrt(variance):.4g}")


def resolved_sigma_data(config: TrainConfig, images: ImageSource) -> float:
    """sd as a number: the setting's, or measured on the training split where it says `data`."""
    return measured_sigma_data(images) if config.sigma_data == "data" else float(config.sigma_data)


def saved_fields(config: TrainConfig, schedule: Schedule, sigma_data: float) -> dict[str, Any]:
    """The fields of a `ReverseVarianceScheduler` that say what was trained, without those of a head.

    A folder of edm or flow begins with the probability flow on EDM's or a uniform grid, as diffusers' own schedulers
    for these do; one of vp with the ancestral kernel.

    Example:
        >>> from lowvar.process import Flow
        >>> from lowvar.train import TrainConfig
        >>> saved_fields(TrainConfig(process="flow"), Flow(), 0.5)["prediction_type"]
        'flow_prediction'
    """
    if config.process == "vp":
        return {
            "num_train_timesteps": config.train_timesteps,
            "beta_schedule": config.beta_schedule,
            "prediction_type": config.prediction,
            "timestep_spacing": "trailing",
            "variance": "learned" if config.head != "none" else "small",
        }
    own = {"sampler": "multistep"} if config.head == "none" else {"variance": "learned"}
    kind = {"edm": "edm", "flow": "flow_prediction"}[config.process]
    data = {"sigma_data": sigma_data} if config.process == "edm" else {}
    return {"schedule": schedule.config(), "prediction_type": kind, "grid": "uniform", **data, **own}
