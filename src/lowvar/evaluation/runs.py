r"""Samplers x steps on one network, scored against held-out data.

`evaluate` runs cells with the same noise sample by sample (draw 0 of one source starts sample i of every cell), so that
two cells may be compared as pairs, and adds the rows "Gaussian twin alone" and "Mixture twin alone" (no network
evaluation) and the floor (data against data, at the same n).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowvar.calibrate import Calibration
from lowvar.data import Data
from lowvar.errors import UserError
from lowvar.evaluation.cells import Cell, Drawn, check_cell, draw, teaching
from lowvar.metrics import Interval, Replicates, Scorer
from lowvar.process.denoiser import NetworkDenoiser
from lowvar.process.noise import Independent, NoiseSource
from lowvar.sample import SAMPLERS

__all__ = ["MIXTURE_ALONE", "TWIN_ALONE", "Evaluation", "evaluate", "recommend", "require_enough"]

TWIN_ALONE = "Gaussian twin alone"
MIXTURE_ALONE = "Mixture twin alone"
_COMPONENT = 2**20  # the draw that chooses a sample's component; no reverse step has this number


@dataclass(frozen=True)
class Evaluation:
    """Scores of many cells.

    Attributes:
        rows: records {sampler, grid, steps, nfe, seconds, metric, value, low, high}.
        floor: {metric: value} of data against data.
        floor_rows: the same with intervals, as records.
        recommended: {sampler, grid, steps}, see `recommend`; None without a sampler of this package.
        notes: what was left out, and why.
        description: of the scores: extractor, its hash and accuracy, number of samples and of held-out images.
        replicates: {(label, metric): replicates} for paired comparisons.
        shown: {label: the first samples}.
    """

    rows: list[dict[str, Any]]
    floor: dict[str, float]
    floor_rows: list[dict[str, Any]]
    recommended: dict[str, Any] | None
    notes: list[str]
    description: dict[str, Any]
    replicates: dict[tuple[str, str], Replicates] = field(repr=False)
    shown: dict[str, Tensor] = field(repr=False)

    def paired(self, a: Cell, b: Cell, metric: str = "frechet") -> Interval:
        """Score of a minus score of b on common noise, with its 95% interval; below 0: a is better."""
        return self.replicates[a.label, metric].minus(self.replicates[b.label, metric]).interval()


def recommend(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The cheapest sampler of this package that is not resolvably worse than the best of them.

    Among the rows of this package's samplers let b be the one with the lowest value; every row with value <= b's upper
    bound qualifies, and of these the one with the fewest network evaluations is taken (at equal cost the lowest value).

    Example:
        >>> row = {"sampler": "ddim", "grid": "trailing", "metric": "frechet", "low": 0.0}
        >>> values = {5: 9.0, 10: 2.5, 20: 2.0}
        >>> rows = [row | {"steps": k, "nfe": k, "value": v, "high": v + 1} for k, v in values.items()]
        >>> recommend(rows, "frechet")
        {'sampler': 'ddim', 'grid': 'trailing', 'steps': 10}
    """
    own = [row for row in rows if row["metric"] == metric and row["sampler"] in SAMPLERS]
    if not own:
        return None
    best = min(own, key=lambda row: row["value"])
    good = [row for row in own if row["value"] <= best["high"]]
    chosen = min(good, key=lambda row: (row["nfe"], row["value"]))
    return {key: chosen[key] for key in ("sampler", "grid", "steps")}


def require_enough(n: int, data: Data, blocks: int = 32, name: str = "n") -> None:
    """Refuses numbers that intervals from blocks cannot be made of, before anything is drawn.

    Args:
        n: samples a cell.
        data: their train split is scored as samples, for the floor.
        blocks: of the scorer.
        name: of n, in the message.

    Raises:
        UserError: saying which of both is too small.

    Example:
        >>> from lowvar.data import TensorImages
        >>> few = TensorImages(torch.zeros(9, 1, 2, 2))
        >>> try:
        ...     require_enough(1024, Data("few", few, few, few, levels=256, fingerprint=""))
        ... except UserError as error:
        ...     print(error)
        few has a training split of 9, and scores with intervals need at least 64, two a block: give more data
    """
    if n < 2 * blocks:
        raise UserError(f"{name} is {n}; the {blocks} blocks of an interval need at least {2 * blocks} samples")
    if len(data.train) < 2 * blocks:
        raise UserError(
            f"{data.name} has a training split of {len(data.train)}, and scores with intervals need at least "
            f"{2 * blocks}, two a block: give more data"
        )


def evaluate(
    denoiser: NetworkDenoiser,
    data: Data,
    cells: Sequence[Cell],
    *,
    calibration: Calibration | None = None,
    n: int = 1024,
    noise: NoiseSource | None = None,
    scorer: Scorer | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    keep: int = 64,
    progress: Callable[[int], object] | None = None,
    done: Callable[[Drawn, list[dict[str, Any]]], object] | None = None,
) -> Evaluation:
    """Draws every cell on common noise and scores it.

    Args:
        denoiser: the network.
        data: its held-out split is what samples are compared with.
        cells: what to run; all of them are checked before the first is drawn.
        calibration: what was calibrated for the network; with it come the rows of the twins alone.
        n: samples a cell, at least two a block of the scorer.
        noise: source (default `Independent(0)`).
        scorer: scores (default `Scorer(data)`).
        batch_size: samples a batch.
        device: where the network is.
        keep: first samples of each cell that are kept to be shown.
        progress: called with the number of samples after each network evaluation.
        done: called with each cell's samples and rows.

    Returns:
        The evaluation. A cell with values that are not finite has no row; `notes` names it.

    Raises:
        UserError: for a cell that cannot be run, too few samples or data.
    """
    noise = Independent(0) if noise is None else noise
    with teaching():
        scorer = Scorer(data) if scorer is None else scorer
    require_enough(n, data, scorer.blocks)
    for cell in cells:
        check_cell(cell, denoiser, calibration)
    table = _Table(scorer, keep, done)
    if calibration is not None:
        for name, samples in _alone(calibration, n, noise):
            limited = samples if denoiser.clip is None else samples.clamp(-denoiser.clip, denoiser.clip)
            table.add(Drawn(Cell(name, 0), limited, "none", 0, 0.0))
    for cell in cells:
        table.add(
            draw(
                denoiser,
                cell,
                n,
                data.shape,
                calibration=calibration,
                noise=noise,
                batch_size=batch_size,
                device=device,
                progress=progress,
            )
        )
    floor = scorer.floor(n)
    return Evaluation(
        table.rows,
        {metric: interval.value for metric, interval in floor.items()},
        [_row(metric, interval) for metric, interval in floor.items()],
        recommend(table.rows, scorer.metrics[0]),
        table.notes,
        scorer.description | {"n": n, "floor_n": min(n, len(data.train))},
        table.replicates,
        table.shown,
    )


class _Table:
    """Scores as they come in; see `Evaluation` for what it collects.

    Args:
        scorer: scores.
        keep: first samples of each cell that are kept to be shown.
        done: called with each cell's samples and rows.
    """

    def __init__(self, scorer: Scorer, keep: int, done: Callable[[Drawn, list[dict[str, Any]]], object] | None) -> None:
        self._scorer, self._keep, self._done = scorer, keep, done
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.replicates: dict[tuple[str, str], Replicates] = {}
        self.shown: dict[str, Tensor] = {}

    def add(self, drawn: Drawn) -> None:
        """Scores a cell; one with values that are not finite gets a note and no row."""
        cell, samples = drawn.cell, drawn.samples
        self.shown[cell.label] = samples[: self._keep]
        bad = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
        if bad:
            self.notes.append(
                f"{cell.label} diverged: {bad} of {len(samples)} samples are not finite, so it has no row"
            )
            return
        columns = {
            "sampler": cell.sampler,
            "grid": drawn.grid,
            "steps": cell.steps,
            "nfe": drawn.nfe,
            "seconds": round(drawn.seconds, 3),
        }
        new = []
        for metric, found in self._scorer.replicates(samples).items():
            self.replicates[cell.label, metric] = found
            new.append(columns | _row(metric, found.interval()))
        self.rows.extend(new)
        if self._done is not None:
            self._done(drawn, new)


def _alone(calibration: Calibration, n: int, noise: NoiseSource) -> Iterator[tuple[str, Tensor]]:
    """Samples of the twins, which no network had a part in: the Gaussian's, and the mixture's where it is one."""
    z = noise.normal(range(n), tuple(calibration.event_shape), draw=0)
    yield TWIN_ALONE, calibration.twin.sample(z)
    mixture = calibration.mixture
    if mixture is not None and mixture.components > 1:
        yield MIXTURE_ALONE, mixture.sample(noise.uniform(range(n), (1,), draw=_COMPONENT)[:, 0], z)


def _row(metric: str, interval: Interval) -> dict[str, Any]:
    return {"metric": metric, "value": interval.value, "low": interval.low, "high": interval.high}
