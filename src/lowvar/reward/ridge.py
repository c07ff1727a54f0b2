r"""Ridge regression, weighted and cross-fitted: what predicts a run's reward without having seen it.

    y_i ~ c_0 + c . z_i,     min sum_i w_i (y_i - c_0 - c . z_i)^2 + ridge |c|^2,     weights of mean 1,

z the features in standard units of the fitting set. `ridge` is a number of runs that say c = 0; None chooses it from
1e-4 .. 1e3 by generalised cross-validation, min n RSS / (n - tr H)^2. With more features than runs the dual system is
solved. The prediction of a run in fold f comes from the other folds, so it is independent of that run's noise given its
features: as a baseline it costs no bias.

Source: G. Golub, M. Heath, G. Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
1979.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ridge", "cross_fitted", "fold_numbers", "spread_folds"]


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted regression: `coefficient` (p,) and `intercept` in the features' own units, float64."""

    coefficient: Tensor
    intercept: Tensor

    @classmethod
    def fit(cls, features: Tensor, y: Tensor, weights: Tensor | None = None, ridge: float | None = None) -> Ridge:
        """Fits.

        Args:
            features: (n, p).
            y: (n,).
            weights: (n,) >= 0; None: equal.
            ridge: >= 0; None: by generalised cross-validation.

        Raises:
            ValueError: if the ridge is negative or nothing has weight.

        Example:
            >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
            >>> fit = Ridge.fit(x, 2 * x[:, 0] + 1, ridge=0.0)
            >>> round(float(fit(torch.tensor([[3.0]]))), 6)
            7.0
        """
        if ridge is not None and ridge < 0:
            raise ValueError(f"ridge is {ridge}; give a number of runs, 0 or more")
        x, y = features.detach().double(), y.detach().double()
        n, p = x.shape
        w = torch.ones_like(y) if weights is None else weights.detach().double()
        total = w.sum()
        if not n or not float(total) > 0:
            raise ValueError(f"{n} runs of total weight {float(total)}; a fit needs at least one run with weight")
        w = w * (n / total)
        centre, mean = w @ x / n, w @ y / n
        spread = (w @ (x - centre).square() / n).sqrt()
        usable = spread > 1e-7 * (1 + centre.abs())  # else it does not vary
        scale = torch.where(usable, 1 / torch.where(usable, spread, 1.0), 0.0)
        root = w.sqrt()[:, None]
        Z, t = root * (x - centre) * scale, root[:, 0] * (y - mean)
        primal = p <= n
        s, V = torch.linalg.eigh(Z.T @ Z if primal else Z @ Z.T)
        s = s.clamp_min(0)
        b = V.T @ (Z.T @ t if primal else t)
        if ridge is None:
            explained = b.square() / s.clamp_min(1e-10 * n) if primal else b.square()  # (u . t)^2
            ridge = _gcv(s, explained, float(t.square().sum()), n)
        c = V @ (b / (s + ridge + 1e-10 * n))  # the last term: a ridge of 0 with collinear features
        c = (c if primal else Z.T @ c) * scale
        return cls(c, mean - c @ centre)

    def __call__(self, features: Tensor) -> Tensor:
        """Predictions (n,) at features (n, p), with their graph."""
        return features @ self.coefficient.to(features) + self.intercept.to(features)


def _gcv(s: Tensor, explained: Tensor, total: float, n: int) -> float:
    """The ridge of least n RSS / (n - tr H)^2, from eigenvalues s and the squared components of t."""
    best, least = 1e3, float("inf")
    for exponent in range(-4, 4):
        ridge = 10.0**exponent
        kept = s / (s + ridge)
        rss = max(total - float(explained.sum()), 0.0) + float(((1 - kept).square() * explained).sum())
        free = n - 1 - float(kept.sum())
        score = n * rss / free**2 if free > 0 else float("inf")
        if score < least * (1 - 1e-9):
            best, least = ridge, score
    return best


def fold_numbers(n: int, folds: int, groups: Tensor | None = None) -> Tensor:
    """The fold of each run, (n,): contiguous, as equal as can be; whole groups stay together where `groups` is given.

    Raises:
        ValueError: if there are fewer than 2 folds or more folds than runs (or groups).
    """
    place = torch.arange(n) if groups is None else groups.unique(return_inverse=True)[1].cpu()
    count = int(place.max()) + 1 if n else 0
    if not 2 <= folds <= count:
        raise ValueError(f"{folds} folds of {count} independent parts; give at least 2 folds, at most {count}")
    return place * folds // count


def spread_folds(groups: Tensor, folds: int, streams: Tensor | None = None) -> Tensor:
    """The fold of each run, (n,): every group in as many folds as can be, so that no fit lacks one.

    Args:
        groups: number of each run's group, (n,).
        folds: their number.
        streams: runs of equal number stay together, (n,); None: none do.

    Raises:
        ValueError: if there are fewer than 2 folds or more folds than runs (or streams).

    Example:
        >>> spread_folds(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 4).tolist()
        [0, 1, 2, 3, 0, 1, 2, 3]
    """
    groups = groups.cpu()
    n = len(groups)
    place = torch.arange(n) if streams is None else streams.cpu().unique(return_inverse=True)[1]
    count = int(place.max()) + 1 if n else 0
    fold_numbers(count, folds)  # its check
    of_stream = groups.new_zeros(count).scatter_(0, place, groups)
    fold = torch.empty(count, dtype=torch.int64)
    fold[of_stream.argsort(stable=True)] = torch.arange(count) % folds
    return fold[place]


def cross_fitted(
    features: Tensor, y: Tensor, fold: Tensor, weights: Tensor | None = None, ridge: float | None = None
) -> list[Ridge]:
    """One regression a fold, fitted to the runs of the other folds.

    Args:
        features: (n, p).
        y: (n,).
        fold: number of each run's fold, (n,), 0 up.
        weights, ridge: as of `Ridge.fit`.
    """
    fits = []
    for f in range(int(fold.max()) + 1):
        others = (fold != f).to(features.device)
        fits.append(Ridge.fit(features[others], y[others], None if weights is None else weights[others], ridge))
    return fits
