"""Exact targets (Gaussian, mixtures, linear-Gaussian chains) and the laws every object of the process must keep."""

from lowvar.testing.certificates import Certificate, QuadratureRule, certify, exact_gradient, exact_moments
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
from lowvar.testing.observed import observed
from lowvar.testing.problems import PROBLEMS, Problem

__all__ = [
    "PROBLEMS",
    "Certificate",
    "CovarianceLaws",
    "GaussianDenoiser",
    "GaussianTarget",
    "KernelLaws",
    "MixtureDenoiser",
    "MixtureTarget",
    "Moments",
    "NoiseLaws",
    "Problem",
    "QuadratureRule",
    "ScheduleLaws",
    "affine_law",
    "anisotropic_gaussian",
    "certify",
    "exact_gradient",
    "exact_moments",
    "kernel_chain",
    "mixture2",
    "mixture8",
    "mixture64",
    "observed",
    "random_mixture",
    "rotation",
]
