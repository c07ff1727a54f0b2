"""The settings of a training run, as one frozen value.

A misspelt key is an error that lists the allowed ones. The same value in YAML, on the command line and in a
checkpoint gives the same run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lowvar.errors import UserError
from lowvar.process.discrete import DiscreteVP, schedule_from_diffusers
from lowvar.process.head import MAX_RANK, Head
from lowvar.process.schedule import Schedule
from lowvar.train.edm import EDM, LognormalTimes
from lowvar.train.hybrid import HybridVLB
from lowvar.train.minsnr import MinSNR
from lowvar.train.networks import NetworkConfig
from lowvar.train.nll import PosteriorNLL
from lowvar.train.objectives import LikelihoodOnly, Objective, Simple, VarianceTerm, Weighting
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
        head: variance head (`lowvar.process.head`): `range`, `logvar`, `basis`, `lowrank` or `none`.
        rank: directions of head `lowrank`; None: 4.
        basis: of head `basis`: `dct`, or `pca` of the training data; None: `dct`.
        head_loss: what trains the head: `vlb`, the bound of a step (the hybrid loss), or `nll`, the Gaussian likelihood
            of the data given the state (not for `range`); None: `vlb` for `range`, `nll` for the others.
        head_weight: factor of the head's term; None: 0.001 (lambda of the hybrid loss) for `vlb`, 0.01 for `nll`.
        detach_mean: whether the head's term leaves the mean's gradient alone; if not, it trains the mean too.
        weighting: of the squared error by noise level; `none` leaves it out, so that the head's term is the loss (with
            `detach_mean` false).
        times: density of training times.
        beta_schedule: table of the noise schedule, by diffusers' name.
        train_timesteps: length T of that table.
        network: size of the network.
        conditional: whether the network is conditioned on the data's classes.
        condition_dropout: share of training samples whose class is replaced by the null class, for guidance.
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
    head: Literal["range", "logvar", "basis", "lowrank", "none"] = "range"
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] | None = None
    basis: Literal["dct", "pca"] | None = None
    head_loss: Literal["vlb", "nll"] | None = None
    head_weight: Annotated[float, Field(gt=0)] | None = None
    detach_mean: bool = True
    weighting: Literal["simple", "min-snr", "p2", "edm", "none"] = "simple"
    times: Literal["uniform", "loss-second-moment", "lognormal"] = "uniform"
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid"] = "squaredcos_cap_v2"
    train_timesteps: Annotated[int, Field(ge=2)] = 1000
    network: NetworkConfig = NetworkConfig()
    conditional: bool = False
    condition_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    seed: int = 0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    validate_every: Annotated[int, Field(ge=1)] = 500
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Refuses settings of a head that is not asked for."""
        if self.rank is not None and self.head != "lowrank":
            raise ValueError(f"rank is {self.rank} and head {self.head}; a rank belongs to head lowrank: leave it out")
        if self.basis is not None and self.head != "basis":
            raise ValueError(f"basis is {self.basis} and head {self.head}; a basis belongs to head basis: leave it out")
        if self.head == "none":
            given = [name for name in ("head_loss", "head_weight") if getattr(self, name) is not None]
            given += [] if self.detach_mean else ["detach_mean"]
            if given:
                raise ValueError(f"{given[0]} is a setting of a variance head, and head is none; leave it out")
        if self.head == "range" and self.head_loss == "nll":
            raise ValueError(
                "head_loss nll needs a head for the covariance of the data given a state, logvar, basis or lowrank; "
                "head range says what a step's variance is, and is trained by head_loss vlb"
            )
        if self.weighting == "none" and (self.head == "none" or self.detach_mean):
            raise ValueError(
                "weighting none leaves the squared error out, so that the head's term must train the mean: give a head "
                "and detach_mean: false with it"
            )
        return self

    @property
    def network_head(self) -> Head | None:
        """The head as `NetworkDenoiser` names it."""
        return None if self.head == "none" else self.head

    @property
    def head_rank(self) -> int:
        """r of the head: 0 unless it is `lowrank`."""
        return 0 if self.head != "lowrank" else 4 if self.rank is None else self.rank

    @property
    def head_basis(self) -> Literal["dct", "pca"] | None:
        """The basis of the head, or None unless it is `basis`."""
        return None if self.head != "basis" else self.basis or "dct"


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
    if first["type"] == "value_error":  # settings that do not fit together
        return first["msg"].removeprefix("Value error, ")
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
    weightings: dict[str, Weighting] = {
        "simple": Simple(),
        "min-snr": MinSNR(),
        "p2": P2(),
        "edm": EDM(),
        "none": LikelihoodOnly(),
    }
    weight = config.head_weight
    term: VarianceTerm | None = None
    if config.head != "none":
        kind = config.head_loss or ("vlb" if config.head == "range" else "nll")
        if kind == "vlb":
            term = HybridVLB(0.001 if weight is None else weight, levels)
        else:
            term = PosteriorNLL(0.01 if weight is None else weight)
    return Objective(weightings[config.weighting], term, config.detach_mean)


def make_times(config: TrainConfig, schedule: Schedule) -> Times:
    """The density of training times."""
    if config.times == "uniform":
        return UniformTimes(config.train_timesteps)
    if config.times == "loss-second-moment":
        return LossSecondMomentTimes(config.train_timesteps)
    return LognormalTimes(schedule)
