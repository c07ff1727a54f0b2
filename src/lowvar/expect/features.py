r"""Regression on features of the noise whose means are known: control variates without any twin sample.

Along the leading directions i of the shadow's noise, u_i = W_i / |F_i| is standard normal (`lowvar.expect.shadow`), so

    u_i,    u_i^2 - 1    (i < r),     sum_i |F_i|^2 (u_i^2 - 1) / norm       have mean 0 exactly,

and f is regressed on them (`lowvar.expect.sums`). They catch what is linear or quadratic in the sample's start: a norm,
where the twin's own value adds little. Each costs a degree of freedom, so there are few.

**Not chosen by default.** Squares have leverage: a few units with large u_i decide both the coefficients and the
residual, and the interval of 256 units covered 92% where the remainder was cubic. The design declares it.

Without a shadow the u_i are coordinates of the start's noise, of lowest frequency first.

Source: Glynn & Szechtman 2002; Oates, Girolami & Chopin 2017 (the general form).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvar.expect.shadow import Shadow
from lowvar.expect.sobol import bridge_of
from lowvar.process.noise import NoiseSource

__all__ = ["LEADING", "LEVERAGE", "noise_features", "shadow_features"]

LEADING = 4
LEVERAGE = "regression on squares of the noise has few units of large leverage: at 256 units it covered 92%"


def _features(u: Tensor, weight: Tensor) -> Tensor:
    order = torch.argsort(weight, descending=True, stable=True)[:LEADING]
    lead = u[:, order]
    whole = ((u**2 - 1) @ weight) / math.sqrt(2 * float((weight**2).sum()))
    parts = [lead, lead**2 - 1]
    if u.shape[1] > LEADING:
        parts.append(whole[:, None])
    return torch.cat(parts, 1)


def shadow_features(shadow: Shadow, coefficients: Tensor) -> Tensor:
    """The features of a shadow's coefficients (n, *event_shape), (n, q) float64, each of mean 0.

    Example:
        >>> from lowvar.process.basis import PixelBasis
        >>> shadow = Shadow(torch.zeros(2), PixelBasis((2,)), torch.tensor([[1.0, 2.0]]))
        >>> shadow_features(shadow, torch.tensor([[1.0, 4.0]])).tolist()
        [[2.0, 1.0, 3.0, 0.0]]
    """
    std = shadow.std.flatten().double().to(coefficients.device)
    live = std > 0
    u = coefficients.flatten(1).double() / torch.where(live, std, torch.ones_like(std))
    return _features(u[:, live], std[live] ** 2)


def noise_features(shape: torch.Size, index: Tensor, noise: NoiseSource) -> Tensor:
    """The features of the start's noise, (n, q) float64.

    Example:
        >>> from lowvar.process import Independent
        >>> noise_features(torch.Size((6,)), torch.arange(5), Independent(0)).shape
        torch.Size([5, 9])
    """
    bridge = bridge_of(shape, 0, None, LEADING)
    z = bridge.basis.forward(noise.normal(index, tuple(shape), draw=0, dtype=torch.float64)).flatten(1)
    weight = torch.ones(z.shape[1], dtype=torch.float64)
    weight[bridge.direction] = 1 + 1e-9 * torch.arange(len(bridge.direction), 0, -1, dtype=torch.float64)
    return _features(z, weight)
