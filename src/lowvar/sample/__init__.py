"""Running the reverse process: trajectories, samples, likelihood."""

from lowvar.sample.adaptive import Adaptive, StepControl, adaptive_generate
from lowvar.sample.likelihood import VLB, vlb
from lowvar.sample.named import COVARIANCES, SAMPLERS, NamedSampler, named_sampler
from lowvar.sample.trajectory import generate, trajectory

__all__ = [
    "COVARIANCES",
    "SAMPLERS",
    "VLB",
    "Adaptive",
    "NamedSampler",
    "StepControl",
    "adaptive_generate",
    "generate",
    "named_sampler",
    "trajectory",
    "vlb",
]
