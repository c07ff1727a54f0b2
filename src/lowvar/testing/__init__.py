"""Exact targets (Gaussian, mixtures, linear-Gaussian chains) and the laws every object of the process must keep."""

from lowvar.testing.affine import AffineDenoiser, HermiteNoise, exact_affine, linear_policy
from lowvar.testing.certificates import Certificate, certify, exact_gradient, exact_moments
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
from lowvar.testing.nodes import QuadratureRule
from lowvar.testing.observed import observed
from lowvar.testing.polynomial import Polynomial
from lowvar.testing.problems import PROBLEMS, Problem
from lowvar.testing.tuning import ExactEstimate, LinearPolicy

__all__ = [
    "PROBLEMS",
    "AffineDenoiser",
    "Certificate",
    "CovarianceLaws",
    "ExactEstimate",
    "GaussianDenoiser",
    "GaussianTarget",
    "HermiteNoise",
    "KernelLaws",
    "LinearPolicy",
    "MixtureDenoiser",
    "MixtureTarget",
    "Moments",
    "NoiseLaws",
    "Polynomial",
    "Problem",
    "QuadratureRule",
    "ScheduleLaws",
    "affine_law",
    "anisotropic_gaussian",
    "certify",
    "exact_affine",
    "exact_gradient",
    "exact_moments",
    "kernel_chain",
    "linear_policy",
    "mixture2",
    "mixture8",
    "mixture64",
    "observed",
    "random_mixture",
    "rotation",
]
