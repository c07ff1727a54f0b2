"""Calibrated noise of solvers as `lowvar calibrate --noise` measures it: which, on which grids, and what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowvar.cli.options import parse_names
from lowvar.errors import UserError

if TYPE_CHECKING:
    import torch

    from lowvar.calibrate import Calibration
    from lowvar.cli.console import Console
    from lowvar.cli.models import Model
    from lowvar.evaluation import Cell

__all__ = ["measure_noise", "parse_noise"]


def parse_noise(text: str, steps: int) -> list[Cell]:
    """Samplers that add calibrated noise, each with its number of steps.

    Args:
        text: names separated by commas, `NAME` or `NAME@STEPS`.
        steps: for names without a number.

    Raises:
        UserError: for other samplers, or no number of steps.

    Example:
        >>> [cell.title for cell in parse_noise("ddim-noise,unipc-noise@5", 10)]
        ['ddim-noise@10', 'unipc-noise@5']
    """
    from lowvar.evaluation import Cell
    from lowvar.sample import SAMPLERS

    cells = []
    for word in parse_names("--noise", text):
        name, _, number = word.partition("@")
        if name not in SAMPLERS or not SAMPLERS[name].noise:
            known = ", ".join(n for n, sampler in SAMPLERS.items() if sampler.noise)
            raise UserError(f"--noise has {name!r}; allowed: {known}")
        if "@" in word and not (number.isdecimal() and int(number) > 0):
            raise UserError(f"--noise has {word!r}; after @ give a number of steps, for example {name}@5")
        cells.append(Cell(name, int(number) if number else steps))
    return list(dict.fromkeys(cells))


def measure_noise(
    cells: list[Cell], model: Model, calibration: Calibration, batch_size: int, device: torch.device, console: Console
) -> tuple[Calibration, list[dict[str, Any]]]:
    """The calibration with these solvers' noise, and a record of each: what was added, of what was there.

    Args:
        cells: samplers and steps, each on the sampler's own grid.
        model: the model.
        calibration: of its network.
        batch_size, device: of the network's evaluations.
        console: for notes.
    """
    from lowvar.evaluation import deficit_of, resolve, sampling_grid

    records = []
    for cell in cells:
        sampler, attached = resolve(cell.sampler, model.denoiser, calibration)
        grid = sampling_grid(sampler.grid, model.denoiser.schedule, cell.steps, calibration)
        found = deficit_of(attached, sampler.solver, grid, calibration, batch_size=batch_size, device=device)
        calibration = calibration.with_deficit(found)
        added = float(found.variance.sum())
        share = added / (added + float(found.measured[:-1].sum())) if added else 0.0
        records.append(
            {"sampler": cell.sampler, "steps": cell.steps, "grid": sampler.grid, "chains": found.n, "share": share}
        )
        console.result(f"{cell.title}: {share:.1%} of the states' variance is added as noise")
    return calibration, records
