"""The solver that a scheduler's fields stand for, and with a calibration, the recipe of its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lowvar.calibrate.calibration import Calibration
from lowvar.errors import UserError
from lowvar.process.flow import TwinFlow
from lowvar.process.kernel import ReverseKernel
from lowvar.process.multistep import MultistepSolver
from lowvar.process.schedule import Level
from lowvar.process.solver import Solver
from lowvar.sample.named import SAMPLERS
from lowvar.schedulers._chain import Recipe, TwinCovariance
from lowvar.schedulers._classes import EVERY, Classes
from lowvar.schedulers._fields import OWN, RULES, has_noise, needs_twin, uses_covariance

__all__ = ["missing_noise", "recipe_of", "solver_of"]


def solver_of(c: Mapping[str, Any], covariance_head: bool) -> Solver:
    """The solver of a config, without its twin.

    Args:
        c: the scheduler's config.
        covariance_head: whether the network says the covariance of x_0.

    Raises:
        UserError: if a number is out of range.
    """
    try:
        if c["sampler"] == "kernel":
            rule = c["variance"] in RULES and not covariance_head
            return ReverseKernel(c["eta"], c["variance"] if rule else "posterior")
        if c["sampler"] in OWN:
            return MultistepSolver(None, c["predictor"], c["corrector"], c["tau"], c["decay"])
    except ValueError as error:
        raise UserError(str(error)) from error
    return SAMPLERS[c["sampler"]].solver


def recipe_of(
    c: Mapping[str, Any],
    levels: Level,
    covariance_head: bool,
    calibration: Callable[[], Calibration],
    classes: Classes = EVERY,
) -> Recipe:
    """The solver of a config on a grid, with the twin and the covariance that it needs.

    Args:
        c, covariance_head: as of `solver_of`.
        levels: of the grid, (K + 1,).
        calibration: gives the calibration; asked where something of it is needed.
        classes: of the samples, whose own tables are read where the calibration has them.

    Raises:
        UserError: as of `solver_of`, or if the calibration does not hold what is needed.
    """
    structure, model, solver = c["variance"], None, solver_of(c, covariance_head)
    if uses_covariance(c) and not covariance_head:
        held, labels = classes.tables(calibration())
        by_class = labels if structure in held.conditional else None
        model = TwinCovariance(held.twin) if structure == "twin" else held.model(structure, by_class)
    if needs_twin(c):
        held = calibration()
        if isinstance(solver, TwinFlow):
            solver = replace(solver, twin=held.mixture or held.twin, paths=held.paths)
        else:
            assert isinstance(solver, MultistepSolver)
            solver = replace(solver, twin=held.twin)
    if has_noise(c):
        found = calibration().deficit(solver, levels.logsnr)
        if found is None:
            raise missing_noise(c["sampler"], len(levels) - 1)
        solver = found.attach(solver)
    return Recipe(levels, solver, model)


def missing_noise(name: str, steps: int) -> UserError:
    """What is said where no noise was calibrated for a sampler on its grid.

    Example:
        >>> print(missing_noise("unipc-noise", 5))
        sampler unipc-noise has no noise for this grid of 5 steps: `lowvar calibrate --noise unipc-noise@5` measures it
    """
    return UserError(
        f"sampler {name} has no noise for this grid of {steps} steps: `lowvar calibrate --noise {name}@{steps}` "
        "measures it"
    )
