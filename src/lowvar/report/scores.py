"""The score board: who was best at each number of steps, and by how much against the best peer.

All metrics are smaller for better samples. Samplers named `diffusers:...` are peers; "Gaussian twin alone" and "Mixture
twin alone" ask no network (0 NFE) and take part in no ranking. A difference is *clear* if the paired interval
(same noise) excludes 0 where the run has one, and otherwise if the two 95% intervals do not overlap, which is stricter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lowvar.report.run import Run, mapping, number
from lowvar.report.text import METRICS, count

__all__ = ["Board", "Comparison", "Score", "board", "steps_text"]

_FILE = "summary.json"
Verdict = Literal["ahead", "level", "behind", "open"]


@dataclass(frozen=True)
class Score:
    """A row of the summary: a sampler's value in a metric with its 95% interval and wall clock (NaN where unknown)."""

    sampler: str
    grid: str
    steps: float
    nfe: float
    metric: str
    value: float
    low: float
    high: float
    seconds: float = math.nan

    @property
    def is_twin_alone(self) -> bool:
        """Whether this is the row of a twin without a network."""
        return self.sampler.lower().endswith("twin alone")

    @property
    def is_peer(self) -> bool:
        """Whether the sampler is another library's."""
        return self.sampler.startswith("diffusers:")


@dataclass(frozen=True)
class Comparison:
    """The best of ours and the best peer at one number of steps; `open` where one or the intervals are missing."""

    steps: float
    best: Score | None
    peer: Score | None
    verdict: Verdict
    paired: bool = False

    @property
    def ratio(self) -> float:
        """The peer's value over ours; NaN where a ratio has no meaning."""
        if self.best is None or self.peer is None or self.best.value <= 0 or self.peer.value <= 0:
            return math.nan
        return self.peer.value / self.best.value


@dataclass(frozen=True)
class Board:
    """All scores of a run.

    Attributes:
        scores: the rows.
        floor: data against data by metric: (value, low, high).
        paired: (steps, metric, sampler, against) -> (low, high) of the paired difference.
    """

    scores: tuple[Score, ...]
    floor: Mapping[str, tuple[float, float, float]]
    paired: Mapping[tuple[float, str, str, str], tuple[float, float]]

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics present, the acceptance metric first."""
        present = list(dict.fromkeys(score.metric for score in self.scores))
        return (*(key for key in METRICS if key in present), *(key for key in present if key not in METRICS))

    @cached_property
    def steps(self) -> tuple[float, ...]:
        """Numbers of steps, increasing; the twin alone has 0 and stands first."""
        return tuple(sorted({score.steps for score in self.scores}))

    @cached_property
    def _grids(self) -> dict[str, set[str]]:
        grids: dict[str, set[str]] = {}
        for score in self.scores:
            grids.setdefault(score.sampler, set()).add(score.grid)
        return grids

    def label(self, score: Score) -> str:
        """The sampler's name, with its grid where the same sampler ran on several."""
        several = len(self._grids.get(score.sampler, ())) > 1 and score.grid
        return f"{score.sampler} ({score.grid})" if several else score.sampler

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Samplers as labelled: ours, then peers, each in the order of the run; not the twin alone."""
        ours = [self.label(score) for score in self.scores if not score.is_peer and not score.is_twin_alone]
        peers = [self.label(score) for score in self.scores if score.is_peer]
        return tuple(dict.fromkeys([*ours, *peers]))

    def of(self, label: str, metric: str) -> list[Score]:
        """A sampler's scores in a metric by NFE, finite ones only."""
        found = [s for s in self.scores if s.metric == metric and self.label(s) == label and math.isfinite(s.value)]
        return sorted(found, key=lambda score: (score.nfe, score.steps))

    def best(self, steps: float, metric: str, among: Literal["all", "ours", "peers"] = "all") -> Score | None:
        """The smallest finite value at a number of steps."""
        found = [
            score
            for score in self.scores
            if score.steps == steps
            and score.metric == metric
            and math.isfinite(score.value)
            and not score.is_twin_alone
            and (among == "all" or score.is_peer == (among == "peers"))
        ]
        return min(found, key=lambda score: score.value, default=None)

    def compare(self, steps: float, metric: str) -> Comparison:
        """Ours against the peers at a number of steps."""
        best, peer = self.best(steps, metric, "ours"), self.best(steps, metric, "peers")
        if best is None or peer is None:
            return Comparison(steps, best, peer, "open")
        difference = self.paired.get((steps, metric, best.sampler, peer.sampler))
        low, high = difference or (best.low - peer.high, best.high - peer.low)
        if not (math.isfinite(low) and math.isfinite(high)):
            return Comparison(steps, best, peer, "open")
        verdict: Verdict = "ahead" if high < 0 else "behind" if low > 0 else "level"
        return Comparison(steps, best, peer, verdict, difference is not None)

    def comparisons(self, metric: str) -> list[Comparison]:
        """`compare` at every number of steps at which anything ran."""
        found = [self.compare(steps, metric) for steps in self.steps]
        return [c for c in found if c.best is not None or c.peer is not None]


def steps_text(steps: Iterable[float]) -> str:
    """Numbers of steps as words: '3, 5 and 10 steps'."""
    shown = [count(n) for n in steps]
    head = f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else "".join(shown)
    return f"{head} step" if shown == ["1"] else f"{head} steps"


def _score(run: Run, row: Any, i: int) -> Score:
    row = mapping(run, _FILE, f"row {i} of `rows`", row)
    for key in ("sampler", "metric"):
        if not isinstance(row.get(key), str):
            raise run.wrong(_FILE, f"row {i} of `rows` has no {key}")
    values = {key: number(row.get(key)) for key in ("steps", "nfe", "value", "low", "high", "seconds")}
    for key, value in values.items():
        if value is None or (key == "steps" and not math.isfinite(value)):
            raise run.wrong(_FILE, f"`{key}` in row {i} of `rows` is {row.get(key)!r}, not a number")
    steps, nfe, value, low, high, seconds = (math.nan if v is None else v for v in values.values())
    grid = row.get("grid")
    nfe = nfe if math.isfinite(nfe) else steps
    return Score(
        row["sampler"], "" if grid is None else str(grid), steps, nfe, row["metric"], value, low, high, seconds
    )


def _floor(run: Run, key: str, value: Any) -> tuple[float, float, float]:
    parts = (
        (value.get("value"), value.get("low"), value.get("high")) if isinstance(value, Mapping) else (value, None, None)
    )
    found = [number(part) for part in parts]
    if any(part is None for part in found):
        raise run.wrong(_FILE, f"the floor of {key} is not a number")
    a, b, c = (math.nan if part is None else part for part in found)
    return a, b, c


def _pairs(run: Run) -> dict[tuple[float, str, str, str], tuple[float, float]]:
    pairs: dict[tuple[float, str, str, str], tuple[float, float]] = {}
    rows = run.figure("paired") or []
    if not isinstance(rows, list):
        raise run.wrong("figures.json", "`paired` is not a list")
    for i, row in enumerate(rows, 1):
        row = mapping(run, "figures.json", f"row {i} of `paired`", row)
        steps, low, high = (number(row.get(key)) for key in ("steps", "low", "high"))
        if steps is None or low is None or high is None or math.isnan(steps):
            raise run.wrong("figures.json", f"row {i} of `paired` lacks a number")
        if math.isfinite(low) and math.isfinite(high):
            pairs[steps, str(row.get("metric")), str(row.get("sampler")), str(row.get("against"))] = (low, high)
    return pairs


def board(run: Run) -> Board | None:
    """The scores of a run, or None where it has none.

    Raises:
        UserError: for a row that is no row; the sentence says which.
    """
    rows = run.summary.get("rows")
    if not rows:
        return None
    if not isinstance(rows, list):
        raise run.wrong(_FILE, "`rows` is not a list")
    floor = dict(mapping(run, _FILE, "`floor`", run.summary.get("floor")))
    with_intervals = run.summary.get("floor_rows")
    for row in with_intervals if isinstance(with_intervals, list) else []:  # the same values with their intervals
        floor[str(mapping(run, _FILE, "a row of `floor_rows`", row).get("metric"))] = row
    return Board(
        tuple(_score(run, row, i) for i, row in enumerate(rows, 1)),
        {key: _floor(run, key, value) for key, value in floor.items()},
        _pairs(run),
    )
