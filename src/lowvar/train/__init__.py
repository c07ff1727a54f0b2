"""Learning the reverse process: draw plans, objectives, training times, networks, the loop."""

from lowvar.train.averaging import PowerAverages
from lowvar.train.cautions import cautions
from lowvar.train.clusters import cluster_labels
from lowvar.train.config import PRESETS, TrainConfig, config_from
from lowvar.train.draws import DrawPlan, Draws
from lowvar.train.edm import EDM, LognormalTimes
from lowvar.train.entropy_rate import EntropyRateTimes
from lowvar.train.fitting import Fitted, fit
from lowvar.train.gradient_norm import GradientNormTimes
from lowvar.train.guards import NonFiniteError
from lowvar.train.hybrid import HybridVLB
from lowvar.train.immiscible import Immiscible, nearest_noise
from lowvar.train.kept_averages import reconstruct_average
from lowvar.train.known_posterior import KnownPosterior, ScoreMixture, clean_score_weight
from lowvar.train.learned_schedule import LearnedScheduleTimes
from lowvar.train.linear_control import LinearControl
from lowvar.train.linear_loss import LinearLoss
from lowvar.train.logit_normal import LogitNormalTimes
from lowvar.train.loop import Trainer
from lowvar.train.minsnr import MinSNR
from lowvar.train.mode import ModeTimes
from lowvar.train.networks import NetworkConfig, build_network
from lowvar.train.nll import PosteriorNLL
from lowvar.train.noise_scale import NoiseScale
from lowvar.train.objectives import LikelihoodOnly, Losses, Objective, Simple, VarianceTerm, Weighting
from lowvar.train.optimal_transport import OptimalTransport, optimal_transport
from lowvar.train.own_networks import check_network, own_network
from lowvar.train.p2 import P2
from lowvar.train.pairs import CrossPairs, IndependentSamples, OrthogonalNoise, Pairing, SameImagePairs
from lowvar.train.parts import make_objective, make_plan, make_references, make_schedule, make_times
from lowvar.train.piecewise import GivenTimes, LearnedBins, RunningMeans, continuous, piecewise_times
from lowvar.train.processes import measured_sigma_data
from lowvar.train.records import Change, Record, Sampled, Saved, TargetRecord, Update, Validation
from lowvar.train.sobol import SobolPoints
from lowvar.train.stable_target import ReferencePlan, StableInfo, StableTarget, memorisation, reference_noise
from lowvar.train.strata import proportional_order, strata_order
from lowvar.train.stratified import stratified_uniforms
from lowvar.train.targets import GivenTarget, PlainTarget, Target
from lowvar.train.taylor import taylor_variate
from lowvar.train.timesteps import FixedTimes, LossSecondMomentTimes, TimeDraw, Times, UniformTimes, floored
from lowvar.train.uncertainty import Uncertainty, weighting_curves
from lowvar.train.validation import ValidationLoss, ValidationSet

__all__ = [
    "EDM",
    "P2",
    "PRESETS",
    "Change",
    "CrossPairs",
    "DrawPlan",
    "Draws",
    "EntropyRateTimes",
    "Fitted",
    "FixedTimes",
    "GivenTarget",
    "GivenTimes",
    "GradientNormTimes",
    "HybridVLB",
    "Immiscible",
    "IndependentSamples",
    "KnownPosterior",
    "LearnedBins",
    "LearnedScheduleTimes",
    "LikelihoodOnly",
    "LinearControl",
    "LinearLoss",
    "LogitNormalTimes",
    "LognormalTimes",
    "LossSecondMomentTimes",
    "Losses",
    "MinSNR",
    "ModeTimes",
    "NetworkConfig",
    "NoiseScale",
    "NonFiniteError",
    "Objective",
    "OptimalTransport",
    "OrthogonalNoise",
    "Pairing",
    "PlainTarget",
    "PosteriorNLL",
    "PowerAverages",
    "Record",
    "ReferencePlan",
    "RunningMeans",
    "SameImagePairs",
    "Sampled",
    "Saved",
    "ScoreMixture",
    "Simple",
    "SobolPoints",
    "StableInfo",
    "StableTarget",
    "Target",
    "TargetRecord",
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
    "cautions",
    "check_network",
    "clean_score_weight",
    "cluster_labels",
    "config_from",
    "continuous",
    "fit",
    "floored",
    "make_objective",
    "make_plan",
    "make_references",
    "make_schedule",
    "make_times",
    "measured_sigma_data",
    "memorisation",
    "nearest_noise",
    "optimal_transport",
    "own_network",
    "piecewise_times",
    "proportional_order",
    "reconstruct_average",
    "reference_noise",
    "strata_order",
    "stratified_uniforms",
    "taylor_variate",
    "weighting_curves",
]
