r"""Covariance tables: the variance of x_0 given x_t as a function of the noise level only.

A table holds variances v at knots of logsnr: one number (isotropic), one a channel, one a pixel, or one a direction
of an orthonormal basis (DCT, PCA). Between knots log v is linear in logsnr. Above the last knot v falls like 1 / snr,
as any posterior variance does at low noise; below the first it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.process.basis import Basis
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, Isotropic
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level

__all__ = ["CovarianceTable", "Structure"]

Structure = Literal["isotropic", "channel", "pixel", "basis"]
_FLOOR = 1e-20


@dataclass(frozen=True, eq=False)
class CovarianceTable:
    """A covariance model for `lowvar.process.WithCovariance`.

    Attributes:
        structure: what the entries are variances of.
        logsnr: increasing knots, (n,) float64.
        variance: (n, *entries) float64 >= 0: entries () isotropic, (C, 1, ..) channel, event_shape pixel and basis.
        event_shape: shape of an event.
        basis: the basis of `structure="basis"`.
        se: standard errors of the variances, same shape, or None.

    Raises:
        ValueError: if shapes do not fit, knots do not increase or a variance is negative or not finite.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> table = CovarianceTable("isotropic", torch.tensor([-4.0, 4.0]), torch.tensor([1.0, 0.01]), (2,))
        >>> round(float(table.at(torch.tensor(0.0))), 6)
        0.1
    """

    declares: ClassVar[Claims] = Claims(
        "residual moments",
        "network",
        "the average over x_t of E[(x0 - x0_hat)_i^2 | x_t], entry by entry in its coordinates",
        "towards the Gaussian twin where images are few",
        per_sample=False,
    )
    structure: Structure
    logsnr: Tensor
    variance: Tensor
    event_shape: tuple[int, ...]
    basis: Basis | None = None
    se: Tensor | None = None

    def __post_init__(self) -> None:
        """Checks the table."""
        object.__setattr__(self, "logsnr", self.logsnr.double())
        object.__setattr__(self, "variance", self.variance.double())
        object.__setattr__(self, "event_shape", tuple(self.event_shape))
        if self.structure not in ("isotropic", "channel", "pixel", "basis"):
            raise ValueError(f"structure is {self.structure!r}; allowed: isotropic, channel, pixel, basis")
        if (self.structure == "basis") != (self.basis is not None):
            raise ValueError("a basis belongs to structure 'basis', and only to it")
        if len(self.logsnr) < 1 or len(self.logsnr) != len(self.variance) or bool((self.logsnr.diff() <= 0).any()):
            raise ValueError("a table needs one row of variances a knot, at increasing logsnr")
        if not bool((torch.isfinite(self.variance) & (self.variance >= 0)).all()):
            raise ValueError("variances must be finite and not negative")
        object.__setattr__(self, "_log", torch.log(self.variance.clamp_min(_FLOOR)))

    def at(self, logsnr: Tensor) -> Tensor:
        """Variances at logsnr: (*entries) for a scalar, (B, *entries) for (B,); float64."""
        logs: Tensor = self._log.to(logsnr.device)  # type: ignore[attr-defined]
        knots = self.logsnr.to(logsnr.device)
        if len(knots) == 1:
            i = j = torch.zeros_like(logsnr, dtype=torch.long)
            w = torch.zeros_like(logsnr)
        else:
            j = torch.searchsorted(knots, logsnr.contiguous()).clamp(1, len(knots) - 1)
            i = j - 1
            w = ((logsnr - knots[i]) / (knots[j] - knots[i])).clamp(0, 1)
        column = (*w.shape, *([1] * (logs.ndim - 1)))
        decay = (logsnr - knots[-1]).clamp_min(0).reshape(column)
        return torch.exp(torch.lerp(logs[i], logs[j], w.reshape(column)) - decay)

    def __call__(self, x: Tensor, level: Level, posterior: Posterior | None = None) -> Covariance:
        """The covariance of x_0 at a level, in the dtype of the states x."""
        variance = self.at(level.logsnr).to(x)
        if self.structure == "isotropic":
            return Isotropic(variance, self.event_shape)
        if level.logsnr.ndim == 0:
            variance = variance[None]
        if self.structure == "basis":
            assert self.basis is not None
            return BasisDiagonal(self.basis, variance)
        return Diagonal(variance.expand(-1, *self.event_shape))

    def to_json(self) -> dict[str, Any]:
        """Numbers as nested lists; the basis is stored by its owner."""
        return {"structure": self.structure, "logsnr": self.logsnr.tolist(), "variance": self.variance.tolist()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], event_shape: tuple[int, ...], basis: Basis | None) -> CovarianceTable:
        """The table that `to_json` described."""
        structure = fields["structure"]
        return cls(
            structure,
            torch.tensor(fields["logsnr"], dtype=torch.float64),
            torch.as_tensor(fields["variance"], dtype=torch.float64),
            event_shape,
            basis if structure == "basis" else None,
        )
