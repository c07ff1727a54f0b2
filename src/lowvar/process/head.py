r"""Variance heads: what the output channels of a network beyond the prediction say about Cov[x_0 | x_t].

With p = sigma^2 / (alpha^2 + sigma^2), the posterior variance of unit-variance Gaussian data, and raw channels h, u,

    head      channels   meaning
    range     C          f = (v + 1) / 2, log-interpolation of a step's variance (Nichol & Dhariwal 2021); not a C
    logvar    C          C = p diag(exp(h))
    basis     C          C = B diag(w exp(h)) B^T,   w_k = c_k sigma^2 / (alpha^2 c_k + sigma^2)
    lowrank   (1 + r) C  C = p (diag(exp(h)) + U U^T),   U = [u_1 .. u_r], one direction every C channels, r = 0 .. 16

`basis`: B is an orthonormal basis and c the data's variances along its directions, together a `Spectrum`; entry
(c, i, j) of h belongs to coefficient (c, i, j). w is the posterior variance of the Gaussian with that spectrum (see
`twin`), so that h = 0 is exact for Gaussian data at every level, and h says what a state tells beyond it. Directions in
which data do not vary have c_k = 0; c is at least `SPECTRUM_FLOOR` of its mean, so that a likelihood stays finite.

`lowrank`: U scales with sqrt(p), so that a direction's share of the variance is the same at every level. At r = 0 it is
`logvar`.

|h| is limited to 20: beyond it a variance means nothing in float32, and its gradient is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lowvar.process.basis import Basis
from lowvar.process.covariance import BasisDiagonal, Covariance, Diagonal, LowRankPlusDiagonal
from lowvar.process.schedule import Level

__all__ = [
    "COVARIANCE_HEADS",
    "HEADS",
    "MAX_RANK",
    "SPECTRUM_FLOOR",
    "Head",
    "Spectrum",
    "covariance_of",
    "head_channels",
    "rank_of",
]

Head = Literal["range", "logvar", "basis", "lowrank"]
HEADS: tuple[Head, ...] = get_args(Head)
COVARIANCE_HEADS: tuple[Head, ...] = ("logvar", "basis", "lowrank")
MAX_RANK = 16
SPECTRUM_FLOOR = 1e-4
_LIMIT = 20.0


def expand(value: Tensor, like: Tensor) -> Tensor:
    """A level's value () or (B,) shaped to multiply `like` (B, ...) without changing its dtype."""
    return value.to(like).reshape(-1, *([1] * (like.ndim - 1))) if value.ndim else value


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances of the data along the directions of an orthonormal basis: what a `basis` head is relative to.

    Attributes:
        basis: the basis B.
        variance: c >= 0, (*event_shape); c_k = 0 is allowed and read as the floor.

    Raises:
        ValueError: if the shapes differ, a variance is negative, or all are zero.

    Example:
        >>> from lowvar.process.basis import PixelBasis
        >>> from lowvar.process.schedule import CosineVP
        >>> spectrum = Spectrum(PixelBasis((2,)), torch.tensor([1.0, 0.25]))
        >>> spectrum.posterior_variance(CosineVP().at(0.5), torch.zeros(1, 2)).shape
        torch.Size([1, 2])
    """

    basis: Basis
    variance: Tensor

    def __post_init__(self) -> None:
        """Checks shape and signs."""
        if self.variance.shape != self.basis.event_shape:
            raise ValueError(
                f"variances have shape {tuple(self.variance.shape)}, the basis {tuple(self.basis.event_shape)}: "
                "they must agree"
            )
        if not bool((self.variance >= 0).all()) or not float(self.variance.max()) > 0:
            raise ValueError("the variances of a spectrum must not be negative, and not all zero")
        object.__setattr__(self, "_cache", {})

    def posterior_variance(self, level: Level, like: Tensor) -> Tensor:
        """w = c sigma^2 / (alpha^2 c + sigma^2), (1 or B, *event_shape), in the dtype of `like` (B, *event_shape)."""
        cache: dict[tuple[torch.dtype, torch.device], Tensor] = self._cache  # type: ignore[attr-defined]
        key = (like.dtype, like.device)
        if key not in cache:
            floor = SPECTRUM_FLOOR * float(self.variance.double().mean())
            cache[key] = self.variance.to(like).clamp_min(floor)[None]
        c = cache[key]
        sigma2 = expand(level.sigma**2, like)
        return c * sigma2 / (expand(level.alpha**2, like) * c + sigma2)


def head_channels(head: Head | None, channels: int, rank: int = 0) -> int:
    """Output channels of a network with C input channels; `rank` is r of `lowrank`.

    Raises:
        ValueError: if the rank is out of range.

    Example:
        >>> [head_channels(h, 3, 4) for h in (None, "range", "basis", "lowrank")]
        [3, 6, 6, 18]
    """
    if not 0 <= rank <= MAX_RANK:
        raise ValueError(f"rank is {rank}; allowed: 0 to {MAX_RANK}")
    if head is None:
        return channels
    return channels * (2 + (rank if head == "lowrank" else 0))


def rank_of(head: Head | None, channels: int, outputs: int) -> int | None:
    """r of a head, read off the channels: 0 where it has no directions; None where the outputs do not fit the head.

    Example:
        >>> rank_of("lowrank", 3, 18), rank_of("basis", 3, 6), rank_of("basis", 3, 9)
        (4, 0, None)
    """
    extra, rest = divmod(outputs, channels)
    rank = extra - 2
    if head is None or rest or not 0 <= rank <= (MAX_RANK if head == "lowrank" else 0):
        return 0 if head is None and outputs == channels else None
    return rank


def covariance_of(head: Head, raw: Tensor, level: Level, channels: int, spectrum: Spectrum | None = None) -> Covariance:
    """The covariance that a head's raw output stands for, in its dtype.

    Args:
        head: logvar, basis or lowrank.
        raw: the channels beyond the prediction, (B, n, ...) with n as in the module's table.
        level: noise level, scalar or (B,).
        channels: C of the states.
        spectrum: for `basis`.

    Raises:
        ValueError: for `range`, which describes a step and not a posterior; for `basis` without a spectrum or with one
            of another shape.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> covariance_of("lowrank", torch.ones(2, 3, 4, 4), CosineVP().at(0.5), channels=1).trace().shape
        torch.Size([2])
    """
    scale = torch.exp(raw[:, :channels].clamp(-_LIMIT, _LIMIT))
    if head == "basis":
        if spectrum is None:
            raise ValueError(
                "head 'basis' needs the data's spectrum in its basis: give spectrum=Spectrum(basis, variance)"
            )
        if spectrum.basis.event_shape != scale.shape[1:]:
            raise ValueError(
                f"the head's spectrum is for events {tuple(spectrum.basis.event_shape)}, the network has "
                f"{tuple(scale.shape[1:])}"
            )
        return BasisDiagonal(spectrum.basis, spectrum.posterior_variance(level, scale) * scale)
    prior = expand(level.sigma**2 / (level.alpha**2 + level.sigma**2), scale)
    if head == "logvar":
        return Diagonal(prior * scale)
    if head == "lowrank":
        rank = raw.shape[1] // channels - 1
        factors = raw[:, channels:].reshape(raw.shape[0], rank, channels, *raw.shape[2:])
        std = prior.sqrt()
        return LowRankPlusDiagonal(prior * scale, (std[:, None] if std.ndim else std) * factors)
    raise ValueError(
        f"head {head!r} describes a reverse step, not a posterior covariance; those that do: logvar, basis, lowrank"
    )
