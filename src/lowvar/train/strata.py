r"""Order of the images in proportion: every batch holds the classes, or clusters, as the whole set does.

Systematic sampling within an epoch. The n_c images of class c, in random order k = 0, .., n_c - 1, get the keys

    (k + v_c) / n_c,    v_c ~ U(0, 1) once a class,

equally spaced on the circle [0, 1); the images are sorted by key, and the epoch begins at place s, uniform on
0, .., N - 1, of that circle. Every image comes once an epoch. By the turn s each place of the epoch holds each image
with probability 1 / N, so the expected gradient of every update is the plain one (label: unbiased); and B consecutive
images, an arc of the circle of length l = about B / N, hold floor(n_c l) or ceil(n_c l) of class c: with classes of one
size their counts differ by at most 1.

Source: Cochran 1977, Sec. 8 (systematic sampling from a circle).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource

__all__ = ["proportional_order", "strata_order"]


def proportional_order(labels: Tensor, u: Tensor, v: Tensor, start: int) -> Tensor:
    """The order (N,) int64 for given random numbers.

    Args:
        labels: classes or clusters, any integers, (N,).
        u: numbers whose order is that within the classes, (N,).
        v: offsets in [0, 1), one a class in increasing order of the labels, (C,).
        start: s.

    Raises:
        ValueError: if the lengths do not fit.

    Example:
        >>> labels = torch.tensor([7, 7, 7, 7, 2, 2])
        >>> order = proportional_order(labels, torch.arange(6.0), torch.tensor([0.5, 0.2]), 0)
        >>> labels[order].tolist()
        [7, 2, 7, 7, 2, 7]
    """
    _, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    if len(u) != len(labels) or len(v) != len(sizes):
        raise ValueError(f"{len(u)} numbers u and {len(v)} offsets v for {len(labels)} images of {len(sizes)} classes")
    by_u = u.argsort(stable=True)
    grouped = by_u[which[by_u].argsort(stable=True)]  # class after class, within each by u
    first = sizes.cumsum(0) - sizes
    classes = which[grouped]
    place = torch.arange(len(labels)) - first[classes]
    key = (place + v.double()[classes]) / sizes[classes]
    return grouped[key.argsort(stable=True)].roll(-start)


def strata_order(source: NoiseSource, labels: Tensor, draw: int) -> Tensor:
    """The order of an epoch, (N,) int64, from the uniform numbers 0, .., N + C of draw `draw`.

    Example:
        >>> from lowvar.process import Independent
        >>> labels = torch.tensor([0, 1]).repeat(4)
        >>> labels[strata_order(Independent(0), labels, draw=2)].reshape(4, 2).sum(1).tolist()
        [1, 1, 1, 1]
    """
    n, classes = len(labels), len(labels.unique())
    u = source.uniform(range(n + classes + 1), (), draw=draw, dtype=torch.float64)
    return proportional_order(labels, u[:n], u[n:-1], int(u[-1] * n) % n)
