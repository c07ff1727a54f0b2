r"""Grids by dynamic programming: the cheapest chain through a set of candidate times.

With step costs L(i, j) between candidates i < j and the cost D(j) of a last step from j, the cheapest chain of K
evaluations that starts at candidate 0 is found exactly (Watson, Ho, Norouzi & Chan 2021, Algorithm 1):

    B_0(0) = 0,    B_k(j) = min_{i < j} B_{k-1}(i) + L(i, j),    cost of K evaluations = min_j B_{K-1}(j) + D(j).

One pass gives all K at once, so a budget in nats (the smallest K whose cost is within it) is as cheap as a budget of
steps. Candidates are equal shares of half the closed form's density (`matched`) and half a uniform one in logsnr; a
grid's cost is stationary at its minimum, so that their spacing enters at second order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.process.cost import CostCurve
from lowvar.process.matched import knot_rate
from lowvar.process.schedule import Schedule

__all__ = ["Plan", "chains", "fewest_steps", "optimal"]


@dataclass(frozen=True)
class Plan:
    """A grid and what it is predicted to cost.

    Attributes:
        grid: decreasing times, (K + 1,), ending at 0.
        path_kl: predicted excess over continuous time, nats a dimension.
    """

    grid: Tensor
    path_kl: float

    @property
    def steps(self) -> int:
        """K."""
        return len(self.grid) - 1


def chains(step: Tensor, last: Tensor) -> Iterator[tuple[float, list[int]]]:
    """The cheapest chain of K = 1, 2, .. evaluations, as (cost, candidates visited), until the candidates run out.

    Args:
        step: L, (N, N), inf where j <= i.
        last: D, (N,); inf where a chain must not end.

    Example:
        >>> L = torch.tensor([[torch.inf, 1.0, 4.0], [torch.inf, torch.inf, 1.0], [torch.inf] * 3])
        >>> [(cost, path) for cost, path in chains(L, torch.tensor([9.0, 5.0, 0.0]))]
        [(9.0, [0]), (4.0, [0, 2]), (2.0, [0, 1, 2])]
    """
    best = torch.full_like(last, torch.inf)
    best[0] = 0.0
    back: list[Tensor] = []
    for _ in range(len(last)):
        end = int((best + last).argmin())
        path = [end]
        for arrows in reversed(back):
            path.append(int(arrows[path[-1]]))
        yield float(best[end] + last[end]), path[::-1]
        best, arrows = (best[:, None] + step).min(0)
        back.append(arrows)


def _candidates(cost: CostCurve, schedule: Schedule, t_start: float, t_end: float | None, n: int) -> Tensor:
    if not 0 < t_start <= 1:
        raise ValueError(f"t_start is {t_start}; it must lie in (0, 1]")
    low = max(float(schedule.logsnr(t_start)), -12.0, float(cost.logsnr[0]))
    high = min(float(schedule.logsnr(schedule.t_min if t_end is None else t_end)), float(cost.logsnr[-1]))
    if high <= low:
        raise ValueError(f"t_start is {t_start} and t_end {t_end}: the chain must start before it ends")
    fine = torch.linspace(low, high, 2049, dtype=torch.float64)
    rate = knot_rate(cost, cost.noise, fine)
    mass = torch.cumsum(rate / rate.sum() + 1 / len(fine), 0)
    places = torch.linspace(float(mass[0]), float(mass[-1]), n, dtype=torch.float64)
    i = torch.searchsorted(mass, places).clamp(1, len(fine) - 1)
    return torch.lerp(fine[i - 1], fine[i], ((places - mass[i - 1]) / (mass[i] - mass[i - 1])).clamp(0, 1))


def _last(cost: CostCurve, logsnr: Tensor, fixed: bool) -> Tensor:
    if cost.last is not None and not fixed:
        return cost.ending(logsnr)
    last = torch.full_like(logsnr, torch.inf)
    last[-1] = 0.0
    return last


def _times(schedule: Schedule, logsnr: Tensor, t_start: float) -> Tensor:
    times = schedule.time(logsnr)
    times[0] = t_start
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def optimal(
    cost: CostCurve,
    schedule: Schedule,
    steps: int,
    t_start: float = 1.0,
    t_end: float | None = None,
    candidates: int = 321,
) -> Plan:
    """The cheapest grid of K steps.

    Args:
        cost: what steps cost; where it knows what the last one costs, the chain ends where that pays.
        schedule: what the times refer to.
        steps: K.
        t_start: first time.
        t_end: time of the last evaluation, instead of a free end (default without `cost.last`: where the curve or the
            schedule's t_min ends).
        candidates: N, raised to 4 K + 1 where it is smaller.

    Raises:
        ValueError: if steps or the times are out of range.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> l = torch.linspace(-8, 8, 33, dtype=torch.float64)
        >>> curve = CostCurve(l, 0.5 * torch.sigmoid(-l)[:, None], d=1)
        >>> plan = optimal(curve, CosineVP(), 5)
        >>> plan.steps, bool((plan.grid.diff() < 0).all())
        (5, True)
    """
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number of at least 1")
    logsnr = _candidates(cost, schedule, t_start, t_end, max(candidates, 4 * steps + 1))
    if steps == 1:
        path = [0]
    else:
        found = chains(cost.matrix(logsnr), _last(cost, logsnr, t_end is not None))
        for _ in range(steps - 1):
            next(found)
        path = next(found)[1]
    grid = _times(schedule, logsnr[path], t_start)
    return Plan(grid, cost.grid_kl(schedule, grid) / cost.d)


def fewest_steps(
    cost: CostCurve, schedule: Schedule, tol: float, t_start: float = 1.0, most: int = 1000, candidates: int = 513
) -> Plan:
    """The cheapest grid of the smallest K whose predicted path KL is at most `tol`.

    Args:
        cost: a curve that knows what the last step costs (else no chain would have to reach the data).
        schedule: what the times refer to.
        tol: nats a dimension, > 0.
        t_start: first time.
        most: largest K.
        candidates: N, which limits K to N.

    Raises:
        ValueError: if tol is not positive, the curve has no `last`, or no K is enough; the sentence says what the
            largest K reaches.

    Example:
        >>> from lowvar.process.schedule import CosineVP
        >>> l = torch.linspace(-8, 8, 33, dtype=torch.float64)
        >>> v = torch.sigmoid(-l)[:, None] ** 2
        >>> curve = CostCurve(l, v, d=1).ending_with(v, levels=256)
        >>> coarse, fine = (fewest_steps(curve, CosineVP(), tol) for tol in (0.1, 0.01))
        >>> 1 < coarse.steps < fine.steps, fine.path_kl <= 0.01
        (True, True)
    """
    if not tol > 0:
        raise ValueError(f"tol is {tol}; give a number of nats a dimension above 0, for example 0.01")
    if cost.last is None:
        raise ValueError("this cost curve does not know what the last step costs: see CostCurve.ending_with")
    logsnr = _candidates(cost, schedule, t_start, None, candidates)
    least = torch.inf
    for k, (_, path) in enumerate(chains(cost.matrix(logsnr), cost.ending(logsnr)), 1):
        grid = _times(schedule, logsnr[path], t_start)
        reached = cost.grid_kl(schedule, grid) / cost.d
        least = min(least, reached)
        if reached <= tol:
            return Plan(grid, reached)
        if k >= most:
            break
    raise ValueError(
        f"tol is {tol:g} nats a dimension, and the least that {min(most, candidates)} steps reach is {least:.3g}: "
        "give a larger one"
    )
