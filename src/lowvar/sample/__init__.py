"""Running the reverse process: trajectories, samples, likelihood."""

from lowvar.sample.likelihood import VLB, vlb
from lowvar.sample.named import SAMPLERS, NamedSampler, named_sampler
from lowvar.sample.trajectory import generate, initial_state, trajectory

__all__ = ["SAMPLERS", "VLB", "NamedSampler", "generate", "initial_state", "named_sampler", "trajectory", "vlb"]
