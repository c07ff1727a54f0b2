r"""Low rank plus diagonal: r learned directions with variances, by maximum likelihood of the residual.

In the coordinates of a basis B, with a calibrated table v,

    C = B D^1/2 (diag(e^h) + W W^T) D^1/2 B^T,     D = diag(v),     h and the r columns of W functions of x_t.

h and W maximise the Gaussian likelihood of y = D^-1/2 B^T (x_0 - x0_hat), d times a proper score for the second
moment: E[log det S + y^T S^-1 y | x_t] is minimal over positive definite S at S = E[y y^T | x_t], and within the
family at the member nearest to it in KL divergence. Rank 0 is NPR. W starts as small random numbers, not at 0, which
is a saddle point of the likelihood.

Where a posterior is a choice between a few modes, its covariance has a few large directions that turn with x_t: no
table and no diagonal can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.calibrate.estimator import Draw, HeadEstimator
from lowvar.process.basis import PixelBasis
from lowvar.process.covariance import Covariance, LowRankPlusDiagonal
from lowvar.process.denoiser import Denoiser
from lowvar.process.rotated import BasisLowRankPlusDiagonal

__all__ = ["MAX_RANK", "LowRank"]

MAX_RANK = 16


@dataclass(frozen=True, eq=False)
class LowRank(HeadEstimator):
    """C = B D^1/2 (diag(e^h) + W W^T) D^1/2 B^T; the head has 1 + r outputs an entry.

    Raises:
        ValueError: if the rank is above 16 or not below the dimension.
    """

    name: ClassVar[str] = "lowrank"
    declares: ClassVar[Claims] = Claims(
        "maximum likelihood under N(0, diag + U U^T)",
        "network",
        "the member of the family nearest to E[(x0 - x0_hat)(x0 - x0_hat)^T | x_t]",
        "what rank r cannot hold",
        training_nfe=1,
    )

    def __post_init__(self) -> None:
        """Checks the rank."""
        super().__post_init__()
        d = self.basis.event_shape.numel()
        if self.rank > min(MAX_RANK, d - 1):
            raise ValueError(f"rank is {self.rank}; allowed: 0 to {min(MAX_RANK, d - 1)} for events of {d} numbers")

    @property
    def rank(self) -> int:
        """r."""
        return self.network.outputs - 1

    def target(self, denoiser: Denoiser, draw: Draw, variance: Tensor) -> Tensor:
        """See the base class: y."""
        return self.basis.forward(draw.x0 - draw.mean) / variance.sqrt()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """See the base class: twice the negative log likelihood a dimension, up to a constant."""
        h, W = output[:, 0], output[:, 1:]
        if self.rank == 0:
            return (h + target**2 * (-h).exp()).flatten(1).mean(1)
        S = LowRankPlusDiagonal(h.exp(), W)
        return (S.logdet() + S.inverse_quadratic(target)) / target[0].numel()

    def assemble(self, output: Tensor, variance: Tensor) -> Covariance:
        """See the base class."""
        rest = variance * output[:, 0].exp()
        if self.rank == 0:
            return self.diagonal(rest)
        inner = LowRankPlusDiagonal(rest, variance.sqrt()[:, None] * output[:, 1:])
        return inner if isinstance(self.basis, PixelBasis) else BasisLowRankPlusDiagonal(self.basis, inner)
