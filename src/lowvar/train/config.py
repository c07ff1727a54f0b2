"""The settings of a training run, as one frozen value.

A misspelt key is an error that lists the allowed ones. The same value in YAML, on the command line and in a
checkpoint gives the same run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from lowvar.errors import UserError
from lowvar.process.head import MAX_RANK, Head
from lowvar.train.clusters import CLUSTERS
from lowvar.train.networks import NetworkConfig
from lowvar.train.pairs import CrossPairs, IndependentSamples, OrthogonalNoise, Pairing, SameImagePairs
from lowvar.train.processes import PROCESS_DEFAULTS, Process, refusal
from lowvar.train.sobol import SobolPoints

__all__ = ["PRESETS", "TrainConfig", "config_from", "make_pairing"]

# What the word `variance_reduction` of a config stands for: settings, which those given beside it replace. `auto` is
# the unbiased combination that took most variance off the gradient (benchmarks/training.py) within a tenth of an
# update's time (benchmarks/training_overhead.py); `off` the plain recipe.
PRESETS: dict[str, dict[str, Any]] = {
    "off": {},
    "auto": {"times": "gradient-norm", "stratified": True, "pairing": "cross", "target": "stable"},
}

_NO_SETTINGS = ("TrainConfig", "NetworkConfig", "constrained-int", "literal['all']")  # in the place of an error


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
        process: `vp`, a table of betas; `edm` (Karras et al. 2022) or `flow` (flow matching), both with continuous
            times. It chooses the schedule, and prediction, times, weighting and head where they are not given
            (`lowvar.train.processes`).
        sigma_data: of process edm: standard deviation of the data, or `data`: measured on the training split.
        shift: of process flow: moves its times towards noise (Esser et al. 2024); 1 does not.
        prediction: what the network predicts: epsilon, v_prediction or sample with process vp, else the process's own.
        head: variance head (`lowvar.process.head`): `range`, `logvar`, `basis`, `lowrank` or `none`.
        rank: directions of head `lowrank`; None: 4.
        basis: of head `basis`: `dct`, or `pca` of the training data; None: `dct`.
        head_loss: what trains the head: `vlb`, the bound of a step (the hybrid loss), or `nll`, the Gaussian likelihood
            of the data given the state (not for `range`); None: `vlb` for `range`, `nll` for the others.
        head_weight: factor of the head's term; None: 0.001 (lambda of the hybrid loss) for `vlb`, 0.01 for `nll`.
        detach_mean: whether the head's term leaves the mean's gradient alone; if not, it trains the mean too.
        weighting: of the squared error by noise level; `uncertainty` learns it (the plain error over what is expected
            at the level; validation stays with the plain one); `none` leaves it out, so that the head's term is the
            loss (with `detach_mean` false).
        times: density of training times: `uniform`; learned, with weights that leave the objective as it is (that of
            the process's own times: uniform, or edm's lognormal ones): `loss-second-moment`, `gradient-norm` (the
            gradient of one sample more every fourth update), `entropy-rate`, `learned-schedule`; or of a given form:
            `lognormal`, `logit-normal`, `mode`, which change the objective unless `times_weighted`.
        times_weighted: whether weights make times of a given form unbiased.
        stratified: whether the times of a batch are stratified.
        pairing: how the samples of a batch depend on each other (`lowvar.train.pairs`, `sobol`): `independent`; `same`,
            pairs of one image and time with noise and its negative; `cross`, such pairs with two images; `orthogonal`,
            groups of 4 orthogonal noises; `sobol`, times and noises from one net a batch. All are unbiased.
        coupling: what chooses the noises by the images: `none`, `optimal-transport` within the batch, or `immiscible`,
            the nearest of 8 noises. Both change the objective.
        strata: whether every batch holds the data's classes in proportion (`class`), K clusters of the images where
            there are no classes (`cluster:K`; `cluster` is 16), or neither (`none`).
        target: from which clean image the thing to predict is made: `plain`, the one that was drawn, or `stable`, the
            mean over a reference set with the drawn one in it (the same expected gradient; the training loss reads
            lower). With `conditional`, over those of its class.
        references: images of target `stable`'s reference set; `all`, or as many as there are or more: all; None: 1024.
        neighbours: how many of the references count for target `stable`, the nearest ones; None: all. For sets that are
            too large for a weight of each.
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
        trackers: programs that log the run, so far `tensorboard` (extra `track`), in the run's folder.
        sample_every: updates between pictures of samples; 0: none.
        posthoc_ema: whether two power averages of the weights are tracked and kept at about 32 moments, from which
            `lowvar.train.reconstruct_average` makes an average of any length later; two more copies of the weights in
            memory, about 66 on disk.
        noise_scale_every: updates between measurements of the gradient noise scale (`noise_scale`), which say whether a
            larger batch would pay; 0: none. A measurement costs one evaluation and gradient of the batch more, two
            where the whole batch is one group of dependent draws (stratified, sobol, stable, strata).
        gradient_accumulation_steps: pieces in which a process computes its share of a batch, so that a network fits
            into memory; the samples and, up to rounding, their gradient are the same.

    Example:
        >>> TrainConfig(updates=100).batch_size
        64
    """

    updates: Annotated[int, Field(ge=1)] = 2500
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.995
    process: Process = "vp"
    sigma_data: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["data"] = 0.5
    shift: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    prediction: Literal["epsilon", "v_prediction", "sample", "edm", "flow"] = "v_prediction"
    head: Literal["range", "logvar", "basis", "lowrank", "none"] = "range"
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] | None = None
    basis: Literal["dct", "pca"] | None = None
    head_loss: Literal["vlb", "nll"] | None = None
    head_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    detach_mean: bool = True
    weighting: Literal["simple", "min-snr", "p2", "edm", "uncertainty", "none"] = "simple"
    times: Literal[
        "uniform",
        "loss-second-moment",
        "gradient-norm",
        "entropy-rate",
        "learned-schedule",
        "lognormal",
        "logit-normal",
        "mode",
    ] = "uniform"
    times_weighted: bool = False
    stratified: bool = False
    pairing: Literal["independent", "same", "cross", "orthogonal", "sobol"] = "independent"
    coupling: Literal["none", "optimal-transport", "immiscible"] = "none"
    strata: str = "none"
    target: Literal["plain", "stable"] = "plain"
    references: Annotated[int, Field(ge=1)] | Literal["all"] | None = None
    neighbours: Annotated[int, Field(ge=1)] | None = None
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
    trackers: tuple[Literal["tensorboard"], ...] = ()
    sample_every: Annotated[int, Field(ge=0)] = 0
    posthoc_ema: bool = False
    noise_scale_every: Annotated[int, Field(ge=0)] = 0
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        """YAML reads a bare `no` as false."""
        return "no" if value is False else value

    @field_validator("trackers", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """One tracker may stand without a list."""
        return (value,) if isinstance(value, str) else value

    @field_validator("strata")
    @classmethod
    def _known_strata(cls, value: str) -> str:
        """Refuses words that are no strata."""
        word, colon, count = value.partition(":")
        number = not colon or (count.isdecimal() and int(count) >= 2)
        if value not in ("none", "class") and not (word == "cluster" and number):
            raise ValueError(
                f"strata is {value!r}; give none, class, cluster or cluster:K with a number K of clusters from 2, for "
                "example cluster:32"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _of_the_process(cls, values: Any) -> Any:
        """Fills in the process's own defaults for what is not given."""
        places, given = (values.args, values.kwargs or {}) if isinstance(values, ArgsKwargs) else ((), values)
        if not isinstance(given, Mapping):
            return values
        process = given.get("process", "vp")
        own = PROCESS_DEFAULTS.get(process, {}) if isinstance(process, str) else {}
        by_place = [field.name for field in fields(cls)][: len(places)]
        more = {name: value for name, value in own.items() if name not in by_place}
        return ArgsKwargs(tuple(places), {**more, **given})

    @model_validator(mode="after")
    def _fits_the_process(self) -> Self:
        """Refuses settings of another process."""
        sentence = refusal(self, {field.name: field.default for field in fields(self)})
        if sentence is not None:
            raise ValueError(sentence)
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Refuses settings of a head or target that is not asked for."""
        for name in ("references", "neighbours"):
            if getattr(self, name) is not None and self.target != "stable":
                raise ValueError(
                    f"{name} is {getattr(self, name)} and target {self.target}; {name} belong to target stable: leave "
                    "them out"
                )
        if self.target == "stable" and self.coupling != "none":
            raise ValueError(
                f"coupling is {self.coupling} and target stable, whose weights are those of noise that knows nothing "
                "of the images; leave one of them out"
            )
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

    @model_validator(mode="after")
    def _draws_fit_together(self) -> Self:
        """Refuses parts of a draw plan that exclude each other."""
        if self.times_weighted and self.times not in ("lognormal", "logit-normal", "mode"):
            raise ValueError(
                f"times_weighted is a setting of times lognormal, logit-normal and mode, and times is {self.times}, "
                "which is unbiased already; leave it out"
            )
        if self.times == "entropy-rate" and self.weighting in ("none", "uncertainty"):
            does = "leaves it out" if self.weighting == "none" else "changes what they are in training"
            raise ValueError(
                f"times entropy-rate reads the squared error off the losses, and weighting {self.weighting} {does}; "
                "give another weighting or other times"
            )
        if self.stratified and self.pairing == "sobol":
            raise ValueError("pairing sobol stratifies the times already; leave stratified out")
        if self.coupling != "none" and self.pairing != "independent":
            raise ValueError(
                f"coupling {self.coupling} chooses noises that pairing {self.pairing} has paired; give one of them"
            )
        size = make_pairing(self).size
        if self.batch_size % size:
            raise ValueError(
                f"batch_size is {self.batch_size} and pairing {self.pairing} makes groups of {size} samples; give a "
                "multiple of it"
            )
        return self

    @property
    def clusters(self) -> int | None:
        """K of strata `cluster:K`; None for other strata."""
        word, _, count = self.strata.partition(":")
        return int(count or CLUSTERS) if word == "cluster" else None

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
    """A config from a mapping such as a YAML file's; `variance_reduction: auto` there stands for `PRESETS["auto"]`.

    Raises:
        UserError: one sentence, for an unknown key (with the nearest and all allowed ones) or a value out of range.

    Example:
        >>> config_from({"updates": 10, "network": {"width": 16}}).network.width
        16
        >>> config = config_from({"variance_reduction": "auto", "pairing": "same"})
        >>> config.target, config.pairing
        ('stable', 'same')
    """
    values = dict(values)
    preset = values.pop("variance_reduction", "off")
    preset = "off" if preset is False else preset  # YAML reads a bare `off` as false
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UserError(f"the setting variance_reduction is {preset!r}; allowed: {', '.join(PRESETS)}")
    values = PRESETS[preset] | values
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":  # settings that do not fit together
        return first["msg"].removeprefix("Value error, ")
    where = [str(piece) for piece in first["loc"] if str(piece) not in _NO_SETTINGS]
    path = ".".join(where)
    if where == ["network"]:
        return f"the setting network is {first['input']!r}; give its own settings, for example network: {{width: 32}}"
    if where[0] == "sigma_data":
        return f"the setting sigma_data is {first['input']!r}; give a number above 0, or data to measure it on the data"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = [
            f.name for f in fields(NetworkConfig if where[:1] == ["network"] and len(where) > 1 else TrainConfig)
        ]
        allowed += ["variance_reduction"] * (where[:1] != ["network"])
        near = difflib.get_close_matches(where[-1], allowed, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"there is no setting {path!r}{hint}; allowed: {', '.join(allowed)}"
    said = [e["msg"] for e in error.errors() if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    said = said[: 2 if first["loc"][-1] in _NO_SETTINGS else 1]  # of both alternatives
    message = " or ".join(text[:1].lower() + text[1:] for text in said)
    return f"the setting {path} is {first['input']!r}: {message}"


def make_pairing(config: TrainConfig) -> Pairing:
    """How the samples of a batch depend on each other."""
    if config.pairing == "independent":
        return IndependentSamples()
    if config.pairing == "same":
        return SameImagePairs()
    if config.pairing == "cross":
        return CrossPairs()
    return OrthogonalNoise(4) if config.pairing == "orthogonal" else SobolPoints(config.batch_size)
