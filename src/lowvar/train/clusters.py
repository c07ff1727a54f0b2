r"""Clusters of the data by k-means, as strata where there are no classes (see `strata`).

K centres m_1 .. m_K and labels c_i that make

    W = (1 / N) sum_i ||x^i - m_{c_i}||^2

small. A batch that holds every cluster in proportion has, for any linear function of the images, the variance within
the clusters only: that of its mean image falls from V / B to about W / B, with V = (1 / N) sum_i ||x^i - mean||^2. For
gradients, which are no linear functions of images, W / V is no promise. Whatever the clusters are, every image keeps
its chance: unbiased.

The labels are a function of the images and the seed, so nothing of them is saved. Of more than `LIMIT` images the
centres are fitted to every (N / LIMIT)-th, and all belong to their nearest centre.

Source: Lloyd 1982, with seeds as of Arthur & Vassilvitskii 2007 (scikit-learn's `KMeans`).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from lowvar.train.draws import ImageSource

__all__ = ["CLUSTERS", "LIMIT", "cluster_labels"]

CLUSTERS = 16
LIMIT = 20_000
_BLOCK = 1024


def cluster_labels(images: ImageSource, count: int = CLUSTERS, seed: int = 0) -> Tensor:
    """The clusters of a data split, (N,) int64 in 0, .., count - 1; fewer where there are fewer different images.

    Args:
        images: the split.
        count: K; at most N are made.
        seed: of the first centres.

    Raises:
        ValueError: if `count` is below 1.

    Example:
        >>> from lowvar.data import TensorImages
        >>> rows = torch.tensor([[-0.9], [-0.8], [0.9], [0.8], [0.85]])
        >>> labels = cluster_labels(TensorImages(rows), 2)
        >>> [bool(labels[i] == labels[0]) for i in range(5)]
        [True, True, False, False, False]
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if count < 1:
        raise ValueError(f"count is {count}; give at least 1 cluster")
    size = len(images)
    some = torch.arange(0, size, -(-size // LIMIT))
    model = KMeans(min(count, len(some)), n_init="auto", max_iter=100, random_state=seed)  # one start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different images than clusters
        model.fit(_rows(images, some))
    blocks = torch.arange(size).split(_BLOCK)
    return torch.from_numpy(np.concatenate([model.predict(_rows(images, part)) for part in blocks])).long()


def _rows(images: ImageSource, numbers: Tensor) -> np.ndarray:
    return torch.cat([images.images(part).flatten(1) for part in numbers.split(_BLOCK)]).double().numpy()
