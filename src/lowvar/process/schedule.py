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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "VE",
    "CosineVP",
    "DiscreteVP",
    "Family",
    "Flow",
    "Level",
    "LinearVP",
    "Schedule",
    "schedule_from_config",
    "schedule_from_diffusers",
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

    logsnr(1) = -inf: the process starts from pure noise. `timestep` is 1000 u, as in diffusers' flow pipelines.
    """

    shift: float = 1.0
    family: ClassVar[Family] = "flow"

    def __post_init__(self) -> None:
        """Refuses a non-positive shift."""
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")

    def _u(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timestep(self, t: Tensor | float) -> Tensor:
        """See the base class: 1000 sigma."""
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
        return {"schedule": "flow", "shift": self.shift}


@dataclass(frozen=True, eq=False)
class DiscreteVP(Schedule):
    """The table a discrete-time model was trained with, made continuous: alpha_bar_n at t = (n + 1) / T, n = 0..T-1.

    Between the knots logsnr is linear in t; below the first knot sigma^2 is linear in t, down to clean data at t = 0.
    `timestep(t) = T t - 1` is the (possibly fractional) index that such networks are conditioned on.

    Args:
        alphas_cumprod: alpha_bar_n = prod (1 - beta_k), T decreasing numbers in [0, 1); a final 0 (zero terminal SNR)
            is allowed and makes logsnr(1) = -inf.
        name: what made the table, for messages.
        beta_config: the diffusers fields the table came from, if any (kept in `config` instead of the numbers).

    Raises:
        ValueError: if the numbers do not decrease or leave the range.

    Example:
        >>> schedule = schedule_from_diffusers({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
        >>> float(schedule.timestep(0.5)), schedule.t_min
        (499.0, 0.001)
    """

    alphas_cumprod: Tensor
    name: str = "table"
    beta_config: Mapping[str, Any] = field(default_factory=dict)
    family: ClassVar[Family] = "vp"

    def __post_init__(self) -> None:
        """Checks the table."""
        table = _f64(self.alphas_cumprod)
        object.__setattr__(self, "alphas_cumprod", table)
        if table.ndim != 1 or len(table) < 1:
            raise ValueError(f"alphas_cumprod must be a list of numbers, got shape {tuple(table.shape)}")
        if not bool(torch.isfinite(table).all()) or float(table[0]) >= 1 or float(table[-1]) < 0:
            raise ValueError("alphas_cumprod must lie in [0, 1)")
        if not bool((table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease from one timestep to the next")

    @property
    def steps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def t_min(self) -> float:
        """1 / T, the first training timestep."""
        return 1 / self.steps

    @cached_property
    def _knots(self) -> Tensor:
        return _logit(self.alphas_cumprod)

    def timestep(self, t: Tensor | float) -> Tensor:
        """See the base class: T t - 1."""
        return _f64(t) * self.steps - 1

    def time_of(self, timestep: Tensor | float) -> Tensor:
        """See the base class: (n + 1) / T."""
        return (_f64(timestep) + 1) / self.steps

    def logsnr(self, t: Tensor | float) -> Tensor:
        """See the base class."""
        t = _f64(t)
        knots = self._knots.to(t.device)
        n = (t * self.steps - 1).clamp_min(0)
        low = n.floor().long().clamp(0, max(self.steps - 2, 0))
        high = (low + 1).clamp_max(self.steps - 1)
        # an exact knot is returned as it is: n - low is 0 or 1 there, and 0 * inf must not enter
        w = n - low
        inner = torch.where(
            w <= 0, knots[low], torch.where(w >= 1, knots[high], torch.lerp(knots[low], knots[high], w))
        )
        if torch.isinf(self._knots[-1]):  # zero terminal SNR: alpha is linear in t on the last interval
            alpha2 = ((1 - w) * torch.sigmoid(knots[low]).sqrt()) ** 2
            inner = torch.where((high == self.steps - 1) & (w > 0), _logit(alpha2.clamp_max(1.0)), inner)
        sigma2 = (-torch.expm1(torch.log(self.alphas_cumprod[0]))).to(t.device) * t * self.steps
        first = torch.log1p(-sigma2.clamp_max(0.999999)) - torch.log(sigma2)
        return torch.where(t * self.steps < 1, first, inner)

    def time(self, logsnr: Tensor | float) -> Tensor:
        """See the base class."""
        logsnr = _f64(logsnr)
        knots = self._knots.to(logsnr.device)
        ascending = -knots
        high = torch.searchsorted(ascending.contiguous(), (-logsnr).contiguous()).clamp(1, max(self.steps - 1, 1))
        high = high.clamp_max(self.steps - 1)
        low = (high - 1).clamp_min(0)
        gap = knots[low] - knots[high]
        w = torch.where(gap > 0, (knots[low] - logsnr) / torch.where(gap > 0, gap, torch.ones_like(gap)), 0.0)
        last = 1 - (torch.sigmoid(logsnr) / torch.sigmoid(knots[low])).sqrt()
        w = torch.where(torch.isinf(knots[high]), last, w).clamp(0, 1)
        inner = (low + w + 1) / self.steps
        sigma2_first = -torch.expm1(torch.log(self.alphas_cumprod[0])).to(logsnr.device)
        first = torch.sigmoid(-logsnr) / sigma2_first / self.steps
        return torch.where(logsnr > knots[0], first, inner).clamp(0, 1)

    def config(self) -> dict[str, Any]:
        """See the base class."""
        if self.beta_config:
            return {"schedule": "diffusers", **self.beta_config}
        return {"schedule": "table", "alphas_cumprod": self.alphas_cumprod.tolist()}

    def zero_terminal(self) -> DiscreteVP:
        """The table with sqrt(alpha_bar) shifted and rescaled so that the last value is 0 (Lin et al. 2024, Alg. 1)."""
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return DiscreteVP(root**2, f"{self.name}, zero terminal snr")


_BETA_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The beta table of diffusers' schedulers (DDPMScheduler.__init__), recomputed in float64."""
    T = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(list(config["trained_betas"]), dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(start, end, T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        u = torch.arange(T + 1, dtype=torch.float64) / T
        bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp_max(0.999)
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64)) * (end - start) + start
    raise ValueError(
        f"beta_schedule is {kind!r}; allowed: linear, scaled_linear, squaredcos_cap_v2, sigmoid, or numbers in "
        "trained_betas"
    )


def schedule_from_diffusers(config: Mapping[str, Any]) -> Schedule:
    """The schedule of any diffusers scheduler config (a mapping with `beta_*`, EDM's `sigma_max` or flow's `shift`).

    Raises:
        ValueError: if the beta schedule is unknown.
    """
    name = str(config.get("_class_name", ""))
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        return Flow(float(config.get("flow_shift", config.get("shift", 1.0)) or 1.0))
    if name.startswith("EDM") or ("sigma_max" in config and "beta_start" not in config):
        return VE(float(config.get("sigma_max", 80.0)), float(config.get("rho", 7.0)))
    betas = _betas(config)
    fields = {k: config[k] for k in _BETA_FIELDS if config.get(k) is not None}
    table = DiscreteVP(torch.cumprod(1 - betas, 0), str(config.get("beta_schedule", "linear")), fields)
    if config.get("rescale_betas_zero_snr"):
        return DiscreteVP(table.zero_terminal().alphas_cumprod, table.name, fields)
    return table


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule that `Schedule.config` described.

    Raises:
        ValueError: if the kind is unknown.
    """
    kinds = {"cosine": CosineVP, "linear": LinearVP, "ve": VE, "flow": Flow}
    fields = {k: v for k, v in config.items() if k != "schedule"}
    kind = config.get("schedule")
    if kind in kinds:
        return kinds[kind](**fields)
    if kind == "diffusers":
        return schedule_from_diffusers(fields)
    if kind == "table":
        return DiscreteVP(_f64(fields["alphas_cumprod"]))
    raise ValueError(f"schedule is {kind!r}; allowed: {', '.join(kinds)}, diffusers, table")
