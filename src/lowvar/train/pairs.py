r"""Pairings of the noises within a batch: dependent samples, each alone exactly as before.

Sample i is an image x_i, a uniform number u_i of its time, and eps_i ~ N(0, I). A pairing makes the samples of a
group dependent and leaves every sample's own law as it is, so the expected gradient is that of independent samples:

    independent   nothing
    same          (x, t, eps), (x, t, -eps)                    images and times are shared, half as many an update
    cross         (x_i, t, eps), (x_j, t, -eps)                the time is shared, the images are not
    orthogonal    eps_1, .., eps_g of a group made orthogonal
    sobol         (u_i, eps_i) from one scrambled net a batch: see `sobol`

For pairs the variance of the mean gradient falls by 1 + rho, rho = tr Cov(g, g') / tr Cov(g) between the two of a
pair. *orthogonal*: Gram-Schmidt of z_1, .., z_g gives directions that depend on the directions z_k / |z_k| alone; the
norms |z_k| are independent of those, and each direction is uniform on the sphere, so eps_k = |z_k| q_k is exactly
N(0, I). It needs g <= d.

Samples of a group are dependent, so a variance estimate must be taken over groups (`Pairing.size`; `Draws.group`).

Sources: Hammersley & Morton 1956 (antithetic variates); Yu et al. 2016 (orthogonal random features).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.process.noise import NoiseSource
from lowvar.train.objectives import Label

__all__ = ["CrossPairs", "IndependentSamples", "OrthogonalNoise", "Pairing", "SameImagePairs"]


class Pairing(ABC):
    """How the samples of a group depend on each other. Group k is the samples k size, .., k size + size - 1.

    Attributes:
        size: samples of a group.
        images: consecutive samples that share an image.
        times: consecutive samples that share a time.
        splits: whether a group may be spread over parts of a batch.
    """

    label: ClassVar[Label] = "unbiased"
    images: ClassVar[int] = 1
    times: ClassVar[int] = 1
    splits: ClassVar[bool] = False
    size: int

    @abstractmethod
    def normal(
        self, source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """The noises (n, *shape), float32, of the samples `number` (n,), whole groups in order unless `splits`."""

    def uniform(self, source: NoiseSource, number: Tensor, shape: Sequence[int]) -> Tensor:
        """The uniform numbers of the samples' times, (n,) float64: of what `times` says is shared, draw 1."""
        return source.uniform(number // self.times, (), draw=1, dtype=torch.float64)


@dataclass(frozen=True)
class IndependentSamples(Pairing):
    """Every sample its own image, time and noise.

    Example:
        >>> from lowvar.process import Independent
        >>> IndependentSamples().normal(Independent(0), torch.arange(3), (2,)).shape
        torch.Size([3, 2])
    """

    size: int = field(default=1, init=False)

    def normal(
        self, source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """See the base class."""
        return source.normal(number, shape, draw=0, device=device)


def _mirrored(source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Sample 2k has the noise of index k, sample 2k + 1 its negative."""
    z = source.normal(number // 2, shape, draw=0, device=device)
    sign = (1 - 2 * (number % 2)).to(z)
    return z * sign.reshape(-1, *[1] * len(shape))


@dataclass(frozen=True)
class SameImagePairs(Pairing):
    """Pairs (x, t, eps), (x, t, -eps).

    Example:
        >>> from lowvar.process import Independent
        >>> z = SameImagePairs().normal(Independent(0), torch.arange(4), (2,))
        >>> torch.equal(z[0], -z[1]) and torch.equal(z[2], -z[3])
        True
    """

    size: int = field(default=2, init=False)
    images: ClassVar[int] = 2
    times: ClassVar[int] = 2

    def normal(
        self, source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """See the base class."""
        return _mirrored(source, number, shape, device)


@dataclass(frozen=True)
class CrossPairs(Pairing):
    """Pairs (x_i, t, eps), (x_j, t, -eps).

    Example:
        >>> from lowvar.process import Independent
        >>> pairing, source = CrossPairs(), Independent(0)
        >>> u = pairing.uniform(source, torch.arange(4), (2,))
        >>> bool(u[0] == u[1]), bool(u[1] == u[2]), pairing.images
        (True, False, 1)
    """

    size: int = field(default=2, init=False)
    times: ClassVar[int] = 2

    def normal(
        self, source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """See the base class."""
        return _mirrored(source, number, shape, device)


@dataclass(frozen=True)
class OrthogonalNoise(Pairing):
    """Groups of g orthogonal noises with the norms of independent ones.

    Args:
        size: g, at most the number of elements of a noise.

    Raises:
        ValueError: if g is below 2, and on drawing if a noise has fewer than g elements.

    Example:
        >>> from lowvar.process import Independent
        >>> z = OrthogonalNoise(3).normal(Independent(0), torch.arange(3), (5,)).double()
        >>> bool(((z @ z.T).triu(1).abs() < 1e-5).all())
        True
    """

    size: int = 4

    def __post_init__(self) -> None:
        """Refuses groups of one."""
        if self.size < 2:
            raise ValueError(f"size is {self.size}; a group of orthogonal noises has at least 2 samples")

    def normal(
        self, source: NoiseSource, number: Tensor, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> Tensor:
        """See the base class."""
        z = source.normal(number, shape, draw=0, dtype=torch.float64, device=device)
        group = z.reshape(-1, self.size, z[0].numel())
        if group.shape[2] < self.size:
            raise ValueError(
                f"size is {self.size} and a noise has {group.shape[2]} elements; at most as many can be orthogonal"
            )
        q, r = torch.linalg.qr(group.mT)  # of Gram-Schmidt up to the signs of R's diagonal
        sign = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0).to(q)
        scale = sign * torch.linalg.vector_norm(group, dim=2)
        return (q * scale[:, None, :]).mT.reshape(z.shape).float()
