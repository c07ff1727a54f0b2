r"""Grids in closed form from a calibrated curve: knots of equal share.

A rule gives a density of knots in logsnr; the grid cuts its integral between the first and the last evaluation into
equal parts. If a step's excess cost is a dsnr^p, K steps cost least where knots have density a^(1/p) in snr:

    rule        density in logsnr                                  equalises
    entropic    sum_i g_i                                          information, (1/2) M d snr
    small       (sum_i g_i (1 - g_i) u_i' + g_i^2)^(1/2)           sqrt(R) d snr,  R = -M'
    table       (sum_i g_i (1 - g_i) u_i')^(1/2)                   sqrt(R) d snr,  R = -M' - sum_i v_i^2
    full        snr T^(1/3)                                        T^(1/3) d snr,  T = E ||kappa_3||^2

g_i = snr v_i in [0, 1] and u_i = logsnr - logit g_i; ' is d / d logsnr. For Gaussian data in its own basis u is
constant and R is 0: the difference that cancels is taken in u, never in v. Slopes are those of a local quadratic fit
of u (Gaussian weights, one knot wide), because measured curves are noisy.

Full covariance. Its excess is (dsnr^3 / 12) T with kappa_3 the third cumulant of p(x_0 | x_t): d C = -C^2 d snr +
kappa_3 dW, so that T = 2 E tr C^3 - M'' is what the third derivative of the bound leaves. It is not in the curve
(E tr C^3 is not), but two nested Jacobian-vector products estimate it without bias: `lowvar.process.probe`. Without it
the rule `table` on the best basis is a good second (mixtures in 2 and 8 dimensions, 10 steps: excess .063 and .121 nats
against .060 and .095 with T, .058 and .091 by dynamic programming).

Sources: equal information: Stancevic, Handke & Ambrogioni 2025 (entropic time). The curve and its slope: Guo, Shamai &
Verdu 2005.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lowvar.process.cost import CostCurve, monotone
from lowvar.process.schedule import Schedule

__all__ = ["Rule", "knot_rate", "matched", "variance_matched"]

Rule = Literal["entropic", "small", "table", "full"]
_FINE = 1025


def _local_quadratic(at: Tensor, knots: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope at points (F,) of a locally weighted quadratic fit of values (L, m); (F, m) each."""
    x = at[:, None] - knots  # (F, L)
    # at least three knots carry weight wherever a point lies
    reach = torch.sort(x.abs(), 1).values[:, min(2, len(knots) - 1)].clamp_min(float(knots.diff().median()))[:, None]
    weight = torch.exp(-0.5 * (x / reach) ** 2)
    powers = torch.stack([torch.ones_like(x), -x / reach, (x / reach) ** 2], -1)  # in knot - point
    normal = torch.einsum("fl,flp,flq->fpq", weight, powers, powers)
    smoother = torch.linalg.solve(normal, torch.einsum("fl,flp->fpl", weight, powers))[:, :2]
    fit = torch.einsum("fpl,lm->fpm", smoother, values)
    return fit[:, 0], fit[:, 1] / reach


def knot_rate(cost: CostCurve, rule: Rule, logsnr: Tensor) -> Tensor:
    """The density of knots in logsnr of a rule at logsnr (F,); (F,), positive: sqrt(snr^2 R) for `small` and `table`.

    Where a density vanishes (and where noise of the curve makes it negative) it is held at a thousandth of its scale,
    so that no step becomes infinitely long.

    Raises:
        ValueError: if the rule is unknown or the curve has fewer than three knots.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule is {rule!r}; allowed: {', '.join(get_args(Rule))}")
    if rule == "full":
        if cost.third is None:
            raise ValueError("rule 'full' needs the third cumulant of the posterior: see CostCurve.third")
        log_third = torch.log(cost.third.double().clamp_min(1e-300))[:, None]
        rate = torch.exp(logsnr + _local_quadratic(logsnr, cost.logsnr, log_third)[0][:, 0] / 3)
        return rate.clamp_min(1e-3 * float(rate.max()))
    knots = cost.logsnr
    if len(knots) < 3:
        raise ValueError("the mmse curve needs at least three points with increasing logsnr")
    g = (torch.exp(knots)[:, None] * cost.variance).clamp(1e-9, 1 - 1e-9)  # snr v <= 1 as v <= sigma^2 / alpha^2
    u, slope = _local_quadratic(logsnr, knots, knots[:, None] - _logit(g))
    g = torch.sigmoid(logsnr[:, None] - u)
    if rule == "entropic":
        total = g.mean(1) * cost.d
        return total.clamp_min(1e-3 * float(total.max()))
    squares = (g**2).mean(1) * cost.d
    second = (g * (1 - g) * slope).mean(1) * cost.d
    if rule == "small":
        second = second + squares
    return second.clamp_min(1e-6 * float(squares.max())).sqrt()


def _mass(cost: CostCurve, rule: Rule, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Fine logsnr values and the density's integral from `low` to each, both (F,)."""
    fine = torch.linspace(low, high, _FINE, dtype=torch.float64)
    rate = knot_rate(cost, rule, fine)
    return fine, torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum((rate[1:] + rate[:-1]) / 2, 0)])


def _shares(fine: Tensor, mass: Tensor, parts: int, end: int = -1) -> Tensor:
    """logsnr values that cut [fine[0], fine[end]] into parts of equal share, (parts + 1,)."""
    return _interpolate(mass[end] * torch.linspace(0, 1, parts + 1, dtype=torch.float64), mass, fine)


def _span(cost: CostCurve, schedule: Schedule, t_start: float, t_end: float | None) -> tuple[float, float]:
    low = max(float(schedule.logsnr(t_start)), -12.0, float(cost.logsnr[0]))
    return low, min(float(schedule.logsnr(schedule.t_min if t_end is None else t_end)), float(cost.logsnr[-1]))


def _grid(schedule: Schedule, logsnr: Tensor, t_start: float) -> Tensor:
    times = schedule.time(logsnr)
    times[0] = t_start
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def matched(
    cost: CostCurve,
    schedule: Schedule,
    steps: int,
    rule: Rule | None = None,
    t_start: float = 1.0,
    t_end: float | None = None,
) -> Tensor:
    """The grid of a rule: K evaluations, K - 1 steps of equal share, and the last step to 0; (K + 1,) times.

    Args:
        cost: the calibrated curve.
        schedule: what the times refer to.
        steps: K.
        rule: see the module; default the curve's own kernel.
        t_start: first time.
        t_end: time of the last evaluation. Default: where the path KL of the whole chain is least if the curve knows
            what the last step costs, else where the curve or the schedule's t_min ends.

    Raises:
        ValueError: if steps, t_start or the rule is out of range.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> l = torch.linspace(-8, 8, 33, dtype=torch.float64)
        >>> curve = CostCurve(l, 0.5 * torch.sigmoid(-l)[:, None], d=1)
        >>> grid = matched(curve, CosineVP(), 5, "entropic")
        >>> len(grid), bool((grid.diff() < 0).all())
        (6, True)
    """
    _check(steps, t_start)
    rule = cost.noise if rule is None else rule
    low, high = _span(cost, schedule, t_start, t_end)
    if high <= low:
        raise ValueError(f"t_start is {t_start} and t_end {t_end}: the chain must start before it ends")
    if steps == 1:
        return _grid(schedule, torch.tensor([low], dtype=torch.float64), t_start)
    fine, mass = _mass(cost, rule, low, high)
    if t_end is not None or cost.last is None:
        return _grid(schedule, _shares(fine, mass, steps - 1), t_start)
    paths = [_shares(fine, mass, steps - 1, end) for end in range(8, _FINE, 8)]
    best = int(torch.stack([cost.path_kl(path) for path in paths]).argmin())
    return _grid(schedule, paths[best], t_start)


def variance_matched(
    schedule: Schedule,
    steps: int,
    logsnr: Tensor,
    mmse: Tensor,
    t_start: float = 1.0,
    t_end: float | None = None,
) -> Tensor:
    """Knots in snr with density sqrt(R) for the isotropic reverse kernel; (steps + 1,) times.

    Unlike `matched`, it takes K equal shares up to t_end, and the last knot is replaced by 0.

    Args:
        schedule: the schedule the times refer to.
        steps: K.
        logsnr: increasing logsnr values of the calibrated curve, (n,), at least 3.
        mmse: mmse a dimension at these, (n,); made non-increasing before use.
        t_start: first time.
        t_end: where the last share ends (default: where the curve or the schedule's t_min ends).

    Raises:
        ValueError: if the curve has fewer than three increasing points.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> l = torch.linspace(-8, 8, 33, dtype=torch.float64)
        >>> grid = variance_matched(CosineVP(), 5, l, 0.5 * torch.sigmoid(-l))
        >>> len(grid), bool((grid.diff() < 0).all())
        (6, True)
    """
    _check(steps, t_start)
    if len(logsnr) < 3 or bool((logsnr.diff() <= 0).any()):
        raise ValueError("the mmse curve needs at least three points with increasing logsnr")
    cost = CostCurve(logsnr, monotone(mmse)[:, None], 1)
    fine, mass = _mass(cost, "table", *_span(cost, schedule, t_start, t_end))
    return _grid(schedule, _shares(fine, mass, steps)[:-1], t_start)


def _check(steps: int, t_start: float) -> None:
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number of at least 1")
    if not 0 < t_start <= 1:
        raise ValueError(f"t_start is {t_start}; it must lie in (0, 1]")


def _logit(p: Tensor) -> Tensor:
    return torch.log(p) - torch.log1p(-p)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear interpolation of increasing knots, constant beyond the ends."""
    i = torch.searchsorted(xs.contiguous(), x.contiguous()).clamp(1, len(xs) - 1)
    gap = (xs[i] - xs[i - 1]).clamp_min(math.ulp(0.0))
    return torch.lerp(ys[i - 1], ys[i], ((x - xs[i - 1]) / gap).clamp(0, 1))
