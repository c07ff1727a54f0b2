"""Exact targets (Gaussian, mixtures, linear-Gaussian chains) and the laws every object of the process must keep."""

from lowvar.testing.chain import Moments, affine_law, kernel_chain
from lowvar.testing.gaussian import GaussianDenoiser, GaussianTarget, anisotropic_gaussian, rotation
from lowvar.testing.laws import CovarianceLaws, KernelLaws, NoiseLaws, ScheduleLaws
from lowvar.testing.mixture import (
    MixtureDenoiser,
    MixtureTarget,
    mixture2,
    mixture8,
    mixture64,
    random_mixture,
)

__all__ = [
    "CovarianceLaws",
    "GaussianDenoiser",
    "GaussianTarget",
    "KernelLaws",
    "MixtureDenoiser",
    "MixtureTarget",
    "Moments",
    "NoiseLaws",
    "ScheduleLaws",
    "affine_law",
    "anisotropic_gaussian",
    "kernel_chain",
    "mixture2",
    "mixture8",
    "mixture64",
    "random_mixture",
    "rotation",
]
