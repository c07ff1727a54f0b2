"""`lowvar report RUN`: rebuilds RUN/report.html from the files in RUN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowvar.cli.console import Console
from lowvar.cli.options import Command
from lowvar.errors import UserError

__all__ = ["Report"]


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Rebuild RUN/report.html from the files in RUN."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of a finished run"""

    def run(self, console: Console) -> dict[str, Any]:
        """See the base class."""
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.folder}; give the folder of a finished run")
        import json

        from lowvar.report import build

        page = build(self.folder)
        console.result(str(page))
        return json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
