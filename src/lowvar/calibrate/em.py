r"""EM for a mixture of Gaussian scale mixtures, diagonal, with shrinkage inside the iteration.

Rows w in R^d (whitened), K components of one mean and one shape each, at J scales g_j that all of them share,

    p(w) = sum_k sum_j pi_kj N(w; m_k, g_j^2 diag(psi_k)).

Images of one kind differ in contrast: scales say so without further means and variances (Wainwright & Simoncelli
2000). J = 1, g = 1 is the plain mixture. A component of 30 rows knows 30 squares a direction, so what is maximised is
the likelihood with a penalty,

    L(theta) = sum_n log p(w_n)  -  a / 2 sum_k sum_i D(s_k q_i, psi_ki),      D(x, y) = x / y - log(x / y) - 1 >= 0,

which is what a further rows say whose variances have the shape q of all components, at the component's own scale s_k (a
plain mean over components would drown the smooth half of photographic patches, which has a hundredth of the mean
variance). With responsibilities p_nkj, n_k = sum_nj p_nkj and h_nk = sum_j p_nkj / g_j^2, an iteration is

    m_k = sum_n h_nk w_n / sum_n h_nk,    S_k = sum_n h_nk (w_n - m_k)^2 / n_k,    pi_kj = n_kj / sum_n 1,
    q = sum_k n_k S_k / s_k / sum_n 1,    s_k = mean_i S_ki / q_i                                    (by fixed point),
    psi_k = (n_k S_k + a s_k q) / (n_k + a),      at least FLOOR.

Given s and q, L never falls; they are moments, set anew each time (empirical Bayes), and with a = 0 the likelihood
itself never falls. One component is not shrunk, s q being S: it has the mean and the variances of the rows exactly. The
quadratic form sum_i (w_i - m_i)^2 / psi_i serves all scales: they cost nothing. An iteration is four products of (n, d)
and (d, K) matrices.

Sources: A. Dempster, N. Laird, D. Rubin, "Maximum likelihood from incomplete data via the EM algorithm", 1977; C.
Fraley, A. Raftery, "Bayesian regularization for normal mixture estimation", J. Classification 2007 (a conjugate prior
inside EM); M. Wainwright, E. Simoncelli, "Scale mixtures of Gaussians and the statistics of natural images", 2000.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.noise import Independent

__all__ = ["FLOOR", "Components", "em"]

FLOOR = 1e-4
"""Least variance psi, in units of the rows' own (rows are whitened)."""

_BLOCK = 4096
_START = 0.7  # of a row: where a component begins
_ROUNDS = 5  # of s and q


@dataclass(frozen=True, eq=False)
class Components:
    """A mixture of scale mixtures.

    Attributes:
        weight: pi, (K, J).
        mean: m, (K, d).
        variance: psi, (K, d).
        squares: g^2, (J,).
        target: s_k q, what the variances were shrunk to, (K, d).
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor
    squares: Tensor
    target: Tensor

    def log_joint(self, rows: Tensor) -> Tensor:
        """log pi_kj N(w_n; m_k, g_j^2 psi_k) without the constant -d/2 log 2 pi, (n, K, J)."""
        d, inverse = self.mean.shape[1], 1 / self.variance
        square = (self.mean**2 * inverse).sum(1) - 2 * rows @ (self.mean * inverse).T + rows**2 @ inverse.T
        constant = self.weight.log() - 0.5 * (self.variance.log().sum(1)[:, None] + d * self.squares.log())
        return constant - 0.5 * square[:, :, None] / self.squares

    def responsibilities(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """n_kj (K, J), and h_nk (n, K)."""
        count, parts = torch.zeros_like(self.weight), []
        for part in rows.split(_BLOCK):
            joint = self.log_joint(part)
            p = torch.softmax(joint.flatten(1), 1).reshape(joint.shape)
            count += p.sum(0)
            parts.append(p @ (1 / self.squares))
        return count, torch.cat(parts)

    def objective(self, rows: Tensor, a: float, target: Tensor | None = None) -> float:
        """L(theta) without the constant of the likelihood, for another target if one is given."""
        ratio = (self.target if target is None else target) / self.variance
        likelihood = sum(torch.logsumexp(self.log_joint(x).flatten(1), 1).double().sum() for x in rows.split(_BLOCK))
        return float(likelihood) - (a / 2 * float((ratio - ratio.log() - 1).double().sum()) if a else 0.0)

    def maximised(self, rows: Tensor, count: Tensor, h: Tensor, a: float) -> Components:
        """The next mixture, for rows of this many directions or of more."""
        total, n = h.sum(0)[:, None].clamp_min(1e-30), count.sum(1)[:, None].clamp_min(1e-30)
        mean = h.T @ rows / total
        second = ((h.T @ rows**2 - total * mean**2) / n).clamp_min(0)
        target = _target(n / n.sum(), second)
        variance = ((n * second + a * target) / (n + a)).clamp_min(FLOOR)
        return Components(count / count.sum(), mean, variance, self.squares, target)


def _target(weight: Tensor, second: Tensor) -> Tensor:
    """s_k q, (K, d)."""
    scale, shape = torch.ones_like(weight), second[0]
    for _ in range(_ROUNDS):
        shape = (weight * second / scale).sum(0).clamp_min(1e-30)
        scale = (second / shape).mean(1, keepdim=True).clamp_min(FLOOR)
    return scale * shape


def _begun(rows: Tensor, K: int, squares: Tensor, seed: int) -> Components:
    """K rows drawn without replacement, each with its own scale."""
    order = torch.argsort(Independent(seed).uniform(range(len(rows)), (), dtype=torch.float64))[:K]
    picked = rows[order.to(rows.device)]
    scale = (picked**2).mean(1).clamp_min(FLOOR) if K > 1 else torch.ones_like(picked[:, 0])
    variance = scale[:, None] * torch.ones_like(picked)
    weight = torch.full((K, len(squares)), 1 / (K * len(squares))).to(rows)
    return Components(weight, _START * picked, variance, squares, variance)


def em(
    rows: Tensor,
    K: int,
    squares: Sequence[float] = (1.0,),
    *,
    directions: int | None = None,
    a: float = 10.0,
    iterations: int = 20,
    seed: int = 0,
) -> Iterator[Components]:
    """The mixture after each iteration.

    Args:
        rows: whitened rows, (n, d), of the dtype that the iteration is to have; the leading direction first.
        K: components.
        squares: g^2.
        directions: how many leading directions say who belongs where. The others' means and variances follow in the
            last iteration; before it components have the leading ones only.
        a: rows that the penalty stands for.
        iterations: number of them.
        seed: of the start.

    Raises:
        ValueError: if K is not within 1 .. n, or there are no iterations.

    Example:
        >>> rows = Independent(0).normal(range(500), (3,), dtype=torch.float64)
        >>> *_, last = em(rows, 1)
        >>> torch.allclose(last.variance[0], rows.var(0, correction=0))
        True
    """
    if not 1 <= K <= len(rows) or iterations < 1:
        raise ValueError(f"K is {K} for {len(rows)} rows, {iterations} iterations; give 1 .. rows, and at least 1")
    seen = rows if directions is None else rows[:, :directions]
    now = _begun(seen, K, torch.tensor(tuple(squares)).to(rows), seed)
    for k in range(iterations):
        count, h = now.responsibilities(seen)
        now = now.maximised(rows if k + 1 == iterations else seen, count, h, a)
        yield now
