"""Learning the reverse process: draw plans, objectives, training times, networks, the loop."""

from lowvar.train.averaging import PowerAverages
from lowvar.train.config import TrainConfig, config_from, make_objective, make_schedule, make_times
from lowvar.train.draws import DrawPlan, Draws
from lowvar.train.edm import EDM, LognormalTimes
from lowvar.train.hybrid import HybridVLB
from lowvar.train.loop import Fitted, NonFiniteError, Trainer, fit
from lowvar.train.minsnr import MinSNR
from lowvar.train.networks import NetworkConfig, build_network
from lowvar.train.nll import PosteriorNLL
from lowvar.train.noise_scale import NoiseScale
from lowvar.train.objectives import LikelihoodOnly, Losses, Objective, Simple, VarianceTerm, Weighting
from lowvar.train.p2 import P2
from lowvar.train.records import Record, Saved, Update, Validation
from lowvar.train.timesteps import LossSecondMomentTimes, TimeDraw, Times, UniformTimes
from lowvar.train.uncertainty import Uncertainty, weighting_curves
from lowvar.train.validation import ValidationLoss, ValidationSet

__all__ = [
    "EDM",
    "P2",
    "DrawPlan",
    "Draws",
    "Fitted",
    "HybridVLB",
    "LikelihoodOnly",
    "LognormalTimes",
    "LossSecondMomentTimes",
    "Losses",
    "MinSNR",
    "NetworkConfig",
    "NoiseScale",
    "NonFiniteError",
    "Objective",
    "PosteriorNLL",
    "PowerAverages",
    "Record",
    "Saved",
    "Simple",
    "TimeDraw",
    "Times",
    "TrainConfig",
    "Trainer",
    "Uncertainty",
    "UniformTimes",
    "Update",
    "Validation",
    "ValidationLoss",
    "ValidationSet",
    "VarianceTerm",
    "Weighting",
    "build_network",
    "config_from",
    "fit",
    "make_objective",
    "make_schedule",
    "make_times",
    "weighting_curves",
]
