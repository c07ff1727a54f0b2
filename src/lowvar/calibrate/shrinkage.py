r"""Empirical Bayes for tables: entries measured badly borrow from those measured well.

A table entry i is a variance v_i estimated from n images with relative standard error r_i; a pixel that is hardly ever
lit rests on a handful of them. With a reference shape q_i > 0 (the Gaussian twin's posterior variance, which knows
which entries are small), the model at one noise level is a random-effects one,

    y_i = log v_hat_i + r_i^2 / 2 - log q_i,      y_i | theta_i ~ N(theta_i, r_i^2),      theta_i ~ N(c, tau^2)

(r_i^2 / 2 undoes the bias of the logarithm). The scale c is the mean with weights w_i = 1 / (r_i^2 + tau^2), and tau^2
the root of sum_i w_i (y_i - c)^2 = d - 1, or 0 where there is none. Then theta_i | y_i has mean and variance

    m_i = (tau^2 y_i + r_i^2 c) / (r_i^2 + tau^2),     s_i^2 = r_i^2 tau^2 / (r_i^2 + tau^2),

and the entry of the table is the predictive variance E v_i = q_i exp(m_i + s_i^2 / 2). Without pooling (tau^2 -> inf)
it is v_hat (1 + r^2): residuals of new data, divided by v_hat itself, come out too large by E 1 / v_hat.

Biased towards the reference by design, never negative; where r_i is small nothing moves.

Sources: R. Paule, J. Mandel, "Consensus values and weighting factors", J. Res. NBS 87, 1982 (the estimate of tau^2); B.
Efron, "Large-Scale Inference", Cambridge 2010, ch. 1 (empirical Bayes).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RELATIVE_FLOOR", "shrink"]

RELATIVE_FLOOR = 1e-3
"""An entry cannot be told from 0: it, and its reference, are at least this share of the mean over entries."""

_ITERATIONS = 50


def _scatter(y: Tensor, r2: Tensor) -> tuple[Tensor, Tensor]:
    """c and tau^2, each (n, 1), for rows y (n, d) with variances r2: Paule & Mandel's equation by its fixed point."""
    d = y.shape[1]
    spread = (y - y.mean(1, keepdim=True)) ** 2
    tau2 = spread.mean(1, keepdim=True) + 1e-12
    c = y.mean(1, keepdim=True)
    for _ in range(_ITERATIONS):
        w = 1 / (r2 + tau2)
        c = (w * y).sum(1, keepdim=True) / w.sum(1, keepdim=True)
        tau2 = (tau2 * (w * (y - c) ** 2).sum(1, keepdim=True) / max(d - 1, 1)).clamp_min(1e-12)
    return c, tau2


def shrink(variance: Tensor, se: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Predictive variances and their standard errors, level by level.

    Args:
        variance: v_hat, (n, *entries) >= 0: n noise levels.
        se: its standard errors, same shape.
        reference: q, same shape or broadcast to it, >= 0; only its shape matters, not its scale.

    Returns:
        The table's variances, positive wherever a level's mean is, and their standard deviations given the data.

    Example:
        >>> v, se = shrink(torch.tensor([[1.0, 1.2, 2.0]]), torch.tensor([[0.01, 0.01, 2.0]]), torch.ones(1, 3))
        >>> [round(x, 2) for x in v[0].tolist()]  # the third knows little, and follows the others
        [1.0, 1.2, 1.14]
    """
    rows, errors = variance.double().flatten(1), se.double().flatten(1)
    q = reference.double().expand(variance.shape).flatten(1)
    mean = rows.mean(1, keepdim=True).clamp_min(1e-300)
    rows = torch.maximum(rows, RELATIVE_FLOOR * mean)
    q = torch.maximum(q, RELATIVE_FLOOR * q.mean(1, keepdim=True)).clamp_min(1e-300)
    r2 = (errors / rows) ** 2
    y = torch.log(rows) + r2 / 2 - torch.log(q)
    c, tau2 = _scatter(y, r2)
    m = (tau2 * y + r2 * c) / (r2 + tau2)
    s2 = r2 * tau2 / (r2 + tau2)
    predictive = q * torch.exp(m + s2 / 2)
    return predictive.reshape(variance.shape), (predictive * s2.sqrt()).reshape(variance.shape)
