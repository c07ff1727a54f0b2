"""Several processes, one run: what a launcher such as torchrun starts.

`lowvar train` is the one command that shares its work among processes. All of them train; the first ("main") alone
checks and writes --out and speaks, and what it decides is told to the others, so that all end with the same status:

    check, save, publish     on the main process, while the others wait for its word (`main_first`)
    an error of the main     one sentence there; the others end quietly with its status
    the same error in all    one sentence, the main process's
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from lowvar.errors import UserError

__all__ = ["ElsewhereError", "count", "is_main", "join", "main_first"]

T = TypeVar("T")


class ElsewhereError(SystemExit):
    """The main process has failed and said why; this one ends with the same status and no word."""


def _of_launcher(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def count() -> int:
    """Number of processes that the launcher started; 1 without one."""
    return max(1, _of_launcher("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return count() == 1 or _of_launcher("RANK", 0) == 0


def join(device: str) -> None:
    """Meets the other processes, before anything is decided; `device` as of `--device`."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")


def main_first(work: Callable[[], T]) -> T | None:
    """Does the work on the main process; the others return None after it has succeeded.

    Raises:
        ElsewhereError: on the others, if it failed on the main process, where its own error is raised.
    """
    if count() == 1:
        return work()
    if not is_main():
        status = _told(0)
        if status:
            raise ElsewhereError(status)
        return None
    try:
        found = work()
    except BaseException as error:
        _told(UserError.exit_status if isinstance(error, UserError | OSError) else 1)
        raise
    _told(0)
    return found


def _told(status: int) -> int:
    """The main process's status, in all of them."""
    from accelerate.utils import broadcast_object_list

    return int(broadcast_object_list([status])[0])
