"""Exact targets (Gaussian, mixtures, linear-Gaussian chains) and the laws every object of the process must keep."""

from lowvar.testing.gaussian import GaussianDenoiser, GaussianTarget, anisotropic_gaussian, rotation
from lowvar.testing.mixture import (
    MixtureDenoiser,
    MixtureTarget,
    mixture2,
    mixture8,
    mixture64,
    random_mixture,
)

__all__ = [
    "GaussianDenoiser",
    "GaussianTarget",
    "MixtureDenoiser",
    "MixtureTarget",
    "anisotropic_gaussian",
    "mixture2",
    "mixture8",
    "mixture64",
    "random_mixture",
    "rotation",
]
