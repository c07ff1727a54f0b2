"""Runs of a benchmark that are not made twice: kept in a folder, then in the committed results.

A run is a name and a JSON object. `Kept` looks first in the folder (a file a run, so an interrupted benchmark goes on),
then under "runs" of the results file (so a fresh clone adds runs to those that were committed).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kept:
    """The runs of one benchmark."""

    folder: Path
    results: Path

    def _committed(self) -> dict[str, Any]:
        return json.loads(self.results.read_text()).get("runs", {}) if self.results.exists() else {}

    def __getitem__(self, name: str) -> dict[str, Any] | None:
        """The run of that name, None if it was not made."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else self._committed().get(name)

    def __setitem__(self, name: str, run: dict[str, Any]) -> None:
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))

    def all(self) -> dict[str, Any]:
        """Every run that was made, by name, sorted."""
        made = {str(p.relative_to(self.folder).with_suffix("")): p for p in self.folder.rglob("*.json")}
        runs = self._committed() | {name: json.loads(p.read_text()) for name, p in made.items()}
        return dict(sorted(runs.items()))


def written(results: dict[str, Any]) -> str:
    """Results as JSON, each of their "runs" on a line of its own."""
    head = json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=1)
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(results["runs"].items()))
    return head.removesuffix("\n}") + ',\n "runs": {' + (f"\n{runs}\n " if runs else "") + "}\n}\n"
