"""Estimators of the mean and covariance of x_0 given x_t for a given denoiser and data; one paper a file."""

from lowvar.calibrate.analytic import analytic_variance
from lowvar.calibrate.calibration import Calibration, calibrate, default_logsnr
from lowvar.calibrate.deficit import MarginalDeficit, marginal_deficit
from lowvar.calibrate.grids import calibrated_grid, cost_curve, fewest_steps_for
from lowvar.calibrate.mixture import fit_mixture
from lowvar.calibrate.path import path_moments
from lowvar.calibrate.residual import residual_moments, standardised_residuals
from lowvar.calibrate.shrinkage import shrink
from lowvar.calibrate.table import CovarianceTable
from lowvar.calibrate.twin import fit_twin

__all__ = [
    "Calibration",
    "CovarianceTable",
    "MarginalDeficit",
    "analytic_variance",
    "calibrate",
    "calibrated_grid",
    "cost_curve",
    "default_logsnr",
    "fewest_steps_for",
    "fit_mixture",
    "fit_twin",
    "marginal_deficit",
    "path_moments",
    "residual_moments",
    "standardised_residuals",
]
