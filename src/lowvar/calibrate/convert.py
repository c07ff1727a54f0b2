r"""C from a learned-range head (Nichol & Dhariwal 2021), where the head can know it.

A network trained on T steps says log var = f log beta + (1 - f) log beta_tilde of its step t -> s = t - 1/T. As a
reverse kernel var = lambda^2 + kappa^2 C with lambda^2 = beta_tilde and kappa^2 / lambda^2 = snr_s - snr_t = delta, so

    C = (e^{f L} - 1) / delta,     L = log(beta / beta_tilde) = log(sigma_t^2 / sigma_s^2).

How much of it is noise? With D = log(1 + delta v), v the calibrated table, C = v means f L = D: D is all that the
covariance moves the head's log variance by. It is tiny in mid-trajectory (beta / beta_tilde - 1 = .006 at t = 250 of
1000, linear): the training loss hardly sees it, and an error e of f L is an error e / D of log C. The head is
informative at a level where, over calibration data,

    noise(logsnr) = rms(f L - D) / D <= 1        (its own spread and error, in units of what C accounts for)

and where, at that level, the Gaussian likelihood of held-out residuals under the converted C exceeds the table's by
more than a standard error. Elsewhere, and in between by linear interpolation of log C, the table is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowvar.calibrate.claims import Claims
from lowvar.calibrate.estimator import EVERYWHERE, LIMIT, Trust
from lowvar.calibrate.table import CovarianceTable
from lowvar.process.covariance import Covariance, Diagonal, wide
from lowvar.process.denoiser import Denoiser, expand
from lowvar.process.discrete import DiscreteVP
from lowvar.process.noise import NoiseSource
from lowvar.process.posterior import Posterior
from lowvar.process.schedule import Level, Schedule

__all__ = ["ConvertReport", "Converted", "convert"]


@dataclass(frozen=True, eq=False)
class Converted:
    """The covariance model; a posterior without a fraction is refused.

    Attributes:
        table: the pixel table it falls back to.
        logsnr: knots of delta and L, (n,).
        delta, span: delta and L at the knots, (n,).
        trust: 1 where the head is informative.
    """

    name: ClassVar[str] = "convert"
    declares: ClassVar[Claims] = Claims(
        "Nichol & Dhariwal 2021, inverted",
        "network",
        "the diagonal of E[(x0 - x0_hat)(x0 - x0_hat)^T | x_t], where the head was trained to its optimum",
        "the head's own, times 1 / log(1 + delta C); the table where that is too much",
    )
    table: CovarianceTable
    logsnr: Tensor
    delta: Tensor
    span: Tensor
    trust: Trust = EVERYWHERE

    def _at(self, values: Tensor, logsnr: Tensor) -> Tensor:
        """Positive values at logsnr, log-linear between knots."""
        knots, logs = self.logsnr.to(logsnr.device), values.to(logsnr.device).log()
        x = logsnr.clamp(knots[0], knots[-1])
        j = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
        w = (x - knots[j - 1]) / (knots[j] - knots[j - 1])
        return torch.lerp(logs[j - 1], logs[j], w).exp()

    def variance(self, fraction: Tensor, logsnr: Tensor) -> Tensor:
        """C of a fraction, without the table: the formula, which is negative for f < 0."""
        delta, span = (self._at(v, logsnr) for v in (self.delta, self.span))
        return torch.expm1(wide(fraction) * expand(span, fraction)) / expand(delta, fraction)

    def __call__(self, x: Tensor, level: Level, posterior: Posterior) -> Covariance:
        """C at states x; float32 or wider, never negative.

        Raises:
            ValueError: if the posterior has no fraction.
        """
        if posterior.fraction is None:
            raise ValueError("covariance convert reads a learned-range head, and this posterior has no fraction")
        logsnr = level.logsnr.to(x.device)
        variance = self.table.at(logsnr).to(wide(x))
        variance = variance if logsnr.ndim else variance[None]
        trust = expand(self.trust.factor_at(logsnr), variance)
        ratio = self.variance(posterior.fraction, logsnr).to(variance) / variance
        h = ratio.clamp_min(torch.finfo(ratio.dtype).tiny).log().clamp(-LIMIT, LIMIT)
        return Diagonal(variance * torch.exp(trust * h))

    def to_json(self) -> dict[str, Any]:
        """Numbers as lists."""
        return {
            "logsnr": self.logsnr.tolist(),
            "delta": self.delta.tolist(),
            "span": self.span.tolist(),
            "trust": self.trust.to_json(),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], table: CovarianceTable) -> Converted:
        """The model that `to_json` described, around a pixel table."""
        logsnr, delta, span = (torch.tensor(fields[k], dtype=torch.float64) for k in ("logsnr", "delta", "span"))
        return cls(table, logsnr, delta, span, Trust.from_json(fields["trust"]))


@dataclass(frozen=True)
class ConvertReport:
    """Where the head is informative.

    Attributes:
        logsnr: levels, (n,).
        noise: rms(f L - D) / D, (n,).
        gain, gain_se: Gaussian log likelihood over the table's, nats a dimension, (n,).
        informative: (n,) bool.
    """

    logsnr: Tensor
    noise: Tensor
    gain: Tensor
    gain_se: Tensor
    informative: Tensor

    def __str__(self) -> str:
        """One sentence."""
        if not bool(self.informative.any()):
            return "the learned-range head says nothing the table does not know: the table is kept at every logsnr"
        levels = ", ".join(f"{v:.1f}" for v in self.logsnr[self.informative].tolist())
        return f"the learned-range head is informative at logsnr {levels}; elsewhere the table is kept"


def _steps(schedule: Schedule, logsnr: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """delta and L of the training step at levels."""
    t = schedule.level(logsnr)
    first = schedule.at(torch.tensor(1.0 / steps, dtype=torch.float64)).t
    s = schedule.at((t.t - 1.0 / steps).clamp_min(float(first) / 2))  # the first step ends at clean data: half of it
    delta = torch.exp(t.logsnr) * torch.expm1(s.logsnr - t.logsnr)
    return delta, 2 * (t.sigma.log() - s.sigma.log())


@torch.no_grad()
def convert(
    denoiser: Denoiser,
    table: CovarianceTable,
    images: Tensor,
    noise: NoiseSource,
    *,
    steps: int = 1000,
    knots: int = 25,
    replicates: int = 2,
    chunk: int = 256,
) -> tuple[Converted, ConvertReport]:
    """Converts a learned-range head and measures where it may be used; knots x replicates evaluations an image.

    Args:
        denoiser: its posteriors have a fraction.
        table: calibrated pixel table.
        images: (n, *event_shape) that neither the network nor, best, the table has seen.
        noise: of x_t.
        steps: T the head was trained with, for a continuous schedule; a table of steps has its own.
        knots, replicates: levels, and noises an image and level.
        chunk: images the network sees at once.

    Raises:
        ValueError: if the table is not of pixels or the denoiser has no learned-range head.
    """
    if table.structure != "pixel":
        raise ValueError(f"a learned-range head has a variance a pixel; the table is of {table.structure!r}")
    schedule = denoiser.schedule
    steps = schedule.steps if isinstance(schedule, DiscreteVP) else steps
    logsnr = torch.linspace(float(table.logsnr[0]), float(table.logsnr[-1]), knots, dtype=torch.float64)
    delta, span = _steps(schedule, logsnr, steps)
    model = Converted(table, logsnr, delta, span)
    error, gain, gain_se = (torch.zeros(knots, dtype=torch.float64) for _ in range(3))
    for k, level in enumerate(schedule.level(logsnr).t):
        at = schedule.at(level)
        differences, gains = [], []
        for a in range(0, len(images), chunk):
            x0 = images[a : a + chunk]
            better = torch.zeros(len(x0), dtype=torch.float64)
            for r in range(replicates):
                index = range(a, a + len(x0))
                eps = noise.normal(index, x0.shape[1:], draw=k * replicates + r, dtype=x0.dtype, device=x0.device)
                x = expand(at.alpha, x0) * x0 + expand(at.sigma, x0) * eps
                posterior = denoiser(x, at)
                C, V = model(x, at, posterior), table(x, at, posterior)
                assert posterior.fraction is not None  # the model refuses it
                known = torch.log1p(delta[k] * table.at(at.logsnr)).to(x)
                differences.append(((posterior.fraction * span[k].to(x) - known) / known).double() ** 2)
                residual = x0 - posterior.mean
                d = x0[0].numel()
                value = [-(c.logdet() + c.inverse_quadratic(residual)) / (2 * d) for c in (C, V)]
                better += (value[0] - value[1]).double().cpu() / replicates
            gains.append(better)
        an_image = torch.cat(gains)
        error[k] = torch.cat(differences).mean().sqrt().cpu()
        gain[k], gain_se[k] = an_image.mean(), an_image.std() / len(an_image) ** 0.5
    informative = (error <= 1) & (gain > gain_se)
    trust = Trust(tuple(logsnr.tolist()), tuple(informative.double().tolist()))
    return Converted(table, logsnr, delta, span, trust), ConvertReport(logsnr, error, gain, gain_se, informative)
