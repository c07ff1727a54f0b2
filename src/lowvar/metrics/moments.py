r"""Errors of the first two moments.

With mu, S the samples' moments, mu_0, S_0 = sum_i lambda_i v_i v_i^T the data's, and T = tr S_0,

    mean error     = |mu - mu_0| / T^{1/2},
    spectrum error = sum_i |v_i^T S v_i - lambda_i| / T.

Both are dimensionless. The spectrum is read in the data's own eigenbasis, so a sampler that puts the right variance
in the wrong directions is found out, and the replicates need only block sums of v_i . x and (v_i . x)^2: no further
eigenvalue problem. Both are sums of absolute values and therefore biased upwards at finite n.

Images of more than 1,024 numbers are averaged over 2 x 2 pixels until they fit (the eigenvalue problem grows as d^3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.metrics.intervals import Replicates, block_bounds
from lowvar.metrics.pairwise import flat

__all__ = ["MomentStatistic", "mean_error", "spectrum_error"]

_LARGEST = 1024


def _pooled(x: Tensor) -> Tensor:
    while x.ndim == 4 and x[0].numel() > _LARGEST and min(x.shape[2:]) > 1:
        x = torch.nn.functional.avg_pool2d(x.to(torch.float32), 2)
    return flat(x)


@dataclass(frozen=True)
class MomentStatistic:
    """The two errors against fixed moments.

    Args:
        mean: (d,), float64.
        values: eigenvalues lambda (d,) of the data's covariance.
        vectors: eigenvectors (d, d), in columns.
    """

    mean: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def against(cls, y: Tensor) -> MomentStatistic:
        """Holds the moments of the samples `y` (m, ...), m >= 2.

        Raises:
            ValueError: if all samples are equal, or for fewer than 2 samples or values that are not finite.
        """
        y = _pooled(y)
        values, vectors = torch.linalg.eigh(torch.atleast_2d(torch.cov(y.mT)))
        if not values.sum() > 0:
            raise ValueError("the reference samples are all equal; moment errors need a reference that varies")
        return cls(y.mean(0), values.clamp_min(0), vectors)

    def replicates(self, x: Tensor, blocks: int = 32) -> tuple[Replicates, Replicates]:
        """(mean error, spectrum error), each with its leave-one-block-out replicates."""
        z = (_pooled(x) - self.mean) @ self.vectors
        sizes = block_bounds(len(z), blocks).diff()
        parts = z.split(sizes.tolist())
        s = torch.stack([part.sum(0) for part in parts])
        q = torch.stack([part.square().sum(0) for part in parts])
        n = torch.cat([torch.tensor([len(z)]), len(z) - sizes])[:, None]
        first, second = self._errors(
            torch.cat([s.sum(0, keepdim=True), s.sum(0) - s]), torch.cat([q.sum(0, keepdim=True), q.sum(0) - q]), n
        )
        return Replicates(first[0].item(), first[1:], sizes), Replicates(second[0].item(), second[1:], sizes)

    def pair(self, x: Tensor) -> tuple[float, float]:
        """(mean error, spectrum error) of the samples `x` (n, ...), n >= 2."""
        z = (_pooled(x) - self.mean) @ self.vectors
        first, second = self._errors(z.sum(0)[None], z.square().sum(0)[None], torch.tensor([[len(z)]]))
        return first.item(), second.item()

    def _errors(self, s: Tensor, q: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """Errors (k,) from sums s, q (k, d) of z and z^2 over n (k, 1) samples, z centred on the data's mean."""
        mean = s / n
        var = (q - n * mean.square()) / (n - 1)
        total = self.values.sum()
        return mean.norm(dim=1) / total.sqrt(), (var - self.values).abs().sum(1) / total


def mean_error(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y| / (tr S_y)^{1/2} of samples x (n, ...) against data y (m, ...); dimensionless, >= 0.

    Raises:
        ValueError: if all of y are equal, or for fewer than 2 samples or values that are not finite.

    Example:
        >>> y = torch.tensor([[-1.0], [1.0]])
        >>> round(mean_error(y + 3, y), 6)  # 3 / 2^{1/2}
        2.12132
    """
    return MomentStatistic.against(y).pair(x)[0]


def spectrum_error(x: Tensor, y: Tensor) -> float:
    """sum_i |v_i^T S_x v_i - lambda_i| / tr S_y of samples x against data y; dimensionless, >= 0.

    Raises:
        ValueError: if all of y are equal, or for fewer than 2 samples or values that are not finite.

    Example:
        >>> y = torch.tensor([[-1.0], [1.0]])
        >>> round(spectrum_error(2 * y, y), 6)
        3.0
    """
    return MomentStatistic.against(y).pair(x)[1]
