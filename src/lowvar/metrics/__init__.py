"""Distances between samples and data, each with an interval.

A score compares samples X with held-out images Y. `Scorer` holds what belongs to Y once and gives, for any X, every
score with a 95% block-jackknife interval, the paired difference of two samplers, and the floor (data against data).
The functions below it (`energy_distance`, `frechet_distance`, `kernel_distance`, `sliced_wasserstein`, `mean_error`,
`spectrum_error`) work on plain tensors.
"""

from __future__ import annotations

from lowvar.metrics.energy import energy_distance
from lowvar.metrics.features import Extractor, digit_classifier, extractor_for, random_features
from lowvar.metrics.frechet import frechet_distance, frechet_metric
from lowvar.metrics.intervals import Interval, Replicates
from lowvar.metrics.kernel import kernel_distance, kernel_metric
from lowvar.metrics.moments import mean_error, spectrum_error
from lowvar.metrics.scores import METRICS, Scorer
from lowvar.metrics.wasserstein import sliced_wasserstein, sliced_wasserstein_squared

__all__ = [
    "METRICS",
    "Extractor",
    "Interval",
    "Replicates",
    "Scorer",
    "digit_classifier",
    "energy_distance",
    "extractor_for",
    "frechet_distance",
    "frechet_metric",
    "kernel_distance",
    "kernel_metric",
    "mean_error",
    "random_features",
    "sliced_wasserstein",
    "sliced_wasserstein_squared",
    "spectrum_error",
]
