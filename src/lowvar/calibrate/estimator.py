r"""Estimators of C with a learned head: what NPR, SN, OCM and low rank have in common.

Each regresses a target on x_t, in units of the table v(logsnr), in the coordinates of the head's basis:

    target     T, drawn once a training draw
    loss       of the head's output and T, whose minimiser over functions of x_t is the wanted expectation
    assemble   C from the output and v; output 0 gives the table's covariance

For a positive target, E[T | x_t] = C / v, the scale-free loss is L = h + T e^-h: dE[L | x_t] / dh = 1 - E[T | x_t]
e^-h, zero exactly where e^h = E[T | x_t], convex in h; it is (twice) the negative Gaussian log likelihood and does not
favour large variances as squares would. For one that can be negative, squares w (T - e^h)^2, minimal at e^h = E[T |
x_t] wherever that is positive, for any weight w > 0 that depends on x_t alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.calibrate.head import VarianceHead
from lowvar.calibrate.table import CovarianceTable
from lowvar.process.basis import Basis, PixelBasis
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, wide
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["EVERYWHERE", "LIMIT", "DiagonalHead", "Draw", "HeadEstimator", "Trust", "proportional_loss", "square_loss"]

LIMIT = 4.0
"""|h| is kept below: a head moves a variance by a factor of 55 at most, also on images unlike those it has seen."""


@dataclass(frozen=True)
class Draw:
    """Training draws: x_t = alpha x_0 + sigma eps, and the denoiser's mean there.

    Attributes:
        x0, eps, x, mean: (B, *event_shape).
        level: (B,).
        sign: +-1 a direction of the head's basis, (B, *event_shape), for probes.
    """

    x0: Tensor
    eps: Tensor
    x: Tensor
    mean: Tensor
    level: Level
    sign: Tensor


@dataclass(frozen=True)
class Trust:
    """How far a head is used: C = e^shift C(factor h), by logsnr, linear between knots and constant outside.

    Attributes:
        logsnr: increasing knots.
        factor: of the head's output, in [0, 1], one a knot.
        shift: log of a factor of C, one a knot, that makes held-out residuals standard; empty: 0.

    Example:
        >>> Trust((-1.0, 1.0), (0.0, 1.0)).factor_at(torch.tensor([-3.0, 0.0, 3.0])).tolist()
        [0.0, 0.5, 1.0]
    """

    logsnr: tuple[float, ...] = (0.0,)
    factor: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = ()

    def factor_at(self, logsnr: Tensor) -> Tensor:
        """The factor at logsnr, same shape."""
        return self._at(self.factor, logsnr)

    def shift_at(self, logsnr: Tensor) -> Tensor:
        """The shift at logsnr, same shape."""
        return self._at(self.shift or (0.0,), logsnr)

    def _at(self, values: tuple[float, ...], logsnr: Tensor) -> Tensor:
        if len(set(values)) == 1:
            return torch.full_like(logsnr, values[0])
        knots, factors = (torch.tensor(v, dtype=logsnr.dtype, device=logsnr.device) for v in (self.logsnr, values))
        x = logsnr.clamp(self.logsnr[0], self.logsnr[-1])
        j = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
        w = (x - knots[j - 1]) / (knots[j] - knots[j - 1])
        return torch.lerp(factors[j - 1], factors[j], w)

    def to_json(self) -> dict[str, list[float]]:
        """Numbers as lists."""
        return {"logsnr": list(self.logsnr), "factor": list(self.factor), "shift": list(self.shift)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Sequence[float]]) -> Trust:
        """The trust that `to_json` described."""
        return cls(tuple(fields["logsnr"]), tuple(fields["factor"]), tuple(fields["shift"]))


EVERYWHERE = Trust()


def proportional_loss(h: Tensor, target: Tensor) -> Tensor:
    """h + T e^-h a sample, mean over entries, (B,); for T >= 0."""
    return (h + target * torch.exp(-h)).flatten(1).mean(1)


def square_loss(h: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """w (T - e^h)^2 a sample, mean over entries, (B,)."""
    return (weight * (target - torch.exp(h)) ** 2).flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class HeadEstimator(ABC):
    """A covariance model with a head; a `CovarianceModel`.

    Attributes:
        table: the table it is relative to: structure pixel or basis, in the head's basis.
        network: the head.
        trust: factor of the head's output by logsnr.

    Raises:
        ValueError: if table and head are in different bases.
    """

    name: ClassVar[str]
    declares: ClassVar[Claims]

    table: CovarianceTable
    network: VarianceHead
    trust: Trust = EVERYWHERE

    def __post_init__(self) -> None:
        """Checks that table and head fit."""
        if self.table.structure not in ("pixel", "basis") or not self.basis.same_as(self.network.basis):
            same = isinstance(self.basis, PixelBasis) and isinstance(self.network.basis, PixelBasis)
            if self.table.structure not in ("pixel", "basis") or not same:
                raise ValueError("a head needs a pixel table, or a table in the head's own basis")

    @property
    def basis(self) -> Basis:
        """Coordinates of table and head."""
        return PixelBasis(self.table.event_shape) if self.table.basis is None else self.table.basis

    def trusted(self, trust: Trust) -> Self:
        """The same estimator with another trust."""
        return replace(self, trust=trust)

    def variance(self, level: Level, like: Tensor) -> Tensor:
        """The table's variances in the head's basis, (B or 1, *event_shape)."""
        variance = self.table.at(level.logsnr.to(like.device)).to(like)
        return variance if level.logsnr.ndim else variance[None]

    @abstractmethod
    def target(self, denoiser: Denoiser, draw: Draw, variance: Tensor) -> Tensor:
        """What is regressed, of training draws and the table's variances at them; first axis B."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss a sample (B,) of the head's output (B, outputs, *event_shape)."""

    @abstractmethod
    def assemble(self, output: Tensor, variance: Tensor) -> Covariance:
        """C from the head's output and the table's variances."""

    def diagonal(self, variance: Tensor) -> Covariance:
        """The covariance with these variances in the head's basis."""
        if isinstance(self.basis, PixelBasis):
            return Diagonal(variance)
        return BasisDiagonal(self.basis, variance)

    def output(self, x: Tensor, level: Level, mean: Tensor) -> Tensor:
        """The head's output, bounded and times its trust, (B, outputs, *event_shape)."""
        trust = self.trust.factor_at(level.logsnr.to(x.device))
        if self.network.offset.device != x.device:
            self.network.to(x.device)
        out = self.network(x, level, mean).to(x)
        out = LIMIT * torch.tanh(out / LIMIT)
        return out * (expand(trust, out) if trust.ndim else trust.to(out))

    def __call__(self, x: Tensor, level: Level, posterior: Posterior) -> Covariance:
        """C at states x (B, *event_shape); float32 or wider, never negative.

        At a level the head is not trusted at, this is the table's covariance to the last digit that e^0 = 1 keeps.
        """
        with torch.autocast(x.device.type, enabled=False):
            x, mean = wide(x), wide(posterior.mean)
            x = x.to(torch.promote_types(x.dtype, mean.dtype))
            mean = mean.to(x)
            C = self.assemble(self.output(x, level, mean), self.variance(level, x))
            return C.affine(0.0, self.trust.shift_at(level.logsnr).exp().to(x)) if self.trust.shift else C


class DiagonalHead(HeadEstimator):
    """C = B diag(v e^h) B^T."""

    def assemble(self, output: Tensor, variance: Tensor) -> Covariance:
        """See the base class."""
        return self.diagonal(variance * output[:, 0].exp())
