"""A section of the page: where it stands, what it is called, and what its template shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Section"]


@dataclass(frozen=True)
class Section:
    """A section of the page: its anchor, its heading, and the template that shows `content`."""

    anchor: str
    title: str
    template: str
    content: Mapping[str, Any]
