r"""Bounds of the optimal loss: how much is there still to learn?

The optimal loss of a law p at a noise level is mmse(p) = min_D E||D(x_t) - x_0||^2, unknown for data. Two bounds, both
in expectation over the images drawn:

    low     mmse of the training images' own law, the memorising posterior's loss *on the training images*. mmse is
            concave in p (a minimum of linear functions) and the empirical law averages to p: E mmse(p_N) <= mmse(p).
    high    the loss on *held-out* images of the linear denoiser fitted to the training images: any denoiser that has
            not seen them has at least the optimal loss.

A network's held-out loss L therefore lies above the optimum by at least 0 and at most L - low, and knows more than a
linear denoiser where L < high. With few images and little noise `low` is near 0 and says little. The memorising
posterior's loss on held-out images is neither bound: it is far above the optimum. On the training images a network can
fall below the population's optimum, by memorising.

`optimum_bounds` gives both in the units of a validation's error, the mean squared error k ||x_0 - x0_hat||^2 / d of the
prediction target over uniform times (k: see `objectives`), in total and by bin of the time, for a subset of the data:
both bounds hold for any number of images, with fewer they are looser. `low` is measured with a hundred draws a bin;
`high` is exact over noise and times. The linear denoiser's spectrum is that of n images and one more of the mean
variance, c + (mean c - c) / (n + 1): directions that no training image has would cost without limit at little noise.

A class-conditional network knows more: there `low` is the memorising posterior given the class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.calibrate import fit_twin
from lowvar.process.denoiser import Prediction
from lowvar.process.noise import Independent
from lowvar.process.schedule import Level, Schedule
from lowvar.process.twin import GaussianTwin
from lowvar.train.draws import ImageSource
from lowvar.train.linear_loss import LinearLoss
from lowvar.train.objectives import log_error_factor
from lowvar.train.stable_target import StableTarget
from lowvar.train.timesteps import UniformTimes

__all__ = ["OptimumBounds", "linear_high", "memorising_low", "optimum_bounds"]

_SEED = 0x6F70
_MOST = 4096  # training images
_WORK = 2**32  # products that the distances may cost: some seconds
_CHUNK = 256


def memorising_low(train: Tensor, image: Tensor, eps: Tensor, level: Level, labels: Tensor | None = None) -> Tensor:
    """||E[x_0 | x_t] - x_0||^2 / d, (n,) float64, under the law of the training images: its mean is `low`.

    Args:
        train: all training images, (N, *event_shape).
        image: which of them each draw starts from, (n,) int64.
        eps: noise, (n, *event_shape).
        level: (n,) levels with t > 0.
        labels: classes of the training images, (N,) int64, for the posterior given the class.

    Example:
        >>> from lowvar.process import CosineVP
        >>> train, far = torch.tensor([[-1.0], [1.0]]), CosineVP().at(torch.tensor([1.0]))
        >>> round(memorising_low(train, torch.tensor([0]), torch.zeros(1, 1), far).item(), 2)
        1.0
    """
    x0 = train[image].double()
    own = None if labels is None else labels[image]
    mean = StableTarget(train, "among", labels, own).clean(x0, eps.double(), level)
    return ((mean - x0) ** 2).flatten(1).mean(1)


def linear_high(twin: GaussianTwin, images: Tensor, level: Level) -> Tensor:
    """E||D_lin - x_0||^2 / d on images, exact over the noise, for a scalar level: its mean is `high`; float64.

    Args:
        twin: fitted to other images.
        images: held out, (n, *event_shape).
        level: one level.

    Example:
        >>> from lowvar.process import CosineVP, PixelBasis
        >>> twin = GaussianTwin(torch.zeros(1), PixelBasis((1,)), torch.ones(1))
        >>> round(linear_high(twin, torch.tensor([[-2.0], [2.0]]), CosineVP().at(1.0)).item(), 2)
        4.0
    """
    return LinearLoss(twin, "sample").over_noise(images, level).mean()


@dataclass(frozen=True)
class OptimumBounds:
    """Bounds of the least error that any network can have.

    Attributes:
        low, high: over all times.
        bins: (low, high) by bin of the time.
    """

    low: float
    high: float
    bins: tuple[tuple[float, float], ...]


def optimum_bounds(
    train: ImageSource,
    held_out: Iterable[Tensor],
    schedule: Schedule,
    times: UniformTimes,
    prediction: Prediction,
    *,
    sigma_data: float = 0.5,
    labels: Tensor | None = None,
    bins: int = 8,
    draws: int = 128,
) -> OptimumBounds:
    """Bounds from at most 4,096 training images, evenly spread over the split, fewer where they are large.

    Args:
        train: the training split.
        held_out: batches (b, *event_shape) of other images.
        schedule, times: of the error.
        prediction, sigma_data: of the error's target.
        labels: classes of the training split, (N,) int64, where the network knows the class.
        bins: of the times, of equal probability.
        draws: for `low`, in every bin.

    Example:
        >>> from lowvar.data import load
        >>> from lowvar.process import CosineVP
        >>> data = load("digits")
        >>> held_out = [data.calibration.images(torch.arange(64))]
        >>> found = optimum_bounds(data.train, held_out, CosineVP(), UniformTimes(), "v_prediction")
        >>> 0.05 < found.low < found.high < 0.5, len(found.bins)
        (True, 8)
    """
    n = min(len(train), _MOST)
    rows = torch.arange(n) * len(train) // n
    twin = fit_twin(train.images(part) for part in rows.split(_CHUNK))
    c = twin.spectrum.double()
    wider = GaussianTwin(twin.mean, twin.basis, c + (c.mean() - c) / (n + 1))
    linear, high, seen = LinearLoss(wider, prediction, sigma_data=sigma_data), torch.zeros(bins, dtype=torch.float64), 0
    for x0 in held_out:
        high += linear.given_image(x0, schedule, times, bins)[:, :, :3].sum((0, 2))
        seen += len(x0)
    high /= seen

    shape = twin.mean.shape
    count = min(n, max(64, _WORK // (bins * draws * shape.numel())))
    rows = torch.arange(count) * len(train) // count
    references = train.images(rows)
    classes = None if labels is None else labels[rows]
    noise, index = Independent(_SEED), torch.arange(bins * draws)
    jitter = noise.uniform(index, (), draw=1, dtype=torch.float64)
    u = (index // draws + (index % draws + jitter) / draws) / bins
    image = (noise.uniform(index, (), draw=2, dtype=torch.float64) * count).long()
    low = []
    for part in index.split(_CHUNK):
        level = schedule.at(times.at(u[part]).t)
        error = memorising_low(references, image[part], noise.normal(part, shape, draw=0), level, classes)
        low.append(error * log_error_factor(prediction, level.logsnr, sigma_data).exp())
    by_bin = torch.cat(low).reshape(bins, draws).mean(1)
    both = tuple((float(a), float(b)) for a, b in zip(by_bin, high, strict=True))
    return OptimumBounds(float(by_bin.mean()), float(high.mean()), both)
