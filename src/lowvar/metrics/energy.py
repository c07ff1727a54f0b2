r"""Energy distance.

    E(X, Y) = 2 E|X - Y| - E|X - X'| - E|Y - Y'|  >= 0,   0 exactly if X and Y have the same law,

|.| the Euclidean norm of the flattened array, no square root over the whole. Estimated without bias by the U-statistic
(pairs i != i'), which can come out slightly negative. It is sensitive to location first and to shape little: a Gaussian
with the data's moments is close to the digits in it, so it stands beside the distances in features.

Source: G. Szekely, M. Rizzo, "Energy statistics: a class of statistics based on distances", JSPI 143, 2013, Eq. 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.metrics.pairwise import TwoSample, flat

__all__ = ["energy_distance", "energy_statistic", "minus_distance"]


def minus_distance(x: Tensor, y: Tensor) -> Tensor:
    """-|x_i - y_l| as a matrix (p, q) for x (p, d) and y (q, d), from |x|^2 + |y|^2 - 2 x.y."""
    square = torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1)[None, :], x, y.mT, alpha=-2)
    return square.clamp_min_(0).sqrt_().neg_()


def energy_statistic(y: Tensor, *, chunk: int = 1024) -> TwoSample:
    """The statistic against a fixed set `y` (m, ...), for many sets of samples: `.value(x)`, `.replicates(x)`."""
    return TwoSample.against(minus_distance, y, chunk=chunk)


def energy_distance(x: Tensor, y: Tensor, *, chunk: int = 1024) -> float:
    """Energy distance of two sets of samples, U-statistic, in the samples' unit.

    Args:
        x: samples (n, ...), n >= 2.
        y: samples (m, ...), m >= 2, of the same shape but for m.
        chunk: rows of the distance matrix held at once; the result does not depend on it.

    Returns:
        A number that is at least about -1/n.

    Raises:
        ValueError: for fewer than 2 samples, different shapes or values that are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> energy_distance(x, x + 3)  # 2 * 3.0 - 2 - 2, the mean of |x - y| being (3 + 5 + 1 + 3) / 4
        2.0
    """
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"the samples have shapes {tuple(x.shape[1:])} and {tuple(y.shape[1:])}; give equal shapes")
    centre = flat(y).mean(0)  # distances do not move, cancellation is smaller
    return energy_statistic(flat(y) - centre, chunk=chunk).value(flat(x) - centre)
