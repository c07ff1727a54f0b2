r"""Frechet distance of feature moments (FID's formula on our own features).

    F = |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_y^{1/2} S_x S_y^{1/2})^{1/2}),

the squared 2-Wasserstein distance of the Gaussians N(mu_x, S_x) and N(mu_y, S_y), with covariances S that divide by
n - 1. The symmetric form has real eigenvalues, computed in float64. torchmetrics takes those of S_x S_y, which are the
same numbers.

The plug-in estimate is biased upwards, by about O(d^2 / n) over the smaller set; so features here have at most 64
dimensions (300 held-out digits still give a covariance of full rank), rows are compared at equal n, and the jackknife's
bias estimate is kept beside the value. Leave-one-block-out moments come from block sums of f and f f^T.

Source: M. Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017, Eq. 6; D. Dowson, B. Landau,
"The Frechet distance between multivariate normal distributions", J. Multivariate Analysis 12, 1982, Eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from lowvar.metrics.intervals import Replicates, block_bounds
from lowvar.metrics.pairwise import flat

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

__all__ = ["FrechetStatistic", "frechet_distance", "frechet_from_moments", "frechet_metric"]


def _sqrt(s: Tensor) -> Tensor:
    """Symmetric square root (d, d) of a positive semi-definite matrix; eigenvalues below 0 by rounding become 0."""
    values, vectors = torch.linalg.eigh(s)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def frechet_from_moments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of Gaussians; batched over leading dimensions of x's moments.

    Args:
        mean_x: (..., d).
        cov_x: (..., d, d), symmetric positive semi-definite.
        mean_y: (d,).
        cov_y: (d, d).

    Returns:
        float64 (...).

    Example:
        >>> one = torch.ones(2, dtype=torch.float64)
        >>> frechet_from_moments(one, 4 * torch.diag(one), 0 * one, torch.diag(one)).item()  # 2 + 2 (2 - 1)^2
        4.0
    """
    mean_x, cov_x, mean_y, cov_y = (m.to(torch.float64) for m in (mean_x, cov_x, mean_y, cov_y))
    root = _sqrt(cov_y)
    product = root @ cov_x @ root
    cross = torch.linalg.eigvalsh((product + product.mT) / 2).clamp_min(0).sqrt().sum(-1)
    traces = cov_x.diagonal(dim1=-2, dim2=-1).sum(-1) + cov_y.trace()
    return (mean_x - mean_y).square().sum(-1) + traces - 2 * cross


@dataclass(frozen=True)
class FrechetStatistic:
    """The distance to fixed moments of the data's features, for many sets of samples.

    Args:
        mean: (d,), float64.
        cov: (d, d), float64.
    """

    mean: Tensor
    cov: Tensor

    @classmethod
    def against(cls, g: Tensor) -> FrechetStatistic:
        """Holds the moments of the data's features `g` (m, d), m >= 2."""
        g = flat(g)
        return cls(g.mean(0), torch.atleast_2d(torch.cov(g.mT)))

    def value(self, f: Tensor) -> float:
        """The distance of the samples' features `f` (n, d), n >= 2."""
        f = flat(f)
        return frechet_from_moments(f.mean(0), torch.atleast_2d(torch.cov(f.mT)), self.mean, self.cov).item()

    def replicates(self, f: Tensor, blocks: int = 32) -> Replicates:
        """The distance and its leave-one-block-out replicates from block moments."""
        f = flat(f) - self.mean  # shifted, so that the sums of squares do not cancel
        sizes = block_bounds(len(f), blocks).diff()
        parts = f.split(sizes.tolist())
        s = torch.stack([part.sum(0) for part in parts])
        q = torch.stack([part.mT @ part for part in parts])
        n = torch.cat([torch.tensor([len(f)]), len(f) - sizes]).to(torch.float64)[:, None]
        s = torch.cat([s.sum(0, keepdim=True), s.sum(0) - s])
        q = torch.cat([q.sum(0, keepdim=True), q.sum(0) - q])
        mean = s / n
        cov = (q - n[..., None] * mean[:, :, None] * mean[:, None, :]) / (n[..., None] - 1)
        values = frechet_from_moments(mean, cov, torch.zeros_like(self.mean), self.cov)
        return Replicates(values[0].item(), values[1:], sizes)


def frechet_distance(f: Tensor, g: Tensor) -> float:
    """Frechet distance of two feature matrices, in float64.

    Args:
        f: features of the samples (n, d), n >= 2.
        g: features of the data (m, d), m >= 2.

    Returns:
        A number >= 0 up to rounding; its bias is upwards.

    Raises:
        ValueError: for fewer than 2 rows, different widths or values that are not finite.

    Example:
        >>> f = torch.tensor([[0.0], [2.0]])
        >>> round(frechet_distance(f, f + 3), 9)
        9.0
    """
    if f.shape[1:] != g.shape[1:]:
        raise ValueError(f"the features have widths {tuple(f.shape[1:])} and {tuple(g.shape[1:])}; use one extractor")
    return FrechetStatistic.against(g).value(f)


def frechet_metric(features: Module) -> FrechetInceptionDistance:
    """torchmetrics' `FrechetInceptionDistance` on our features, for training loops that gather across processes.

    Args:
        features: a module (n, C, H, W) -> (n, d) with an attribute `num_features`, for example an `Extractor`.

    Returns:
        A metric that takes float images; its sums are float64.

    Example:
        >>> class Flat(Module):
        ...     num_features = 4
        ...     def forward(self, x):
        ...         return x.flatten(1)
        >>> metric = frechet_metric(Flat())
        >>> x = torch.linspace(-1, 1, 80).sin().reshape(20, 1, 2, 2)
        >>> metric.update(x, real=True)
        >>> metric.update(x + 1, real=False)
        >>> round(metric.compute().item(), 3)
        4.0
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature=features, normalize=True)
