r"""Schedules of discrete-time models, and schedules from configs.

A model trained on T timesteps knows alpha_bar_n = prod_{k <= n} (1 - beta_k), n = 0 .. T - 1. `DiscreteVP` makes that
table a continuous schedule with alpha_bar_n at t = (n + 1) / T, recomputed in float64 from the config that made it,
because a float32 table has lost three digits of beta_tilde.

Sources: Ho et al. 2020 (linear), Nichol & Dhariwal 2021 (cosine), Rombach et al. 2022 (scaled linear), Lin et al. 2024
(zero terminal SNR); the betas are those of diffusers' DDPMScheduler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowvar.process.schedule import VE, CosineVP, Family, Flow, LinearVP, Schedule

__all__ = ["DiscreteVP", "schedule_from_config", "schedule_from_diffusers"]


def _f64(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _logit(p: Tensor) -> Tensor:
    return torch.log(p) - torch.log1p(-p)


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

    alphas_cumprod: Tensor = field(repr=False)
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
    "snr_shift_scale",
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

    `snr_shift_scale` s of the CogVideoX schedulers divides the snr by s, before a rescaling to zero terminal snr.

    Raises:
        ValueError: if the beta schedule is unknown, or a named scheduler's config describes none of the three.
    """
    name = str(config.get("_class_name", ""))
    if "FlowMatch" in name or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas"):
        shift = float(config.get("flow_shift", config.get("shift", 1.0)) or 1.0)
        return Flow(shift, float(config.get("num_train_timesteps") or 1000))
    if name.startswith("EDM") or ("sigma_max" in config and "beta_start" not in config):
        return VE(float(config.get("sigma_max", 80.0)), float(config.get("rho", 7.0)))
    if name and config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise ValueError("its config holds no table of betas; supported: beta_schedule or trained_betas, flows, EDM's")
    if config.get("timestep_type") == "continuous":
        raise ValueError(
            "timestep_type is 'continuous', which conditions the network on log(sigma) / 4; supported: discrete, and "
            "EDM's schedulers"
        )
    bar = torch.cumprod(1 - _betas(config), 0)
    fields = {k: config[k] for k in _BETA_FIELDS if config.get(k) is not None}
    s = float(config.get("snr_shift_scale") or 1.0)
    table = DiscreteVP(bar / (s + (1 - s) * bar), str(config.get("beta_schedule", "linear")), fields)
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
