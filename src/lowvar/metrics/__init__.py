"""Distances between samples and data, each with an interval, and statistics of single samples.

A score compares samples X with held-out images Y. `Scorer` holds what belongs to Y once and gives, for any X, every
score with a 95% block-jackknife interval, the paired difference of two samplers, and the floor (data against data).
The functions below it (`energy_distance`, `frechet_distance`, `kernel_distance`, `sliced_wasserstein`, `mean_error`,
`spectrum_error`) work on plain tensors.

A `Statistic` is a function of single samples whose mean is wanted, or a reward; `statistic_named` knows them by name.
"""

from __future__ import annotations

from lowvar.metrics.energy import energy_distance
from lowvar.metrics.features import Extractor, digit_classifier, extractor_for, random_features
from lowvar.metrics.frechet import frechet_distance, frechet_metric
from lowvar.metrics.intervals import Interval, Replicates
from lowvar.metrics.kernel import kernel_distance, kernel_metric
from lowvar.metrics.moments import mean_error, spectrum_error
from lowvar.metrics.named import STATISTICS, needs_data, statistic_named
from lowvar.metrics.scores import METRICS, Scorer
from lowvar.metrics.statistic import Statistic
from lowvar.metrics.wasserstein import sliced_wasserstein, sliced_wasserstein_squared

__all__ = [
    "METRICS",
    "STATISTICS",
    "Extractor",
    "Interval",
    "Replicates",
    "Scorer",
    "Statistic",
    "digit_classifier",
    "energy_distance",
    "extractor_for",
    "frechet_distance",
    "frechet_metric",
    "kernel_distance",
    "kernel_metric",
    "mean_error",
    "needs_data",
    "random_features",
    "sliced_wasserstein",
    "sliced_wasserstein_squared",
    "spectrum_error",
    "statistic_named",
]
