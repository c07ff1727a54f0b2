"""Learning the reverse process: draw plans, objectives, training times, networks, the loop."""

from lowvar.train.config import TrainConfig, config_from, make_objective, make_references, make_schedule, make_times
from lowvar.train.draws import DrawPlan, Draws
from lowvar.train.edm import EDM, LognormalTimes
from lowvar.train.hybrid import HybridVLB
from lowvar.train.known_posterior import KnownPosterior, ScoreMixture, clean_score_weight
from lowvar.train.linear_variate import LinearControl, linear_variate
from lowvar.train.loop import Fitted, NonFiniteError, Trainer, fit
from lowvar.train.minsnr import MinSNR
from lowvar.train.networks import NetworkConfig, build_network
from lowvar.train.nll import PosteriorNLL
from lowvar.train.objectives import LikelihoodOnly, Losses, Objective, Simple, VarianceTerm, Weighting
from lowvar.train.p2 import P2
from lowvar.train.records import Record, Saved, Update, Validation
from lowvar.train.stable_target import ReferencePlan, StableInfo, StableTarget, memorisation, reference_noise
from lowvar.train.targets import PlainTarget, Target
from lowvar.train.taylor import taylor_variate
from lowvar.train.timesteps import LossSecondMomentTimes, TimeDraw, Times, UniformTimes
from lowvar.train.validation import ValidationLoss, ValidationSet

__all__ = [
    "EDM",
    "P2",
    "DrawPlan",
    "Draws",
    "Fitted",
    "HybridVLB",
    "KnownPosterior",
    "LikelihoodOnly",
    "LinearControl",
    "LognormalTimes",
    "LossSecondMomentTimes",
    "Losses",
    "MinSNR",
    "NetworkConfig",
    "NonFiniteError",
    "Objective",
    "PlainTarget",
    "PosteriorNLL",
    "Record",
    "ReferencePlan",
    "Saved",
    "ScoreMixture",
    "Simple",
    "StableInfo",
    "StableTarget",
    "Target",
    "TimeDraw",
    "Times",
    "TrainConfig",
    "Trainer",
    "UniformTimes",
    "Update",
    "Validation",
    "ValidationLoss",
    "ValidationSet",
    "VarianceTerm",
    "Weighting",
    "build_network",
    "clean_score_weight",
    "config_from",
    "fit",
    "linear_variate",
    "make_objective",
    "make_references",
    "make_schedule",
    "make_times",
    "memorisation",
    "reference_noise",
    "taylor_variate",
]
