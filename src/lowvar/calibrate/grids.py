r"""Step grids from a calibration: the curves that `lowvar.process.cost` needs, and grids by name.

A name is FAMILY or FAMILY:STRUCTURE.

    entropic            equal shares of information
    variance-matched    equal shares of sqrt(R), closed form
    optimal             dynamic programming on the predicted cost of each step

STRUCTURE is the kernel's noise, which the grid is made for: `small`, or a calibrated table: `isotropic`, `channel`,
`pixel`, `basis`. Residuals are made those of an exact posterior first (`lowvar.process.cost.monotone`, bounded by the
twin's), because what a network does worse than that is an error of its own that no step can mend.

The last evaluation lies where it costs least to decode data of `levels` grey levels from it. Without levels, the end is
the schedule's first training time.
"""

from __future__ import annotations

from torch import Tensor

from lowvar.calibrate.calibration import Calibration
from lowvar.errors import UserError
from lowvar.process.cost import CostCurve, monotone
from lowvar.process.grid import GRIDS, make_grid
from lowvar.process.matched import matched
from lowvar.process.planning import Plan, fewest_steps, optimal
from lowvar.process.schedule import Schedule

__all__ = ["FAMILIES", "STRUCTURES", "calibrated_grid", "check_grid", "cost_curve", "fewest_steps_for", "is_calibrated"]

FAMILIES = ("entropic", "variance-matched", "optimal")
STRUCTURES = ("small", "isotropic", "channel", "pixel", "basis")


def _twin_variance(calibration: Calibration, schedule: Schedule) -> Tensor:
    """The Wiener filter's posterior variances along the basis at the calibration's knots, (L, d) float64."""
    c = calibration.twin.spectrum.double().flatten()
    level = schedule.level(calibration.logsnr)
    alpha2, sigma2 = (level.alpha**2)[:, None], (level.sigma**2)[:, None]
    return c * sigma2 / (alpha2 * c + sigma2).clamp_min(1e-300)


def _table(calibration: Calibration, schedule: Schedule, structure: str) -> Tensor:
    """The variances of a structure at the knots, monotone and at most the twin's, (L, m)."""
    along = _twin_variance(calibration, schedule)
    if structure in ("small", "isotropic"):
        return monotone(calibration.mmse[:, None], along.mean(1, keepdim=True))
    table = calibration.table(structure).variance
    if structure == "basis":
        return monotone(table.flatten(1), along)
    pixels = calibration.twin.basis.squared_mix(along.reshape(-1, *calibration.event_shape))
    if structure == "channel":
        pixels = pixels.flatten(2).mean(2)
    return monotone(table.flatten(1), pixels.flatten(1))


def cost_curve(
    calibration: Calibration, schedule: Schedule, structure: str = "isotropic", levels: int | None = None
) -> CostCurve:
    """What steps of the ancestral kernel with a calibrated noise cost.

    Args:
        calibration: of the network.
        schedule: the schedule it was made for.
        structure: the kernel's noise, one of `STRUCTURES`.
        levels: grey levels of the data; None: the last step is not counted.

    Raises:
        UserError: if the structure is unknown or was not calibrated, or the schedule is another one.
    """
    calibration.require(schedule)
    if structure not in STRUCTURES:
        raise UserError(f"structure is {structure!r}; allowed: {', '.join(STRUCTURES)}")
    noise = "small" if structure == "small" else "table"
    variance = _table(calibration, schedule, structure)
    curve = CostCurve(calibration.logsnr, variance, calibration.event_shape.numel(), noise)
    if levels is None:
        return curve
    decoder = "pixel" if "pixel" in calibration.tables else "isotropic"
    return curve.ending_with(_table(calibration, schedule, decoder), levels)


def is_calibrated(name: str) -> bool:
    """Whether a grid's name asks for a calibration.

    Example:
        >>> is_calibrated("optimal:basis"), is_calibrated("karras")
        (True, False)
    """
    return name.split(":")[0] in FAMILIES


def check_grid(name: str) -> str:
    """The name, if there is such a grid.

    Raises:
        UserError: naming the allowed ones.

    Example:
        >>> check_grid("optimal:basis")
        'optimal:basis'
    """
    if name not in GRIDS:
        _parse(name, "")
    return name


def _parse(name: str, structure: str) -> tuple[str, str]:
    family, _, chosen = name.partition(":")
    if family not in FAMILIES or (chosen and chosen not in STRUCTURES):
        raise UserError(
            f"grid is {name!r}; allowed: {', '.join(GRIDS)}, path, {', '.join(FAMILIES)}, the last three also with the "
            f"noise they are made for, for example optimal:basis ({', '.join(STRUCTURES)})"
        )
    return family, chosen or structure


def calibrated_grid(
    name: str,
    calibration: Calibration,
    schedule: Schedule,
    steps: int,
    structure: str = "isotropic",
    levels: int | None = None,
) -> Plan:
    """A grid by name, with its predicted path KL.

    Args:
        name: a name of `lowvar.process.grid.GRIDS`, FAMILY or FAMILY:STRUCTURE (see the module).
        calibration, schedule: what it is made for.
        steps: K.
        structure: the kernel's noise, for names that do not say, and for the prediction.
        levels: grey levels of the data, or None.

    Raises:
        UserError: if the name is unknown or steps are out of range.
    """
    calibration.require(schedule)
    if name in GRIDS:
        grid = make_grid(name, schedule, steps)
        return Plan(grid, _predicted(cost_curve(calibration, schedule, structure, levels), schedule, grid))
    family, structure = _parse(name, structure)
    curve = cost_curve(calibration, schedule, structure, levels)
    try:
        if family == "optimal":
            return optimal(curve, schedule, steps)
        grid = matched(curve, schedule, steps, "entropic" if family == "entropic" else None)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Plan(grid, _predicted(curve, schedule, grid))


def _predicted(curve: CostCurve, schedule: Schedule, grid: Tensor) -> float:
    return curve.grid_kl(schedule, grid) / curve.d


def fewest_steps_for(
    tol: float,
    name: str,
    calibration: Calibration,
    schedule: Schedule,
    structure: str = "isotropic",
    levels: int = 256,
    most: int = 1000,
) -> Plan:
    """The smallest K whose grid `name` is predicted to cost at most `tol` more than continuous time.

    Args:
        tol: nats a dimension.
        name: as in `calibrated_grid`.
        calibration, schedule, structure: as there.
        levels: grey levels of the data.
        most: largest K.

    Raises:
        UserError: if no K is enough, or a name or number is out of range.
    """
    if not tol > 0:  # NaN, too
        raise UserError(f"tol is {tol}; give a number of nats a dimension above 0, for example 0.05")
    if name.split(":")[0] == "optimal":
        _, structure = _parse(name, structure)
        try:
            return fewest_steps(cost_curve(calibration, schedule, structure, levels), schedule, tol, most=most)
        except ValueError as error:
            raise UserError(str(error)) from error
    return _search(tol, name, calibration, schedule, structure, levels, most)


def _search(
    tol: float, name: str, calibration: Calibration, schedule: Schedule, structure: str, levels: int, most: int
) -> Plan:
    """Doubling, then bisection: the predicted cost of one family falls with K (up to ripples smaller than a step)."""

    def plan(steps: int) -> Plan:
        return calibrated_grid(name, calibration, schedule, steps, structure, levels)

    high = 1
    while (found := plan(high)).path_kl > tol:
        if high >= most:
            raise UserError(
                f"tol is {tol:g} nats a dimension, and grid {name} reaches {found.path_kl:.3g} with {most} steps: give "
                "a larger one or the grid optimal"
            )
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        candidate = plan(middle)
        if candidate.path_kl <= tol:
            high, found = middle, candidate
        else:
            low = middle
    return found
