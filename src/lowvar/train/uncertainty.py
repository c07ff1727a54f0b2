r"""Uncertainty weighting, and the curve of every weighting.

Karras et al. 2024 (EDM2, Sec. 2.2 and Eq. 14, 15), after Kendall et al. 2018, divide the loss at each noise level by
what the network is seen to reach there. A small network u of the level alone is trained with the network,

    loss = w(logsnr) err e^-u(logsnr) + u(logsnr),         at the best u:   e^u = E[w err | logsnr],

so that every level contributes a loss of 1. u is linear in random Fourier features of logsnr,

    u = b + sum_k a_k 2^1/2 cos(f_k logsnr / 8 + phi_k),      f_k ~ N(0, 1), phi_k ~ U(0, 2 pi), fixed by a seed,

and starts at 0, where the loss is the base weighting's. For the network's gradient u is a weight, w e^-u, that moves
during training. Label: changes the objective. u is not used after training; its parameters are its state (a module's
`state_dict`), to be kept in checkpoints and given to the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowvar.process.denoiser import Prediction
from lowvar.process.noise import Independent
from lowvar.train.edm import EDM
from lowvar.train.minsnr import MinSNR
from lowvar.train.objectives import Label, Simple, Weighting
from lowvar.train.p2 import P2

__all__ = ["Uncertainty", "WeightingCurve", "weighting_curves"]

_BOUND = 30.0  # logsnr is read within +-30: pure noise has -inf


class Uncertainty(nn.Module):
    """u(logsnr), learned.

    Args:
        features: number of Fourier features.
        seed: of frequencies and phases.

    Raises:
        ValueError: if there is no feature.

    Example:
        >>> weigh = Uncertainty()
        >>> weigh(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])).tolist()  # as it starts: unchanged
        [2.0, 3.0]
    """

    label: ClassVar[Label] = "changes the objective"

    def __init__(self, features: int = 64, seed: int = 0) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features is {features}; give at least 1")
        source = Independent(seed)
        self.register_buffer("frequency", source.normal(range(features), (), draw=0) / 8)
        self.register_buffer("phase", source.uniform(range(features), (), draw=1) * (2 * math.pi))
        self.amplitude = nn.Parameter(torch.zeros(features))
        self.offset = nn.Parameter(torch.zeros(()))

    def log_uncertainty(self, logsnr: Tensor) -> Tensor:
        """u at logsnr (any shape), float32."""
        frequency, phase = self.get_buffer("frequency"), self.get_buffer("phase")
        x = logsnr.to(frequency).clamp(-_BOUND, _BOUND)[..., None]
        basis = math.sqrt(2) * torch.cos(frequency * x + phase)
        return self.offset + basis @ self.amplitude / math.sqrt(len(self.amplitude))

    def forward(self, loss: Tensor, logsnr: Tensor) -> Tensor:
        """loss e^-u + u, of losses (n,) at logsnr (n,)."""
        u = self.log_uncertainty(logsnr)
        return loss * torch.exp(-u) + u

    def weight(self, logsnr: Tensor) -> Tensor:
        """e^-u, what the network's gradient is multiplied by; without gradient."""
        with torch.no_grad():
            return torch.exp(-self.log_uncertainty(logsnr))


@dataclass(frozen=True)
class WeightingCurve:
    """A weighting over noise levels.

    Attributes:
        name: as in the settings.
        label: what it does to the objective.
        logsnr: levels, increasing, (n,) float64.
        weight: w on ||x_0 - x0_hat||^2, (n,) float64.
        relative: w over the plain weighting of the same prediction, scaled to mean 1 over the levels: what the
            weighting changes.
    """

    name: str
    label: Label
    logsnr: Tensor
    weight: Tensor
    relative: Tensor


def weighting_curves(
    prediction: Prediction,
    logsnr: Tensor | None = None,
    *,
    weightings: Mapping[str, Weighting] | None = None,
    uncertainty: Uncertainty | None = None,
    sigma_data: float = 0.5,
) -> list[WeightingCurve]:
    """The curve of every weighting, for a table or a figure.

    Args:
        prediction: what the network predicts; `simple` depends on it.
        logsnr: levels, (n,); default: 121 from -15 to 15.
        weightings: by name; default: simple, min-snr, p2 and edm as `lowvar train` has them.
        uncertainty: a trained one, added as `uncertainty` on the plain loss.
        sigma_data: of the `edm` prediction.

    Raises:
        ValueError: if the levels are not finite.

    Example:
        >>> [(c.name, c.label) for c in weighting_curves("epsilon")][:2]
        [('simple', 'unbiased'), ('min-snr', 'changes the objective')]
    """
    levels = torch.linspace(-15, 15, 121, dtype=torch.float64) if logsnr is None else logsnr.double().sort().values
    if not bool(torch.isfinite(levels).all()):
        raise ValueError("a level's logsnr is not finite; give levels between the schedule's ends, such as -15 to 15")
    if weightings is None:
        weightings = {"simple": Simple(), "min-snr": MinSNR(), "p2": P2(), "edm": EDM(sigma_data)}
    plain = Simple().log_weight(levels, prediction, sigma_data)
    found: list[tuple[str, Label, Tensor]] = [
        (name, w.label, w.log_weight(levels, prediction, sigma_data)) for name, w in weightings.items()
    ]
    if uncertainty is not None:
        u = uncertainty.log_uncertainty(levels).detach().double()
        found.append(("uncertainty", uncertainty.label, plain - u))
    curves = []
    for name, label, log_w in found:
        ratio = torch.exp(log_w - plain)
        mean = ratio.mean()
        curves.append(WeightingCurve(name, label, levels, log_w.exp(), ratio / mean if float(mean) > 0 else ratio))
    return curves
