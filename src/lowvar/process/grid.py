r"""Step grids: decreasing times t_0 > t_1 > ... > t_K = 0 of a schedule, float64, computed once and usable anywhere.

K steps evaluate the network at t_0 .. t_{K-1}. `t_start` (default 1) is where the chain begins.

    uniform           t equally spaced from t_start to the schedule's t_min, then 0  (diffusers "linspace")
    trailing          t equally spaced from t_start to 0                             (diffusers "trailing")
    leading           t_min + j / K, j = K-1..0, then 0                              (diffusers "leading")
    quadratic         sqrt(t) equally spaced                                         (Song et al. 2020, DDIM)
    uniform_logsnr    logsnr equally spaced, then 0                                        (DPM-Solver)
    karras            (sigma/alpha)^(1/rho) equally spaced, then 0                         (Karras et al. 2022, Eq. 5)

Grids that are chosen by a calibrated curve are in `lowvar.process.matched` (closed form) and `lowvar.process.planning`
(dynamic programming).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowvar.process.matched import variance_matched
from lowvar.process.schedule import Schedule

__all__ = [
    "GRIDS",
    "custom",
    "from_timesteps",
    "karras",
    "leading",
    "make_grid",
    "quadratic",
    "spaced_timesteps",
    "to_timesteps",
    "trailing",
    "uniform",
    "uniform_logsnr",
    "variance_matched",
    "whole_timesteps",
]


def _check(steps: int, t_start: float, t_low: float = 0.0) -> None:
    if int(steps) != steps or steps < 1:
        raise ValueError(f"steps is {steps}; it must be a whole number of at least 1")
    if not t_low < t_start <= 1:
        raise ValueError(f"t_start is {t_start}; it must lie in ({t_low:.3g}, 1]")


def _ending(times: Tensor) -> Tensor:
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def uniform(schedule: Schedule, steps: int, t_start: float = 1.0) -> Tensor:
    """Times equally spaced from t_start to the schedule's t_min, then 0; (steps + 1,).

    Example:
        >>> from lowvar.process.schedule import Flow
        >>> uniform(Flow(), 2).tolist()
        [1.0, 0.001, 0.0]
    """
    _check(steps, t_start, schedule.t_min)
    return _ending(torch.linspace(t_start, schedule.t_min if steps > 1 else t_start, steps, dtype=torch.float64))


def trailing(schedule: Schedule, steps: int, t_start: float = 1.0) -> Tensor:
    """Times equally spaced from t_start down to 0; (steps + 1,)."""
    _check(steps, t_start)
    return torch.linspace(t_start, 0.0, steps + 1, dtype=torch.float64)


def leading(schedule: Schedule, steps: int, t_start: float = 1.0) -> Tensor:
    """Times t_min + j t_start / steps, j = steps - 1 .. 0, then 0; (steps + 1,).

    The chain does not start from pure noise. Where t_min is so large that these would pass t_start, they are equally
    spaced from t_start to t_min.
    """
    _check(steps, t_start, schedule.t_min)
    j = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    gap = min(t_start / steps, (t_start - schedule.t_min) / max(steps - 1, 1))
    return _ending((schedule.t_min + j * gap).clamp_max(t_start))


def quadratic(schedule: Schedule, steps: int, t_start: float = 1.0) -> Tensor:
    """sqrt(t) equally spaced from sqrt(t_start) to sqrt(t_min), then 0; (steps + 1,)."""
    _check(steps, t_start, schedule.t_min)
    end = schedule.t_min if steps > 1 else t_start
    return _ending(torch.linspace(math.sqrt(t_start), math.sqrt(end), steps, dtype=torch.float64) ** 2)


def _finite_logsnr(schedule: Schedule, t: float, bound: float = 12.0) -> float:
    """logsnr at t, limited to [-bound, ...) where the schedule starts from pure noise."""
    return max(float(schedule.logsnr(t)), -bound)


def uniform_logsnr(schedule: Schedule, steps: int, t_start: float = 1.0, t_end: float | None = None) -> Tensor:
    """logsnr equally spaced between t_start and t_end (default the schedule's t_min), then 0; (steps + 1,)."""
    end = schedule.t_min if t_end is None else t_end
    _check(steps, t_start, end)
    low, high = _finite_logsnr(schedule, t_start), float(schedule.logsnr(end))
    times = schedule.time(torch.linspace(low, high if steps > 1 else low, steps, dtype=torch.float64))
    times[0] = t_start
    return _ending(times)


def karras(
    schedule: Schedule, steps: int, t_start: float = 1.0, t_end: float | None = None, rho: float = 7.0
) -> Tensor:
    """(sigma / alpha)^(1/rho) equally spaced between t_start and t_end (default t_min), then 0; (steps + 1,)."""
    end = schedule.t_min if t_end is None else t_end
    _check(steps, t_start, end)
    low, high = _finite_logsnr(schedule, t_start), float(schedule.logsnr(end))
    root = torch.linspace(math.exp(-low / 2 / rho), math.exp(-high / 2 / rho), steps, dtype=torch.float64)
    times = schedule.time(-2 * rho * torch.log(root))
    times[0] = t_start
    return _ending(times)


def custom(schedule: Schedule, times: Sequence[float] | Tensor) -> Tensor:
    """Given times; a final 0 is appended where it is missing.

    Raises:
        ValueError: if the times do not decrease within [0, 1].
    """
    grid = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
    if len(grid) and float(grid[-1]) > 0:
        grid = _ending(grid)
    if len(grid) < 2 or float(grid[0]) > 1 or not bool((grid.diff() < 0).all()):  # nan decreases nowhere
        raise ValueError("times must decrease, from at most 1 to 0, and hold at least one step")
    return grid


def to_timesteps(schedule: Schedule, grid: Tensor) -> Tensor:
    """What networks are conditioned on at the grid's evaluations: `schedule.timestep(grid[:-1])`, (K,) float64.

    For discrete tables these are the (possibly fractional) indices that diffusers calls timesteps.
    """
    return schedule.timestep(grid[:-1])


def whole_timesteps(schedule: Schedule, grid: Tensor) -> list[int]:
    """The grid's evaluations as whole timesteps, decreasing, for any scheduler that takes `timesteps`, K numbers.

    Rounded to the training timesteps; where two would coincide the later is moved down (and up again where it would
    pass 0), so that the number of evaluations stays.

    Schedulers of diffusers with `set_timesteps(timesteps=...)` and pipelines with a `timesteps` argument take it as it
    is: DDPM, DPM-Solver++ and its SDE form, Euler, Heun, LCM, TCD. `DDIMScheduler` does not: it computes the step's end
    from the number of steps; DPM-Solver++ of `solver_order=1` is DDIM on any timesteps.

    Args:
        schedule: a table of T training timesteps (`DiscreteVP`), which the network is conditioned on.
        grid: decreasing times (K + 1,).

    Raises:
        ValueError: if the schedule has no whole timesteps, or fewer than the grid.

    Example:
        >>> from lowvar.process.discrete import schedule_from_diffusers
        >>> schedule = schedule_from_diffusers({})
        >>> whole_timesteps(schedule, custom(schedule, [1.0, 0.5, 0.0012, 0.0011]))
        [999, 499, 1, 0]
    """
    T = getattr(schedule, "steps", None)
    if T is None or len(grid) - 1 > T:
        raise ValueError(
            f"{len(grid) - 1} whole timesteps need a schedule of as many training timesteps (a `DiscreteVP`), and this "
            f"one has {T or 'none'}"
        )
    found = to_timesteps(schedule, grid).round().long().clamp(0, T - 1).tolist()
    for k in range(1, len(found)):
        found[k] = min(found[k], found[k - 1] - 1)
    for k in range(len(found) - 1, -1, -1):
        found[k] = max(found[k], len(found) - 1 - k)
    return found


def from_timesteps(schedule: Schedule, timesteps: Sequence[float] | Tensor) -> Tensor:
    """The grid whose evaluations are at given timesteps (what the network is conditioned on), then 0.

    Example:
        >>> from lowvar.process.discrete import schedule_from_diffusers
        >>> from_timesteps(schedule_from_diffusers({}), [999, 499]).tolist()
        [1.0, 0.5, 0.0]
    """
    return custom(schedule, schedule.time_of(torch.as_tensor(timesteps, dtype=torch.float64)))


def spaced_timesteps(spacing: str, T: int, steps: int, offset: int = 0) -> Tensor:
    """Whole timesteps in [0, T - 1] as diffusers' DDPMScheduler spaces them (Lin et al. 2024, Table 2), (steps,).

    Args:
        spacing: leading (multiples of T // steps, plus offset), linspace (both ends) or trailing (from T - 1).
        T: training timesteps.
        steps: how many, at most T.
        offset: for `leading`.

    Raises:
        ValueError: if the spacing is unknown.

    Example:
        >>> [spaced_timesteps(s, 1000, 3).tolist() for s in ("leading", "linspace", "trailing")]
        [[666.0, 333.0, 0.0], [999.0, 500.0, 0.0], [999.0, 666.0, 332.0]]
    """
    j = torch.arange(steps, dtype=torch.float64)
    if spacing == "linspace":  # one step is at 0 there, as numpy.linspace has it
        return (j * ((T - 1) / max(steps - 1, 1))).round().flip(0)
    if spacing == "trailing":
        return (T - j * (T / steps)).round() - 1
    if spacing == "leading":
        return (j * (T // steps)).flip(0) + offset
    raise ValueError(f"spacing is {spacing!r}; allowed: leading, linspace, trailing")


GRIDS = {
    "uniform": uniform,
    "trailing": trailing,
    "leading": leading,
    "quadratic": quadratic,
    "uniform-logsnr": uniform_logsnr,
    "karras": karras,
}


def make_grid(name: str, schedule: Schedule, steps: int) -> Tensor:
    """A grid by name.

    Raises:
        ValueError: if the name is unknown (variance-matched grids need a calibrated curve: `variance_matched`).
    """
    if name not in GRIDS:
        raise ValueError(f"grid is {name!r}; allowed: {', '.join(GRIDS)}")
    return GRIDS[name](schedule, steps)
