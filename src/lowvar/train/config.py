"""The settings of a training run, as one frozen value.

A misspelt key is an error that lists the allowed ones. The same value in YAML, on the command line and in a
checkpoint gives the same run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lowvar.errors import UserError
from lowvar.process.denoiser import Head
from lowvar.process.discrete import DiscreteVP, schedule_from_diffusers
from lowvar.process.schedule import Schedule
from lowvar.train.edm import EDM, LognormalTimes
from lowvar.train.hybrid import RangeVLB
from lowvar.train.minsnr import MinSNR
from lowvar.train.networks import NetworkConfig
from lowvar.train.nll import PosteriorNLL
from lowvar.train.objectives import Objective, Simple, VarianceTerm, Weighting
from lowvar.train.p2 import P2
from lowvar.train.timesteps import LossSecondMomentTimes, Times, UniformTimes

__all__ = ["TrainConfig", "config_from", "make_objective", "make_schedule", "make_times"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """Settings of a training run.

    Attributes:
        updates: optimiser updates.
        batch_size: samples an update, over all processes.
        lr: peak learning rate of AdamW.
        lr_schedule: what follows the warm-up: `cosine` decay to 0, `linear` decay to 0, or `constant`.
        warmup: updates over which the learning rate rises.
        weight_decay: of AdamW.
        clip_grad: largest gradient norm; 0 does not clip.
        ema: decay of the moving average of the weights, which is what comes out.
        prediction: what the network predicts.
        head: variance head: `range` (hybrid loss), `logvar` (Gaussian likelihood), or `none`.
        head_weight: factor of the head's term; None: 0.001 (lambda of the hybrid loss) for `range`, 0.01 for `logvar`.
        weighting: of the squared error by noise level.
        times: density of training times.
        beta_schedule: table of the noise schedule, by diffusers' name.
        train_timesteps: length T of that table.
        network: size of the network.
        seed: of initial weights, data order, times and noise.
        mixed_precision: of the network's evaluations; losses and schedule stay in float32 or wider.
        validate_every: updates between validations.
        checkpoint_every: updates between checkpoints.
        keep_checkpoints: how many of the newest stay.

    Example:
        >>> TrainConfig(updates=100).batch_size
        64
    """

    updates: Annotated[int, Field(ge=1)] = 2500
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 2e-3
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    head: Literal["range", "logvar", "none"] = "range"
    head_weight: Annotated[float, Field(gt=0)] | None = None
    weighting: Literal["simple", "min-snr", "p2", "edm"] = "simple"
    times: Literal["uniform", "loss-second-moment", "lognormal"] = "uniform"
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid"] = "squaredcos_cap_v2"
    train_timesteps: Annotated[int, Field(ge=2)] = 1000
    network: NetworkConfig = NetworkConfig()
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    validate_every: Annotated[int, Field(ge=1)] = 500
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2

    @property
    def network_head(self) -> Head | None:
        """The head as `NetworkDenoiser` names it."""
        return None if self.head == "none" else self.head


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """A config from a mapping such as a YAML file's.

    Raises:
        UserError: one sentence, for an unknown key (with the nearest and all allowed ones) or a value out of range.

    Example:
        >>> config_from({"updates": 10, "network": {"width": 16}}).network.width
        16
    """
    try:
        return TypeAdapter(TrainConfig).validate_python(dict(values))
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = [str(piece) for piece in first["loc"] if str(piece) not in ("TrainConfig", "NetworkConfig")]
    path = ".".join(where)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = [
            f.name for f in fields(NetworkConfig if where[:1] == ["network"] and len(where) > 1 else TrainConfig)
        ]
        near = difflib.get_close_matches(where[-1], allowed, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"there is no setting {path!r}{hint}; allowed: {', '.join(allowed)}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"the setting {path} is {first['input']!r}: {message}"


def make_schedule(config: TrainConfig) -> DiscreteVP:
    """The noise schedule: the table diffusers' schedulers have for these settings, in float64."""
    schedule = schedule_from_diffusers(
        {"beta_schedule": config.beta_schedule, "num_train_timesteps": config.train_timesteps}
    )
    if not isinstance(schedule, DiscreteVP):
        raise TypeError(f"expected a table of betas, got {type(schedule).__name__}")
    return schedule


def make_objective(config: TrainConfig, levels: int | None = 256) -> Objective:
    """The objective; `levels` are the data's grey levels, for the likelihood bins of the hybrid loss."""
    weightings: dict[str, Weighting] = {"simple": Simple(), "min-snr": MinSNR(), "p2": P2(), "edm": EDM()}
    weight = config.head_weight
    term: VarianceTerm | None = None
    if config.head == "range":
        term = RangeVLB(0.001 if weight is None else weight, levels)
    elif config.head == "logvar":
        term = PosteriorNLL(0.01 if weight is None else weight)
    return Objective(weightings[config.weighting], term)


def make_times(config: TrainConfig, schedule: Schedule) -> Times:
    """The density of training times."""
    if config.times == "uniform":
        return UniformTimes(config.train_timesteps)
    if config.times == "loss-second-moment":
        return LossSecondMomentTimes(config.train_timesteps)
    return LognormalTimes(schedule)
