"""What a command says: results on stdout at the end, progress and notes on stderr, nothing anywhere with --quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Console", "Progress", "score_table"]


class Progress(Protocol):
    """A progress bar."""

    def update(self, n: float | None = 1) -> object:
        """n more are done."""
        ...

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> object:
        """A word at the end of the line."""
        ...


@dataclass
class Console:
    """Where a command's words go.

    Args:
        json: stdout is kept for the summary.
        quiet: nothing is shown but errors.

    Attributes:
        results: what is printed on stdout once the command has succeeded.
    """

    json: bool = False
    quiet: bool = False
    results: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def result(self, text: str) -> None:
        """A line of the result, printed on stdout at the end unless --json or --quiet."""
        self.results.append(text)

    @contextmanager
    def progress(self, total: float, what: str, unit: str = "it") -> Iterator[Progress]:
        """A bar with the time left on stderr; on a file it is renewed every ten seconds only."""
        from tqdm import tqdm

        interval = 0.2 if sys.stderr.isatty() else 10.0
        style = "{desc}: {percentage:3.0f}%|{bar:24}| {elapsed}, {remaining} left{postfix}"
        with tqdm(
            total=total,
            desc=what,
            unit=unit,
            file=sys.stderr,
            disable=self.quiet,
            mininterval=interval,
            bar_format=style,
            dynamic_ncols=True,
        ) as bar:
            yield bar


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def score_table(
    rows: Sequence[Mapping[str, Any]], floor: Mapping[str, float], metrics: Sequence[str], title: str = ""
) -> str:
    """Rows of scores as a text table: a line a sampler and number of steps, a column a metric with its 95% interval.

    Args:
        rows: records {sampler, grid, steps, nfe, metric, value, low, high}.
        floor: {metric: value} of data against data, the last line.
        metrics: which columns.
        title: above it.
    """
    from io import StringIO

    from rich.box import SIMPLE_HEAD
    from rich.console import Console as Terminal
    from rich.table import Table

    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in ("sampler", "grid"):
        table.add_column(heading, no_wrap=True)
    for heading in ("steps", "nfe", *metrics):
        table.add_column(heading, justify="right", no_wrap=True)
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        key = (row["sampler"], row["grid"], row["steps"], row["nfe"])
        reach = (row["high"] - row["low"]) / 2
        cells.setdefault(key, {})[row["metric"]] = f"{_number(row['value'])} ±{_number(reach)}"
    order = sorted(cells, key=lambda key: key[2])
    for i, key in enumerate(order):
        last = i + 1 == len(order) or order[i + 1][2] != key[2]
        table.add_row(*map(str, key), *(cells[key].get(metric, "") for metric in metrics), end_section=last)
    table.add_row("data against data", "", "", "", *(_number(floor[m]) if m in floor else "" for m in metrics))
    out = StringIO()
    Terminal(file=out, width=120, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())
