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
"""

from __future__ import annotations

from torch import Tensor

from lowvar.process.schedule import Level
from lowvar.process.twin import GaussianTwin
from lowvar.train.linear_loss import LinearLoss
from lowvar.train.stable_target import StableTarget

__all__ = ["linear_high", "memorising_low"]


def memorising_low(train: Tensor, image: Tensor, eps: Tensor, level: Level) -> Tensor:
    """||E[x_0 | x_t] - x_0||^2 / d, (n,) float64, under the law of the training images: its mean is `low`.

    Args:
        train: all training images, (N, *event_shape).
        image: which of them each draw starts from, (n,) int64.
        eps: noise, (n, *event_shape).
        level: (n,) levels with t > 0.

    Example:
        >>> import torch
        >>> from lowvar.process import CosineVP
        >>> train, far = torch.tensor([[-1.0], [1.0]]), CosineVP().at(torch.tensor([1.0]))
        >>> round(memorising_low(train, torch.tensor([0]), torch.zeros(1, 1), far).item(), 2)
        1.0
    """
    x0 = train[image].double()
    mean = StableTarget(train, "among").clean(x0, eps.double(), level)
    return ((mean - x0) ** 2).flatten(1).mean(1)


def linear_high(twin: GaussianTwin, images: Tensor, level: Level) -> Tensor:
    """E||D_lin - x_0||^2 / d on images, exact over the noise, for a scalar level: its mean is `high`; float64.

    Args:
        twin: fitted to other images.
        images: held out, (n, *event_shape).
        level: one level.

    Example:
        >>> import torch
        >>> from lowvar.process import CosineVP, PixelBasis
        >>> twin = GaussianTwin(torch.zeros(1), PixelBasis((1,)), torch.ones(1))
        >>> round(linear_high(twin, torch.tensor([[-2.0], [2.0]]), CosineVP().at(1.0)).item(), 2)
        4.0
    """
    return LinearLoss(twin, "sample").over_noise(images, level).mean()
