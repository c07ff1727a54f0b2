r"""Noise schedules in terms of the log signal-to-noise ratio, in float64.

    x_t = alpha_t x_0 + sigma_t eps,    logsnr(t) = log(alpha_t^2 / sigma_t^2),    l(t) = logsnr(t) / 2.

t runs over [0, 1]: t = 1 is noise, and **t = 0 is clean data for every schedule**: alpha_0 = 1, sigma_0 = 0,
logsnr = +inf. A schedule is a decreasing function logsnr(t), its inverse, and a *family* that turns a logsnr into
(alpha, sigma):

    VP    alpha^2 + sigma^2 = 1     alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr)
    VE    alpha = 1                 sigma = exp(-logsnr / 2)
    flow  alpha + sigma = 1         alpha = sigmoid(logsnr / 2), sigma = sigmoid(-logsnr / 2)

Going through logsnr keeps 1 - snr_t / snr_s = -expm1(logsnr_t - logsnr_s) exact, where float32 tables of
prod(1 - beta) lose three digits.

Sources: Kingma et al. 2021 (logsnr), Nichol & Dhariwal 2021 (cosine), Song et al. 2021 (linear beta, VE), Karras et
al. 2022 (EDM), Lipman et al. 2023 (flow matching), Lin et al. 2024 (zero terminal SNR).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "VE",
    "CosineVP",
    "Family",
    "Flow",
    "Level",
    "LinearVP",
    "Schedule",
]

Family = Literal["vp", "ve", "flow"]


def _f64(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _logit(p: Tensor) -> Tensor:
    return torch.log(p) - torch.log1p(-p)


@dataclass(frozen=True)
class Level:
    """Noise levels: the values of a schedule at times t. All fields are float64 tensors of one shape.

    Attributes:
        t: time in [0, 1].
        logsnr: log(alpha^2 / sigma^2), +inf at t = 0.
        alpha: signal coefficient.
        sigma: noise standard deviation.
    """

    t: Tensor
    logsnr: Tensor
    alpha: Tensor
    sigma: Tensor

    def __getitem__(self, key: Any) -> Level:
        """The levels at an index or slice."""
        return Level(self.t[key], self.logsnr[key], self.alpha[key], self.sigma[key])

    def __len__(self) -> int:
        """Number of levels (of a one-dimensional `Level`)."""
        return len(self.t)

    def to(self, device: torch.device | str) -> Level:
        """The same levels on another device."""
        return Level(self.t.to(device), self.logsnr.to(device), self.alpha.to(device), self.sigma.to(device))


class Schedule(ABC):
    """A decreasing function logsnr(t) on [0, 1] with its inverse. Subclasses are frozen dataclasses without state."""

    family: ClassVar[Family]

    @abstractmethod
    def logsnr(self, t: Tensor | float) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), float64, for times t in [0, 1]; +inf at t = 0."""

    @abstractmethod
    def time(self, logsnr: Tensor | float) -> Tensor:
        """The time at which logsnr is reached (float64); values beyond the ends give 0 and 1."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-ready parameters; `schedule_from_config` makes the schedule again."""

    @property
    def conditioning_scale(self) -> float:
        """What a network's time input is multiplied by: it sees `timestep(t)`, by default 1000 t."""
        return 1000.0

    @property
    def t_min(self) -> float:
        """Smallest time at which networks are trained and evaluated; the step from it goes to t = 0."""
        return 1e-3

    def timestep(self, t: Tensor | float) -> Tensor:
        """The time input a network is conditioned on (float64)."""
        return _f64(t) * self.conditioning_scale

    def time_of(self, timestep: Tensor | float) -> Tensor:
        """The inverse of `timestep` (float64)."""
        return _f64(timestep) / self.conditioning_scale

    def at(self, t: Tensor | float) -> Level:
        """The level at times t.

        Raises:
            ValueError: if a time lies outside [0, 1].
        """
        t = _f64(t)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"times must lie in [0, 1] (0: data, 1: noise), got {t.min():.6g} to {t.max():.6g}")
        return self.level(self.logsnr(t), t)

    def level(self, logsnr: Tensor | float, t: Tensor | None = None) -> Level:
        """The level at a logsnr (float64 tensor of any shape)."""
        logsnr = _f64(logsnr)
        if self.family == "vp":
            alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
        elif self.family == "ve":
            alpha, sigma = torch.ones_like(logsnr), torch.exp(-logsnr / 2)
        else:
            alpha, sigma = torch.sigmoid(logsnr / 2), torch.sigmoid(-logsnr / 2)
        return Level(self.time(logsnr) if t is None else t, logsnr, alpha, sigma)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the values (alpha, sigma) themselves: equal formulas agree, equal names need not."""
        level = self.at(torch.linspace(0, 1, 65, dtype=torch.float64))
        values = [f"{v:.6e}" for v in torch.cat([level.alpha, level.sigma]).tolist()]
        return hashlib.sha256(json.dumps([self.family, values]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CosineVP(Schedule):
    """alpha_t^2 = cos^2((t + s) / (1 + s) pi/2) / cos^2(s / (1 + s) pi/2), clipped at logsnr_min (Nichol & Dhariwal).

    Example:
        >>> schedule = CosineVP()
        >>> round(float(schedule.time(schedule.logsnr(0.3))), 12)
        0.3
    """

    s: float = 0.008
    logsnr_min: float = -15.0
    family: ClassVar[Family] = "vp"

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1 + self.s) * (math.pi / 2)

    def logsnr(self, t: Tensor | float) -> Tensor:
        """See the base class."""
        t = _f64(t)
        a0 = self._angle(_f64(0.0))
        log_alpha2 = 2 * (torch.log(torch.cos(self._angle(t)).clamp_min(1e-300)) - torch.log(torch.cos(a0)))
        # 1 - cos^2 a / cos^2 a0 = sin(a - a0) sin(a + a0) / cos^2 a0, without cancellation at t = 0
        a = self._angle(t)
        log_sigma2 = torch.log(torch.sin(a - a0) * torch.sin(a + a0)) - 2 * torch.log(torch.cos(a0))
        return (log_alpha2 - log_sigma2).clamp_min(self.logsnr_min)

    def time(self, logsnr: Tensor | float) -> Tensor:
        """See the base class."""
        a0 = self._angle(_f64(0.0))
        logsnr = _f64(logsnr)
        # sin^2 a = 1 - alpha^2 cos^2 a0 = sigma^2 cos^2 a0 + sin^2 a0
        sin2 = torch.sigmoid(-logsnr) * torch.cos(a0) ** 2 + torch.sin(a0) ** 2
        cos2 = torch.sigmoid(logsnr) * torch.cos(a0) ** 2
        a = torch.atan2(sin2.sqrt(), cos2.sqrt())
        t = a / (math.pi / 2) * (1 + self.s) - self.s
        return torch.where(logsnr <= self.logsnr_min, torch.ones_like(t), t).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"schedule": "cosine", "s": self.s, "logsnr_min": self.logsnr_min}


@dataclass(frozen=True)
class LinearVP(Schedule):
    """alpha_t^2 = exp(-(beta_min t + (beta_max - beta_min) t^2 / 2)) (Song et al. 2021, the VP SDE)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    family: ClassVar[Family] = "vp"

    def __post_init__(self) -> None:
        """Refuses rates that do not make noise."""
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def logsnr(self, t: Tensor | float) -> Tensor:
        """See the base class: -log(exp(integral of beta) - 1)."""
        t = _f64(t)
        total = self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2
        return -torch.log(torch.expm1(total))

    def time(self, logsnr: Tensor | float) -> Tensor:
        """See the base class."""
        total = F.softplus(-_f64(logsnr))  # log(1 + 1 / snr) = integral of beta
        slope = self.beta_max - self.beta_min
        t = 2 * total / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * total))
        return t.clamp(0, 1)

    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"schedule": "linear", "beta_min": self.beta_min, "beta_max": self.beta_max}


@dataclass(frozen=True)
class VE(Schedule):
    """alpha = 1, sigma_t = sigma_max t^rho: the continuum of EDM's grid (Karras et al. 2022, Eq. 5) down to sigma = 0.

    `timestep` is EDM's c_noise = log(sigma) / 4.
    """

    sigma_max: float = 80.0
    rho: float = 7.0
    family: ClassVar[Family] = "ve"

    def __post_init__(self) -> None:
        """Refuses non-positive parameters."""
        if self.sigma_max <= 0 or self.rho <= 0:
            raise ValueError(f"sigma_max and rho must be positive, got {self.sigma_max} and {self.rho}")

    @property
    def t_min(self) -> float:
        """Time at which sigma is 0.002 (EDM's sigma_min)."""
        return min(0.5, (0.002 / self.sigma_max) ** (1 / self.rho))

    def timestep(self, t: Tensor | float) -> Tensor:
        """See the base class: log(sigma) / 4."""
        return -self.logsnr(t) / 8

    def time_of(self, timestep: Tensor | float) -> Tensor:
        """See the base class."""
        return self.time(-8 * _f64(timestep))

    def logsnr(self, t: Tensor | float) -> Tensor:
        """See the base class."""
        return -2 * (math.log(self.sigma_max) + self.rho * torch.log(_f64(t)))

    def time(self, logsnr: Tensor | float) -> Tensor:
        """See the base class."""
        return torch.exp((-_f64(logsnr) / 2 - math.log(self.sigma_max)) / self.rho).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        """See the base class."""
        return {"schedule": "ve", "sigma_max": self.sigma_max, "rho": self.rho}


@dataclass(frozen=True)
class Flow(Schedule):
    """alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t) (Lipman et al. 2023; shift: Esser et al. 2024).

    logsnr(1) = -inf: the process starts from pure noise. `timestep` is T u, T = 1000 in most of diffusers' pipelines.

    Args:
        shift: of the times, > 0.
        timesteps: T, `num_train_timesteps` of diffusers' schedulers, > 0.
    """

    shift: float = 1.0
    timesteps: float = 1000.0
    family: ClassVar[Family] = "flow"

    def __post_init__(self) -> None:
        """Refuses parameters that are not positive."""
        if self.shift <= 0 or self.timesteps <= 0:
            raise ValueError(f"shift and timesteps must be positive, got {self.shift} and {self.timesteps}")

    @property
    def conditioning_scale(self) -> float:
        """See the base class: T."""
        return self.timesteps

    def _u(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timestep(self, t: Tensor | float) -> Tensor:
        """See the base class: T sigma."""
        return self._u(_f64(t)) * self.conditioning_scale

    def time_of(self, timestep: Tensor | float) -> Tensor:
        """See the base class."""
        u = _f64(timestep) / self.conditioning_scale
        return u / (self.shift - (self.shift - 1) * u)

    def logsnr(self, t: Tensor | float) -> Tensor:
        """See the base class; -inf at t = 1."""
        t = _f64(t)
        return 2 * (torch.log1p(-t) - torch.log(self.shift * t))  # 1 - u = (1 - t) / (1 + (shift - 1) t)

    def time(self, logsnr: Tensor | float) -> Tensor:
        """See the base class."""
        u = torch.sigmoid(-_f64(logsnr) / 2)
        return (u / (self.shift - (self.shift - 1) * u)).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        """See the base class."""
        scale = {} if self.timesteps == 1000 else {"timesteps": self.timesteps}
        return {"schedule": "flow", "shift": self.shift, **scale}
