"""Errors that the machine or the input is to blame for, in one sentence."""

from __future__ import annotations

import errno
import re

from lowvar.errors import UserError

__all__ = ["explain"]


def _disk_full(error: BaseException) -> bool:
    """Whether a full disk is behind the error: safetensors and torch hide the errno in their own exceptions."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if re.search(r"No space left on device|os error 28|PytorchStreamWriter failed writing", str(current)):
            return True
        current = current.__cause__ or current.__context__
    return False


def explain(error: Exception) -> str | None:
    """The sentence for an error that the machine or the input is to blame for; None for a fault of this program."""
    if isinstance(error, UserError):
        return str(error)
    if _disk_full(error):
        return "the disk is full, and nothing was written to --out; make room or give --out on another disk"
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        return f"cannot read or write{where} ({error.strerror or error}); check the path and its permissions"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "there is not enough memory; give a smaller --batch-size"
    return None
