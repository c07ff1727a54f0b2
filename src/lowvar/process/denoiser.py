r"""Denoisers: from a network's output to the posterior of x_0.

With x_t = alpha x_0 + sigma eps, a network that predicts ... has x0_hat =

    epsilon   the noise eps                              (x - sigma out) / alpha
    sample    x_0                                        out
    v         v = alpha eps - sigma x_0 (VP)             alpha x - sigma out          (Salimans & Ho 2022)
    flow      u = eps - x_0                              (x - sigma out) / (alpha + sigma)
    edm       F of Karras et al. 2022, Table 1           c_skip y + c_out F(c_in y),  y = x / alpha, s = sigma / alpha

and further output channels where it has a variance head: as many again (range, logvar, basis) or more (lowrank). What
they mean stands in `head`.

Means and variances are computed in float32 or wider, whatever the network's own precision.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lowvar.process.covariance import Covariance
from lowvar.process.head import HEADS, Head, Spectrum, covariance_of, expand, rank_of
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule

__all__ = [
    "CovarianceModel",
    "Denoiser",
    "Guided",
    "Head",
    "NetworkDenoiser",
    "Prediction",
    "WithCovariance",
    "from_prediction",
    "to_target",
]

Prediction = Literal["epsilon", "sample", "v_prediction", "flow", "edm"]
CovarianceModel = Callable[[Tensor, Level, Posterior], Covariance]


def from_prediction(kind: Prediction, x: Tensor, out: Tensor, level: Level, sigma_data: float = 0.5) -> Tensor:
    """x0_hat from a network's output, by the table of the module.

    Args:
        kind: what the network predicts.
        x: state x_t, (B, *event_shape).
        out: the network's output, same shape.
        level: noise level, scalar or (B,).
        sigma_data: standard deviation of the data, for `edm` only.

    Raises:
        ValueError: if `kind` is unknown.
    """
    alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
    if kind == "epsilon":
        return (x - sigma * out) / alpha
    if kind == "sample":
        return out
    if kind == "v_prediction":
        return alpha * x - sigma * out
    if kind == "flow":
        return (x - sigma * out) / (alpha + sigma)
    if kind == "edm":
        ratio2 = (sigma / alpha) ** 2
        total = ratio2 + sigma_data**2
        return sigma_data**2 / total * (x / alpha) + (sigma / alpha) * sigma_data / total**0.5 * out
    raise ValueError(f"prediction is {kind!r}; allowed: epsilon, sample, v_prediction, flow, edm")


def to_target(kind: Prediction, x0: Tensor, eps: Tensor, level: Level, sigma_data: float = 0.5) -> Tensor:
    """What the network should predict for clean data x0 and noise eps: the inverse of `from_prediction`.

    Raises:
        ValueError: if `kind` is unknown.
    """
    alpha, sigma = expand(level.alpha, x0), expand(level.sigma, x0)
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    if kind == "flow":
        return eps - x0
    if kind == "edm":
        ratio = sigma / alpha
        total = ratio**2 + sigma_data**2
        y = x0 + ratio * eps
        return (x0 - sigma_data**2 / total * y) * total**0.5 / (ratio * sigma_data)
    raise ValueError(f"prediction is {kind!r}; allowed: epsilon, sample, v_prediction, flow, edm")


class Denoiser(ABC):
    """A function (x_t, level) -> posterior of x_0, with the schedule it belongs to.

    Attributes:
        schedule: the schedule the levels come from.
        nfe: network evaluations one call costs.
    """

    schedule: Schedule
    nfe: int = 1

    @abstractmethod
    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """The posterior at states x (B, *event_shape) and a scalar or (B,) level."""


class NetworkDenoiser(Denoiser):
    """A network, and what its output means.

    Args:
        network: called as network(x, timestep, **conditioning) with timestep (B,) float32; returns a tensor, a tuple
            whose first entry is one, or an object with `.sample` (diffusers' UNet2DModel, UNet2DConditionModel, DiT).
        schedule: its noise schedule.
        prediction: what it predicts (see the module).
        head: its variance head, if it has one; the output then has the channels that `head` lists beside those of x.
        clip: bound b of data in [-b, b], or None for unbounded data such as latents.
        sigma_data: for `prediction="edm"`.
        conditioning: further keyword arguments of the network (class labels, prompt embeddings).
        spectrum: of the data in the head's basis, for `head="basis"`.

    Raises:
        ValueError: if prediction or head are unknown, v-prediction meets a schedule that is not VP, head and spectrum
            are not given together, or the output's channels do not fit.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> schedule = CosineVP()
        >>> denoiser = NetworkDenoiser(lambda x, t: torch.zeros_like(x), schedule, "sample")
        >>> denoiser(torch.ones(2, 3), schedule.at(0.5)).mean.abs().max().item()
        0.0
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: Schedule,
        prediction: Prediction = "epsilon",
        head: Head | None = None,
        clip: float | None = None,
        sigma_data: float = 0.5,
        conditioning: Mapping[str, Any] | None = None,
        spectrum: Spectrum | None = None,
    ) -> None:
        if prediction not in ("epsilon", "sample", "v_prediction", "flow", "edm"):
            raise ValueError(f"prediction is {prediction!r}; allowed: epsilon, sample, v_prediction, flow, edm")
        if head not in (None, *HEADS):
            raise ValueError(f"head is {head!r}; allowed: None, {', '.join(HEADS)}")
        if (head == "basis") != (spectrum is not None):
            raise ValueError(
                "head 'basis' needs the data's spectrum in its basis: give spectrum=Spectrum(basis, variance)"
                if head == "basis"
                else f"a spectrum belongs to head 'basis', and the head is {head!r}"
            )
        if prediction == "v_prediction" and schedule.family != "vp":
            raise ValueError(f"v-prediction is defined for variance-preserving schedules, not for {schedule.family!r}")
        self.network, self.schedule = network, schedule
        self.prediction: Prediction = prediction
        self.head: Head | None = head
        self.clip, self.sigma_data, self.conditioning = clip, sigma_data, dict(conditioning or {})
        self.spectrum = spectrum

    def raw(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
        """The network's prediction and its head's raw output (None without head), float32 or wider."""
        entry = x
        if self.prediction == "edm":
            ratio2 = (expand(level.sigma, x) / expand(level.alpha, x)) ** 2
            entry = x / expand(level.alpha, x) / (ratio2 + self.sigma_data**2) ** 0.5
        timestep = self.schedule.timestep(level.t).to(x.device, torch.float32).expand(x.shape[0])
        out = self.network(entry, timestep, **self.conditioning)
        out = out if isinstance(out, Tensor) else (out[0] if isinstance(out, tuple) else out.sample)
        out = out if out.dtype in (torch.float32, torch.float64) else out.float()
        C, found = x.shape[1], out.shape[1]
        if rank_of(self.head, C, found) is None or out.shape[2:] != x.shape[2:]:
            if self.head is None:
                raise ValueError(
                    f"the network returned shape {tuple(out.shape)} for states {tuple(x.shape)}; with more channels it "
                    f"has a variance head: name it (head={', '.join(map(repr, HEADS))})"
                )
            more = f" and {C} more for every direction" if self.head == "lowrank" else ""
            raise ValueError(f"head {self.head!r} needs {2 * C} output channels{more}, the network has {found}")
        return out[:, :C], None if self.head is None else out[:, C:]

    def interpret(self, x: Tensor, level: Level, out: Tensor, head: Tensor | None) -> Posterior:
        """The posterior that a prediction and a raw head output stand for."""
        mean = from_prediction(self.prediction, x, out, level, self.sigma_data)
        covariance = fraction = None
        if head is not None and self.head == "range":
            fraction = (head + 1) / 2
        elif head is not None and self.head is not None:
            covariance = covariance_of(self.head, head, level, x.shape[1], self.spectrum)
        posterior = Posterior(mean, covariance, fraction)
        return posterior if self.clip is None else posterior.clip(self.clip)

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        return self.interpret(x, level, *self.raw(x, level))


class Guided(Denoiser):
    """Classifier-free guidance: mean = uncond + scale (cond - uncond) (Ho & Salimans 2022).

    A guided mean is not a posterior mean, so neither branch's covariance is handed on: calibrate the guided denoiser.
    A learned-range fraction is the conditional branch's, as in DiT.

    Args:
        conditional, unconditional: denoisers of one schedule.
        scale: guidance scale; 1 is the conditional model.
        clip: bound of the guided mean, or None.
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, scale: float, clip: float | None = None) -> None:
        self.conditional, self.unconditional, self.scale, self.clip = conditional, unconditional, scale, clip
        self.schedule = conditional.schedule
        self.nfe = conditional.nfe + unconditional.nfe

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        c, u = self.conditional(x, level), self.unconditional(x, level)
        posterior = Posterior(u.mean + self.scale * (c.mean - u.mean), None, c.fraction)
        return posterior if self.clip is None else posterior.clip(self.clip)


class WithCovariance(Denoiser):
    """A denoiser with a covariance attached, such as a calibrated table.

    Args:
        denoiser: gives the mean.
        model: (x, level, posterior) -> covariance of x_0 given x_t.
        clip: bound b of the data: the covariance is limited as `Posterior.clip` does; None leaves it.
    """

    def __init__(self, denoiser: Denoiser, model: CovarianceModel, clip: float | None = None) -> None:
        self.denoiser, self.model, self.clip = denoiser, model, clip
        self.schedule, self.nfe = denoiser.schedule, denoiser.nfe

    def __call__(self, x: Tensor, level: Level) -> Posterior:
        """See the base class."""
        posterior = self.denoiser(x, level)
        posterior = Posterior(posterior.mean, self.model(x, level, posterior), posterior.fraction)
        return posterior if self.clip is None else posterior.clip(self.clip)
