"""All scores of a sampler against one data set.

`Scorer(data)` computes once what depends on the held-out images alone: their features, moments, sorted projections and
pairwise sums. For samples it gives a row {metric, value, low, high} a score, the paired difference of two samplers
given the same noise, and the floor: the train split scored as if it were samples.

    frechet             squared Frechet distance in features (acceptance metric)
    kernel              unbiased kernel distance in features (acceptance metric)
    energy              energy distance of the images in [-1, 1]
    sliced_wasserstein  sliced 2-Wasserstein distance of the images (128 projections, not squared)
    mean                |mean - data's mean| over the data's total standard deviation
    spectrum            variance error along the data's principal directions over the total variance

All are smaller for better samples. Samples are clipped to [-1, 1] first (the final clip). Frechet, Wasserstein and
moment errors are biased upwards at finite n: compare rows, and the floor, at equal n. Intervals are conditional on the
held-out images (see `intervals`). A classifier has seen the train split, so in its features the floor stands for a
sampler that repeats the training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.metrics.energy import energy_statistic
from lowvar.metrics.features import DataSet, Extractor, extractor_for
from lowvar.metrics.frechet import FrechetStatistic
from lowvar.metrics.intervals import Interval, Replicates
from lowvar.metrics.kernel import kernel_statistic
from lowvar.metrics.moments import MomentStatistic
from lowvar.metrics.wasserstein import SlicedStatistic

__all__ = ["METRICS", "Scorer"]

METRICS: tuple[str, ...] = ("frechet", "kernel", "energy", "sliced_wasserstein", "mean", "spectrum")
_MAX_REFERENCE = 10_000


class Scorer:
    """Scores samples against the held-out split of a data set.

    Args:
        data: the data set; all of `data.test` is the reference (the first 10,000 images of a larger one).
        metrics: which scores, from `METRICS`.
        extractor: features for `frechet` and `kernel`; None: `extractor_for(data)`.
        blocks: of the jackknife, at least 16.
        seed: of the extractor and the projections.
        cache: folder for a classifier's weights.

    Raises:
        ValueError: for an unknown metric or fewer than 16 blocks.

    Example:
        >>> from lowvar.data import load
        >>> data = load("digits")
        >>> scorer = Scorer(data, metrics=("energy", "mean"))
        >>> row = scorer.rows(data.train.images(range(200)), sampler="training images")[0]
        >>> row["sampler"], row["metric"], row["low"] < row["value"] < row["high"]
        ('training images', 'energy', True)
    """

    def __init__(
        self,
        data: DataSet,
        *,
        metrics: Sequence[str] = METRICS,
        extractor: Extractor | None = None,
        blocks: int = 32,
        seed: int = 0,
        cache: Path | None = None,
    ) -> None:
        """Computes what depends on the reference alone."""
        _check(metrics, METRICS)
        if blocks < 16:
            raise ValueError(f"blocks is {blocks}; an interval needs at least 16")
        self.metrics, self.blocks, self._train, self._shape = tuple(metrics), blocks, data.train, data.shape
        self._bound = 1.0 if getattr(data, "scaling_factor", None) is None else None
        y = data.test.images(torch.arange(min(len(data.test), _MAX_REFERENCE)))
        self.reference_size = len(y)
        self._centre = y.to(torch.float64).mean(0)
        self.extractor = extractor
        if {"frechet", "kernel"} & set(metrics):
            self.extractor = extractor_for(data, seed=seed, cache=cache) if extractor is None else extractor
            g = self.extractor.features(y)
            self._frechet = FrechetStatistic.against(g) if "frechet" in metrics else None
            self._kernel = kernel_statistic(g) if "kernel" in metrics else None
        self._energy = energy_statistic(y - self._centre) if "energy" in metrics else None
        self._sliced = SlicedStatistic.against(y, seed=seed) if "sliced_wasserstein" in metrics else None
        self._moments = MomentStatistic.against(y) if {"mean", "spectrum"} & set(metrics) else None

    @property
    def description(self) -> dict[str, Any]:
        """What stands beside every score: extractor, its width, hash and accuracy, reference size, blocks."""
        e = self.extractor
        return {
            "extractor": None if e is None else e.name,
            "features": None if e is None else e.num_features,
            "extractor_hash": None if e is None else e.hash,
            "extractor_accuracy": None if e is None else e.accuracy,
            "reference": self.reference_size,
            "blocks": self.blocks,
        }

    def replicates(self, samples: Tensor, metrics: Sequence[str] | None = None) -> dict[str, Replicates]:
        """Every score with its leave-one-block-out replicates; keep these to compare samplers later with `minus`.

        Args:
            samples: (n, C, H, W), n >= 2 blocks; clipped to [-1, 1], latents as they are.
            metrics: which scores; None: all of this scorer's.

        Raises:
            ValueError: for samples of another shape, too few of them, or values that are not finite.
        """
        wanted = self.metrics if metrics is None else tuple(metrics)
        _check(wanted, self.metrics)
        if samples.shape[1:] != self._shape:
            raise ValueError(f"the samples have shape {tuple(samples.shape)}; the data is (n, {self._shape})")
        bad = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
        if bad:
            raise ValueError(f"{bad} of {len(samples)} samples are not finite (NaN or infinite); the sampler diverged")
        x = samples.detach().to("cpu", torch.float32)
        x = x if self._bound is None else x.clamp(-self._bound, self._bound)
        f = self.extractor.features(x) if self.extractor and {"frechet", "kernel"} & set(wanted) else x
        b, found = self.blocks, {}
        if self._moments and {"mean", "spectrum"} & set(wanted):
            found["mean"], found["spectrum"] = self._moments.replicates(x, b)
        for name in wanted:
            if name == "frechet" and self._frechet:
                found[name] = self._frechet.replicates(f, b)
            elif name == "kernel" and self._kernel:
                found[name] = self._kernel.replicates(f, b)
            elif name == "energy" and self._energy:
                found[name] = self._energy.replicates(x - self._centre, b)
            elif name == "sliced_wasserstein" and self._sliced:
                found[name] = self._sliced.replicates(x, b)
        return {name: found[name] for name in wanted}

    def score(self, samples: Tensor, metrics: Sequence[str] | None = None) -> dict[str, Interval]:
        """Every score with its 95% interval; arguments and errors as in `replicates`."""
        return {name: r.interval() for name, r in self.replicates(samples, metrics).items()}

    def rows(self, samples: Tensor, **columns: Any) -> list[dict[str, Any]]:
        """One record a score, {**columns, metric, value, low, high}, as `summary.json` holds them."""
        return [
            {**columns, "metric": name, "value": i.value, "low": i.low, "high": i.high}
            for name, i in self.score(samples).items()
        ]

    def paired(self, samples_a: Tensor, samples_b: Tensor, metric: str) -> Interval:
        """The score of a minus the score of b, both drawn with the same noise sample by sample; below 0: a is better.

        Raises:
            ValueError: for different numbers of samples, and as in `replicates`.
        """
        a, b = (self.replicates(samples, (metric,))[metric] for samples in (samples_a, samples_b))
        return a.minus(b).interval()

    def floor(self, n: int | None = None) -> dict[str, Interval]:
        """Data against data: the first n images of the train split (2,048 or all if None) scored as samples.

        The first images of digits, photos and shuffled sets are a random part; give the samplers' n, since biases
        depend on it.

        Raises:
            ValueError: if n is below 2 blocks.
        """
        n = min(len(self._train), 2048 if n is None else n)
        return self.score(self._train.images(torch.arange(n)))


def _check(metrics: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = [name for name in metrics if name not in allowed]
    if unknown or not metrics:
        raise ValueError(f"metrics is {list(metrics)}; give names from {', '.join(allowed)}")
