"""Estimators of the mean and covariance of x_0 given x_t for a given denoiser and data; one paper a file."""

from lowvar.calibrate.analytic import analytic_variance
from lowvar.calibrate.calibration import Calibration
from lowvar.calibrate.claims import Claims
from lowvar.calibrate.conditional import ConditionalTable, calibrate_classes
from lowvar.calibrate.convert import Converted, ConvertReport, convert
from lowvar.calibrate.deficit import MarginalDeficit, marginal_deficit
from lowvar.calibrate.estimator import HeadEstimator
from lowvar.calibrate.estimators import ESTIMATORS, estimator_table
from lowvar.calibrate.fitting import FitConfig, HeadReport, fit_head
from lowvar.calibrate.grids import calibrated_grid, cost_curve, fewest_steps_for
from lowvar.calibrate.heads import HEADS, add_head, make_head
from lowvar.calibrate.jacobian import JacobianTrace
from lowvar.calibrate.lowrank import LowRank
from lowvar.calibrate.mean import MeanFit, fit_mean
from lowvar.calibrate.measurement import calibrate, default_logsnr
from lowvar.calibrate.mixture import fit_mixture
from lowvar.calibrate.npr import NPR
from lowvar.calibrate.ocm import OCM
from lowvar.calibrate.path import path_moments, remainder_share
from lowvar.calibrate.residual import residual_moments, standardised_residuals
from lowvar.calibrate.shrinkage import shrink
from lowvar.calibrate.sn import SN
from lowvar.calibrate.table import CovarianceTable
from lowvar.calibrate.twin import fit_twin

__all__ = [
    "ESTIMATORS",
    "HEADS",
    "NPR",
    "OCM",
    "SN",
    "Calibration",
    "Claims",
    "ConditionalTable",
    "ConvertReport",
    "Converted",
    "CovarianceTable",
    "FitConfig",
    "HeadEstimator",
    "HeadReport",
    "JacobianTrace",
    "LowRank",
    "MarginalDeficit",
    "MeanFit",
    "add_head",
    "analytic_variance",
    "calibrate",
    "calibrate_classes",
    "calibrated_grid",
    "convert",
    "cost_curve",
    "default_logsnr",
    "estimator_table",
    "fewest_steps_for",
    "fit_head",
    "fit_mean",
    "fit_mixture",
    "fit_twin",
    "make_head",
    "marginal_deficit",
    "path_moments",
    "remainder_share",
    "residual_moments",
    "shrink",
    "standardised_residuals",
]
