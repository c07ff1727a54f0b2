"""Several processes, one run: what a launcher such as torchrun starts.

`lowvar train` and `lowvar tune` share their work among processes. All of them compute; the first ("main") alone
checks and writes --out and speaks, and what it decides is told to the others, so that all end with the same status:

    check, save, publish     on the main process, while the others wait for its word (`main_first`)
    an error of the main     one sentence there; the others end quietly with its status
    the same error in all    one sentence, the main process's
    the main is gone         a process that finds the connection closed ends quietly with status 1
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TypeVar

from lowvar.cli.explain import explain
from lowvar.cli.stops import status_of
from lowvar.errors import UserError

__all__ = ["ElsewhereError", "count", "is_aftermath", "is_main", "join", "main_first"]

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


def is_aftermath(error: Exception) -> bool:
    """Whether this is not the main process, and it failed because another one is gone."""
    return not is_main() and bool(re.search(r"[Cc]onnection (closed|reset)|[Bb]roken pipe", str(error)))


def join(device: str) -> None:
    """Meets the other processes, before anything is decided; `device` as of `--device`.

    Raises:
        UserError: if they do not find each other.
    """
    if count() > 1:
        import torch
        from accelerate import PartialState

        met = PartialState(cpu=device == "cpu" or not torch.cuda.is_available()).num_processes
        if met != count():
            raise UserError(
                f"a launcher started {count()} processes (WORLD_SIZE), and {met} of them found each other; start them "
                "with torchrun or accelerate, or one process without WORLD_SIZE in the environment"
            )


def main_first(work: Callable[[], T]) -> T | None:
    """Does the work on the main process once all are here; the others return None after it has succeeded.

    Raises:
        ElsewhereError: on the others, if it failed on the main process, where its own error is raised.
    """
    if count() == 1:
        return work()
    _told(0)  # nobody is still reading what the work may move
    if not is_main():
        status = _told(0)
        if status:
            raise ElsewhereError(status)
        return None
    try:
        found = work()
    except KeyboardInterrupt as stop:
        _told(status_of(stop))
        raise
    except Exception as error:
        _told(1 if explain(error) is None else UserError.exit_status)
        raise
    _told(0)
    return found


def _told(status: int) -> int:
    """The main process's status, in all of them."""
    from accelerate.utils import broadcast_object_list

    return int(broadcast_object_list([status])[0])
