r"""Kernel distance in features (KID).

    KID = E k(f, f') + E k(g, g') - 2 E k(f, g),     k(f, g) = (f . g / d + 1)^3,

for features f of samples and g of data, by the unbiased estimator (pairs i != i') over all samples at once; it can
come out slightly negative; its mean is 0 where the laws agree, at any n.
torchmetrics' `KernelInceptionDistance` averages the same estimator over random subsets of equal size; with one subset
of all samples it is the same number.

Source: M. Binkowski, D. Sutherland, M. Arbel, A. Gretton, "Demystifying MMD GANs", ICLR 2018, Section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module

from lowvar.metrics.pairwise import TwoSample

if TYPE_CHECKING:
    from torchmetrics.image.kid import KernelInceptionDistance

__all__ = ["cubic", "kernel_distance", "kernel_metric", "kernel_statistic"]


def cubic(f: Tensor, g: Tensor) -> Tensor:
    """(f . g / d + 1)^3 as a matrix (p, q) for f (p, d) and g (q, d)."""
    k = (f @ g.mT).div_(f.shape[1]).add_(1)
    return k * k * k


def kernel_statistic(g: Tensor, *, chunk: int = 1024) -> TwoSample:
    """The statistic against fixed features `g` (m, d): `.value(f)`, `.replicates(f)`."""
    return TwoSample.against(cubic, g, chunk=chunk)


def kernel_distance(f: Tensor, g: Tensor, *, chunk: int = 1024) -> float:
    """Unbiased kernel distance of two feature matrices.

    Args:
        f: features of the samples (n, d), n >= 2.
        g: features of the data (m, d), m >= 2.
        chunk: rows of the kernel matrix held at once; the result does not depend on it.

    Returns:
        A number whose mean is 0 where the laws agree.

    Raises:
        ValueError: for fewer than 2 rows, different widths or values that are not finite.

    Example:
        >>> import torch
        >>> kernel_distance(torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [0.0]]))  # 8 + 1 - 2
        7.0
    """
    if f.shape[1:] != g.shape[1:]:
        raise ValueError(f"the features have widths {tuple(f.shape[1:])} and {tuple(g.shape[1:])}; use one extractor")
    return kernel_statistic(g, chunk=chunk).value(f)


def kernel_metric(features: Module, *, subset_size: int = 1000, subsets: int = 100) -> KernelInceptionDistance:
    """torchmetrics' `KernelInceptionDistance` on our features, for training loops that gather across processes.

    Args:
        features: a module (n, C, H, W) -> (n, d), for example an `Extractor`.
        subset_size: samples a subset; at most the smaller set's size.
        subsets: number of random subsets.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():  # torchmetrics warns that it keeps all features
        ...     warnings.simplefilter("ignore")
        ...     metric = kernel_metric(Module(), subset_size=50)
        >>> metric.subset_size
        50
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    return KernelInceptionDistance(feature=features, subsets=subsets, subset_size=subset_size)
