"""A run as one self-contained HTML page, rebuilt from the files in its folder and from nothing else."""

from __future__ import annotations

from lowvar.report.page import build

__all__ = ["build"]
