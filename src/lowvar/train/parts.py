"""The parts of a training run that its settings name: schedule, objective, times, draw plan, references."""

from __future__ import annotations

from torch import Tensor

from lowvar.data.stream import Stream
from lowvar.errors import UserError
from lowvar.process.schedule import Schedule
from lowvar.train.clusters import cluster_labels
from lowvar.train.config import TrainConfig, make_pairing
from lowvar.train.draws import DrawPlan, ImageSource
from lowvar.train.edm import EDM, LognormalTimes
from lowvar.train.entropy_rate import EntropyRateTimes
from lowvar.train.gradient_norm import GradientNormTimes
from lowvar.train.hybrid import HybridVLB
from lowvar.train.immiscible import Immiscible
from lowvar.train.learned_schedule import LearnedScheduleTimes
from lowvar.train.logit_normal import LogitNormalTimes
from lowvar.train.minsnr import MinSNR
from lowvar.train.mode import ModeTimes
from lowvar.train.nll import PosteriorNLL
from lowvar.train.objectives import LikelihoodOnly, Objective, Simple, VarianceTerm, Weighting
from lowvar.train.optimal_transport import OptimalTransport
from lowvar.train.p2 import P2
from lowvar.train.processes import objective_times, plain_times, process_schedule
from lowvar.train.stable_target import ReferencePlan, reference_noise
from lowvar.train.streams import check_stream
from lowvar.train.timesteps import LossSecondMomentTimes, Times, UniformTimes

__all__ = [
    "make_objective",
    "make_plan",
    "make_references",
    "make_schedule",
    "make_times",
    "make_weighting",
]

_REFERENCES = 1024
_BINS = 64  # of loss-second-moment times where there is no table
WEIGHTINGS: dict[str, Weighting] = {
    "simple": Simple(),
    "min-snr": MinSNR(),
    "p2": P2(),
    "edm": EDM(),
    "uncertainty": Simple(),  # the weighting that the learned one begins with
    "none": LikelihoodOnly(),
}


def make_schedule(config: TrainConfig) -> Schedule:
    """The noise schedule of the process, in float64: for vp the table diffusers' schedulers have for these settings."""
    return process_schedule(config)


def make_weighting(config: TrainConfig, sigma_data: float = 0.5) -> Weighting:
    """The weighting; `sigma_data` is process edm's, as a number."""
    return EDM(sigma_data) if config.weighting == "edm" else WEIGHTINGS[config.weighting]


def make_objective(config: TrainConfig, levels: int | None = 256, sigma_data: float = 0.5) -> Objective:
    """The objective.

    Args:
        config: settings.
        levels: grey levels of the data, for the likelihood bins of the hybrid loss.
        sigma_data: of process edm, as a number.
    """
    weight = config.head_weight
    term: VarianceTerm | None = None
    if config.head != "none":
        kind = config.head_loss or ("vlb" if config.head == "range" else "nll")
        if kind == "vlb":
            term = HybridVLB(0.001 if weight is None else weight, levels)
        else:
            term = PosteriorNLL(0.01 if weight is None else weight)
    return Objective(make_weighting(config, sigma_data), term, config.detach_mean)


def make_times(config: TrainConfig, schedule: Schedule, sigma_data: float = 0.5) -> Times:
    """The density of training times; `sigma_data` is process edm's, as a number."""
    plain, own, weighted = plain_times(config, schedule), objective_times(config, schedule), config.times_weighted
    if config.times == "uniform":
        return plain
    if config.times == "loss-second-moment":
        if plain.steps is None:
            return LossSecondMomentTimes(_BINS, plain=own)
        return LossSecondMomentTimes(plain.steps)
    if config.times == "gradient-norm":
        return GradientNormTimes(plain=own)
    if config.times == "entropy-rate":
        weighting = make_weighting(config, sigma_data)
        return EntropyRateTimes(schedule, config.prediction, weighting, sigma_data, plain=own)
    if config.times == "learned-schedule":
        return LearnedScheduleTimes(own)
    other = None if isinstance(own, UniformTimes) else own
    if config.times == "logit-normal":
        return LogitNormalTimes(weighted=weighted, plain=plain, own=other)
    if config.times == "mode":
        return ModeTimes(weighted=weighted, plain=plain, own=other)
    return LognormalTimes(schedule, weighted=weighted, plain=plain, own=other)


def make_plan(config: TrainConfig, images: ImageSource | Stream, schedule: Schedule) -> DrawPlan:
    """The draw plan.

    Raises:
        UserError: if strata are asked for and the data have no classes, or of a stream what it cannot have.
    """
    if isinstance(images, Stream):
        check_stream(config)
    couplings = {"none": None, "optimal-transport": OptimalTransport(), "immiscible": Immiscible()}
    labels: Tensor | None = None
    if config.strata == "class":
        labels = getattr(images, "labels", None)
        if labels is None:
            raise UserError(
                "strata is class, but the data have no classes; give strata cluster:K or labelled data, or leave it out"
            )
    elif config.clusters is not None and not isinstance(images, Stream):
        labels = cluster_labels(images, config.clusters, config.seed)
    return DrawPlan(
        images,
        schedule,
        config.batch_size,
        config.seed,
        pairing=make_pairing(config),
        stratified=config.stratified,
        coupling=couplings[config.coupling],
        labels=labels,
    )


def make_references(config: TrainConfig, images: ImageSource) -> ReferencePlan | None:
    """The reference sets of target `stable` from the training split, or None for target `plain`."""
    if config.target == "plain":
        return None
    count = len(images) if config.references == "all" else config.references or _REFERENCES
    labels = getattr(images, "labels", None) if config.conditional else None
    noise = reference_noise(config.seed)
    return ReferencePlan(images, count, noise, labels=labels, neighbours=config.neighbours)
