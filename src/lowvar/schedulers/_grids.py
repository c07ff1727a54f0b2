"""Which times a scheduler steps through: its own grid, or timesteps or sigmas that a caller chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate.calibration import Calibration
from lowvar.calibrate.grids import calibrated_grid, is_calibrated
from lowvar.errors import UserError
from lowvar.process.grid import custom, make_grid, spaced_timesteps
from lowvar.process.schedule import Flow, Schedule

__all__ = ["chosen_times"]

_IN_TIME = ("uniform", "trailing", "leading", "quadratic")  # grids that a resolution's shift moves


def chosen_times(
    config: Mapping[str, Any],
    schedule: Schedule,
    T: int,
    calibration: Calibration | None,
    steps: int | None,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> Tensor:
    """Decreasing times that end at 0, (K + 1,); arguments as in `ReverseVarianceScheduler.set_timesteps`.

    Raises:
        UserError: if none or several are given, or what is given is out of range.
    """
    if timesteps is None and sigmas is None and steps is None:
        raise UserError("give num_inference_steps, timesteps or sigmas")
    if timesteps is not None and (sigmas is not None or steps is not None):
        raise UserError("give one of num_inference_steps, timesteps and sigmas, and not both")
    if sigmas is not None and steps is not None and steps != len(sigmas):
        raise UserError(f"num_inference_steps is {steps}, and there are {len(sigmas)} sigmas: give one of both")
    try:
        if timesteps is not None:
            return custom(schedule, schedule.time_of(torch.as_tensor(timesteps, dtype=torch.float64)))
        if sigmas is not None:
            return custom(schedule, _of_sigmas(config, schedule, torch.as_tensor(sigmas, dtype=torch.float64), mu))
        assert steps is not None
        return custom(schedule, _own(config, schedule, T, calibration, steps, mu))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"these steps cannot be taken: {error}") from error


def _own(
    config: Mapping[str, Any], schedule: Schedule, T: int, calibration: Calibration | None, steps: int, mu: float | None
) -> Tensor:
    if int(steps) != steps or not 1 <= steps <= T:
        raise UserError(f"steps is {steps}; give a whole number from 1 to {T}")
    grid = config["grid"]
    if grid is None:
        spacing, offset = config["timestep_spacing"], config["steps_offset"]
        times = (spaced_timesteps(spacing, T, int(steps), offset) + 1) / T
        return _shifted(config, schedule, times, mu) if isinstance(schedule, Flow) else times
    if isinstance(grid, str) and is_calibrated(grid):
        assert calibration is not None, "fields that need a calibration are refused without one"
        return calibrated_grid(grid, calibration, schedule, steps, levels=calibration.levels).grid
    if grid == "path":
        assert calibration is not None, "fields that need a calibration are refused without one"
        if config["start_with_twin"]:
            return calibration.path_grid(schedule, steps)
        return _from_noise(calibration, schedule, steps)
    if isinstance(grid, str):
        if isinstance(schedule, Flow) and grid in _IN_TIME:
            return _shifted(config, schedule, make_grid(grid, Flow(), steps)[:-1], mu)
        return make_grid(grid, schedule, steps)
    times = custom(schedule, list(grid))
    if len(times) - 1 != steps:
        raise UserError(f"steps is {steps}, but the config's list of times has {len(times) - 1}: ask for as many")
    return times


def _from_noise(calibration: Calibration, schedule: Schedule, steps: int) -> Tensor:
    """The path grid of K - 1 evaluations after one at t = 1, where every pipeline begins."""
    one = torch.ones(1, dtype=torch.float64)
    if steps == 1:
        return torch.cat([one, 0 * one])
    grid = calibration.path_grid(schedule, steps - 1)
    return grid if float(grid[0]) >= 1 else torch.cat([one, grid])


def _of_sigmas(config: Mapping[str, Any], schedule: Schedule, sigmas: Tensor, mu: float | None) -> Tensor:
    """Flow: sigmas before the shift, as diffusers' FlowMatchEulerDiscreteScheduler has them; else sigma / alpha."""
    if len(sigmas) and float(sigmas[-1]) == 0:
        sigmas = sigmas[:-1]
    if bool((sigmas <= 0).any()) or (isinstance(schedule, Flow) and bool((sigmas > 1).any())):
        bounds = "in (0, 1], decreasing" if isinstance(schedule, Flow) else "positive and decreasing"
        raise UserError(f"sigmas are {sigmas.tolist()}; they must be {bounds}")
    if not isinstance(schedule, Flow):
        return schedule.time(-2 * torch.log(sigmas))
    return _shifted(config, schedule, sigmas, mu)


def _shifted(config: Mapping[str, Any], schedule: Flow, sigmas: Tensor, mu: float | None) -> Tensor:
    """Times at which the flow's sigma is u = m / (m + 1 / s - 1) (Esser et al. 2024, Eq. 23).

    m is the schedule's shift, or with dynamic shifting e^mu or mu. `shift_terminal` scales 1 - u to end there.
    """
    dynamic, terminal = config["use_dynamic_shifting"], config["shift_terminal"]
    if not dynamic and not terminal:
        return sigmas  # the schedule's own shift is the one between its times and sigmas
    if dynamic and mu is None:
        raise UserError("use_dynamic_shifting is set: give mu, the logarithm of the shift at this resolution")
    m = schedule.shift
    if dynamic and mu is not None:
        m = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
    u = m / (m + 1 / sigmas - 1)
    if terminal:
        u = 1 - (1 - u) * ((1 - terminal) / (1 - u[-1]))
    return schedule.time_of(u * schedule.conditioning_scale)
