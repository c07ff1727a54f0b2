r"""Class statistics: what a classifier trained on the spot says of a sample.

    class:K      p(K | x), the softmax of `trained_classifier`: smooth, so that its gradient is a reward's
    fraction:K   1 if K has the largest score, else 0: its mean is the share of samples of class K

The classifier is trained with labels smoothed by .1: of ten classes a sure one has .91, an excluded one .01. So the
mean of class:K is not the share of class K; that of fraction:K is, up to the classifier's errors (1.5% on digits).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.metrics.features import DataSet, trained_classifier
from lowvar.metrics.statistic import Statistic

__all__ = ["class_statistic"]


def class_statistic(word: str, data: DataSet, *, seed: int = 0, cache: Path | None = None) -> Statistic:
    """The statistic `class:K` or `fraction:K` of a labelled data set.

    Args:
        word: kind and class, a number or, where the data names its classes, a name.
        data: its train split trains the classifier (a few seconds).
        seed: of the classifier.
        cache: folder for its weights; None: not kept.

    Raises:
        UserError: if the data has no labels or no such class, or is no set of images.

    Example:
        >>> from lowvar.data import load
        >>> digits = load("digits")
        >>> three = class_statistic("fraction:3", digits)
        >>> share = three(digits.test.images(torch.arange(300))).mean().item()
        >>> abs(share - 25 / 300) < 0.02, three.indicator
        (True, True)
    """
    kind, _, which = word.partition(":")
    labels = data.train.labels
    if labels is None or len(data.shape) != 3:
        raise UserError(f"statistic {word!r} needs images with labels, and the data has none; give labelled images")
    known = tuple(getattr(data, "classes", ())) or tuple(str(k) for k in range(int(labels.max()) + 1))
    if which not in known:
        raise UserError(
            f"statistic {word!r} names no class of the data; allowed: {kind}:K with K in {', '.join(known)}"
        )
    k, shape = known.index(which), tuple(data.shape)
    net = copy.deepcopy(trained_classifier(data, seed=seed, cache=cache))  # it moves to the samples' device

    def scores(samples: Tensor) -> Tensor:
        if tuple(samples.shape[1:]) != shape:
            raise UserError(
                f"statistic {word!r} judges images {shape}, and the samples have shape {tuple(samples.shape)}; give "
                "labelled data of the samples' shape"
            )
        net.to(samples.device)
        return net(samples.float())

    def probability(samples: Tensor, **columns: Any) -> Tensor:
        return scores(samples).softmax(1)[:, k]

    def hit(samples: Tensor, **columns: Any) -> Tensor:
        return (scores(samples).argmax(1) == k).to(torch.float32)

    if kind == "class":
        return Statistic(word, probability, f"probability of class {which}", True, True, False)
    return Statistic(word, hit, f"share of samples of class {which}", False, False, True)
