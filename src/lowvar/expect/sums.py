r"""Sums of an estimator's units by fold: all that a mean, its control variates, its interval and a resumed run need.

A unit i is what is independent: a sample, an antithetic pair, a scrambled net. It brings f_i (the statistic's mean over
the unit) and controls h_i whose mean mu is known. With units in J folds,

    r_i = f_i - beta_(-j) . (h_i - mu),      beta_(-j) = Cov(h)^+ Cov(h, f) of all folds but i's own fold j,

so beta never sees the unit it corrects: E mean(r) = E f exactly at any n (cross-fitting), and the spread of the r_i is
measured out of sample, so that a useless control shows as variance and is not hidden by the fit. Everything is a
function of count, f, f^2, h, h h^T and f h by fold, taken about the first batch's means: no sample is kept, runs on
several machines add, and a constant r has variance 0 to rounding.

mu may itself be a mean of N units with variance Var(mu^); then Var = Var(r) / n + beta^T Var(mu^) beta.

Sources: Glynn & Szechtman 2002 (control variates); Chernozhukov et al. 2018 (cross-fitting).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["FOLDS", "Fit", "Sums", "effective_freedom", "fit", "log_error"]

FOLDS = 16


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over units, by fold; D numbers a statistic, q controls of its own each (Dc = D) or shared (Dc = 1).

    Attributes:
        shift: what f is taken about, (D,); h about `shift_h` (Dc, q).
        n: units, (J,).
        cc: sums of h^2 over single samples, (J, Dc, q): the scale on which a unit's h counts as constant.
        f, ff: sums of f and f^2, (J, D).
        h, hh, fh: sums of h (J, Dc, q), h h^T (J, Dc, q, q), f h (J, D, q).
        m: single samples, (J,); s, ss: their sums of f and f^2, (J, D).
    """

    shift: Tensor
    shift_h: Tensor
    n: Tensor
    f: Tensor
    ff: Tensor
    h: Tensor
    hh: Tensor
    fh: Tensor
    cc: Tensor
    m: Tensor
    s: Tensor
    ss: Tensor

    @classmethod
    def of(cls, samples: Tensor, controls: Tensor | None, numbers: Tensor, size: int = 1) -> Sums:
        """Sums of a batch of units of `size` consecutive samples.

        Args:
            samples: f of single samples, (n size, D).
            controls: h of single samples, (n size, Dc, q), or None.
            numbers: the units' numbers (n,); unit u is in fold u mod J.
            size: samples a unit.

        Example:
            >>> sums = Sums.of(torch.arange(6.0)[:, None], None, torch.arange(3), size=2)
            >>> fit(sums).mean.tolist(), sums.units
            ([2.5], 3)
        """
        x = samples.double()
        D = x.shape[1]
        c = x.new_zeros(len(x), 1, 0) if controls is None else controls.double()
        shift, shift_h = x.mean(0), c.mean(0)
        x, c = x - shift, c - shift_h
        f, h = x.reshape(-1, size, D).mean(1), c.reshape(len(x) // size, size, *c.shape[1:]).mean(1)
        fold = numbers.to(x.device) % FOLDS

        def by_fold(v: Tensor) -> Tensor:
            return v.new_zeros(FOLDS, *v.shape[1:]).index_add_(0, fold, v)

        one = torch.ones(len(f), dtype=torch.float64, device=x.device)
        return cls(
            shift,
            shift_h,
            by_fold(one),
            by_fold(f),
            by_fold(f**2),
            by_fold(h),
            by_fold(h[..., :, None] * h[..., None, :]),
            by_fold(f[..., None] * h),
            by_fold((c**2).reshape(len(f), size, *c.shape[1:]).sum(1)),
            by_fold(size * one),
            by_fold(x.reshape(-1, size, D).sum(1)),
            by_fold((x**2).reshape(-1, size, D).sum(1)),
        )

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.n.sum())

    @property
    def samples(self) -> int:
        """Number of single samples."""
        return int(self.m.sum())

    def about(self, shift: Tensor, shift_h: Tensor) -> Sums:
        """The same sums about another point."""
        a, b = self.shift - shift, self.shift_h - shift_h
        n, nq = self.n[:, None], self.n[:, None, None]
        outer = self.h[..., :, None] * b[..., None, :]
        return Sums(
            shift,
            shift_h,
            self.n,
            self.f + n * a,
            self.ff + 2 * a * self.f + n * a**2,
            self.h + nq * b,
            self.hh + outer + outer.mT + nq[..., None] * b[..., :, None] * b[..., None, :],
            self.fh + a[:, None] * self.h + self.f[..., None] * b + nq * a[:, None] * b,
            self.cc + 2 * b * (self.m / self.n.clamp_min(1))[:, None, None] * self.h + self.m[:, None, None] * b**2,
            self.m,
            self.s + self.m[:, None] * a,
            self.ss + 2 * a * self.s + self.m[:, None] * a**2,
        )

    def __add__(self, other: Sums) -> Sums:
        """Sums of both, about this one's point."""
        moved = other.about(self.shift, self.shift_h)
        parts = {k.name: getattr(self, k.name) + getattr(moved, k.name) for k in fields(self)[2:]}
        return Sums(self.shift, self.shift_h, **parts)

    def reduced(self, total: Callable[[Tensor], Tensor], shift: Tensor, shift_h: Tensor) -> Sums:
        """The sum over processes: `total` sums a tensor over them; the point must be the same on all."""
        moved = self.about(shift, shift_h)
        parts = {k.name: total(getattr(moved, k.name)) for k in fields(self)[2:]}
        return Sums(shift, shift_h, **parts)

    def only(self, columns: Sequence[int]) -> Sums:
        """The sums with some of the controls."""
        c = list(columns)
        return replace(
            self,
            shift_h=self.shift_h[:, c],
            h=self.h[..., c],
            hh=self.hh[..., c, :][..., c],
            fh=self.fh[..., c],
            cc=self.cc[..., c],
        )

    @property
    def variance(self) -> Tensor:
        """Variance of f over single samples, (D,)."""
        m = self.m.sum()
        return ((self.ss.sum(0) - self.s.sum(0) ** 2 / m) / (m - 1)).clamp_min(0)

    def leaving_out(self) -> Tensor:
        """`variance` without fold j, (J, D)."""
        m = (self.m.sum() - self.m)[:, None].clamp_min(2)
        s, ss = self.s.sum(0) - self.s, self.ss.sum(0) - self.ss
        return ((ss - s**2 / m) / (m - 1)).clamp_min(0)

    def of_control(self, k: int) -> Sums:
        """The sums of control k as if it were the statistic, for `variance` and `leaving_out`."""
        per = (self.m / self.n.clamp_min(1))[:, None]
        h, hh = self.h[..., k], self.hh[..., k, k]
        return replace(self, shift=self.shift_h[:, k], f=h, ff=hh, s=per * h, ss=self.cc[..., k]).only([])

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint."""
        return {k.name: getattr(self, k.name) for k in fields(self)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Sums:
        """The inverse of `state`."""
        return cls(**{k.name: torch.as_tensor(state[k.name]) for k in fields(cls)})


def log_error(values: Tensor) -> Tensor:
    """Jackknife standard error of log v from v without one fold each: values (J, ...) -> (...).

    Folds without a value above 0 take no part; with fewer than 2 left the error is 0.

    Example:
        >>> log_error(torch.tensor([1.0, 1.0, 1.0])).tolist(), log_error(torch.tensor([0.0, 2.0])).tolist()
        (0.0, 0.0)
    """
    good = (values > 0) & values.isfinite()
    J = good.sum(0)
    x = torch.log(torch.where(good, values, torch.ones_like(values)))
    x = torch.where(good, x - x.sum(0) / J.clamp_min(1), torch.zeros_like(x))
    return (((J - 1).clamp_min(0) / J.clamp_min(1)) * (x**2).sum(0)).sqrt()


def effective_freedom(leave_out: Tensor, freedom: float) -> Tensor:
    """Degrees of freedom of a variance: those it would have for normal units, or what its own scatter says, if less.

    Var(log v) = 2 / freedom for normal units, and (kurtosis - 1) / n in general: of a squared statistic a variance from
    64 units is worth 15 degrees. A t interval with n - 1 then covers too little (.92 of .95 for the residual of a norm
    at 64 units, .94 with these). A variance that is all in one fold (one sample in a hundred has another value) is
    worth one degree: nobody has seen it twice.

    Args:
        leave_out: the variance without fold j, (J, ...).
        freedom: of normal units.

    Example:
        >>> effective_freedom(torch.tensor([1.0, 1.0, 1.0]), 31.0).tolist()
        31.0
        >>> round(float(effective_freedom(torch.tensor([1.0, 1.0, 1.5]), 31.0)), 1)
        27.4
        >>> effective_freedom(torch.tensor([1.0, 1.0, 0.0]), 31.0).tolist()
        1.0
    """
    one = (leave_out <= 0).any(0) & (leave_out > 0).any(0)
    own = (2 / (log_error(leave_out) ** 2).clamp_min(1e-300)).clamp(1.0, freedom)
    return torch.where(one, torch.ones_like(own), own)


@dataclass(frozen=True, eq=False)
class Fit:
    """A mean with its variance.

    Attributes:
        mean: (D,).
        variance: of one unit's r, (D,).
        beta: coefficients, mean over folds, (D, q).
        var: of the mean, (D,): variance / n and what mu's own error adds.
        freedom: degrees of freedom of `variance`.
        leave_out: `variance` without fold j, (J, D).
    """

    mean: Tensor
    variance: Tensor
    beta: Tensor
    var: Tensor
    freedom: float
    leave_out: Tensor


def _coefficients(sums: Sums) -> Tensor:
    """beta_(-j), (J, D, q)."""
    n = (sums.n.sum() - sums.n)[:, None, None]
    n = n.clamp_min(1)
    h, f = (sums.h.sum(0) - sums.h) / n, (sums.f.sum(0) - sums.f) / n[..., 0]
    hh = (sums.hh.sum(0) - sums.hh) / n[..., None] - h[..., :, None] * h[..., None, :]
    fh = (sums.fh.sum(0) - sums.fh) / n - f[..., None] * h
    size = sums.cc.sum(0) / sums.m.sum()  # variances of single samples
    if hh.shape[-1] == 1:
        v = hh[..., 0]
        known = v > 1e-12 * size.clamp_min(1e-280)
        return torch.where(known, fh / torch.where(known, v, torch.ones_like(v)), torch.zeros_like(fh))
    spread = hh.diagonal(dim1=-2, dim2=-1)
    live = (spread > 1e-12 * size.clamp_min(1e-280)).to(hh)  # a control that is constant over units takes no part
    scale = torch.where(live > 0, spread, torch.ones_like(spread)).sqrt()
    hh = hh * (live[..., :, None] * live[..., None, :]) / scale[..., :, None] / scale[..., None, :]
    return (torch.linalg.pinv(hh, rtol=1e-8, hermitian=True) @ (fh * live / scale)[..., None])[..., 0] * live / scale


def fit(sums: Sums, mu: Tensor | None = None, var_mu: Tensor | None = None) -> Fit:
    """The cross-fitted mean of f with all of the sums' controls.

    Args:
        sums: at least 2 units.
        mu: known means of the controls, (Dc, q); default 0.
        var_mu: variances of their estimates, (Dc, q, q); default 0.

    Raises:
        ValueError: for fewer than 2 units.

    Example:
        >>> z = torch.tensor([[0.3], [-1.0], [0.5], [2.0]], dtype=torch.float64)
        >>> found = fit(Sums.of(3 + 2 * z, z[..., None], torch.arange(4)))
        >>> round(float(found.mean), 9), round(float(found.variance), 9)
        (3.0, 0.0)
    """
    n = sums.n.sum()
    if n < 2:
        raise ValueError(f"{int(n)} units have no variance; give at least 2")
    q = sums.h.shape[-1]
    if q == 0:
        beta = sums.f.new_zeros(*sums.f.shape, 0)
        r1, r2 = sums.f, sums.ff
    else:
        beta = _coefficients(sums)
        m = (torch.zeros_like(sums.shift_h) if mu is None else mu.to(sums.shift_h)) - sums.shift_h  # (Dc, q)
        nq = sums.n[:, None, None]
        r1 = sums.f - (beta * (sums.h - nq * m)).sum(-1)
        cross = sums.h[..., :, None] * m[..., None, :]
        hh = sums.hh - cross - cross.mT + nq[..., None] * m[..., :, None] * m[..., None, :]
        fh = sums.fh - sums.f[..., None] * m
        r2 = sums.ff - 2 * (beta * fh).sum(-1) + ((hh @ beta[..., None])[..., 0] * beta).sum(-1)
    R1, R2 = r1.sum(0), r2.sum(0)
    variance = ((R2 - R1**2 / n) / (n - 1)).clamp_min(0)
    variance = torch.where(variance <= 1e-13 * sums.ff.sum(0) / n, torch.zeros_like(variance), variance)
    others = (n - sums.n)[:, None].clamp_min(2)
    leave = (((R2 - r2) - (R1 - r1) ** 2 / others) / (others - 1)).clamp_min(0)
    middle = beta.mean(0)
    var = variance / n
    if q and var_mu is not None:
        var = var + ((var_mu.to(middle) @ middle[..., None])[..., 0] * middle).sum(-1)
    return Fit(sums.shift + R1 / n, variance, middle, var, max(float(n) - 1 - q, 1.0), leave)
