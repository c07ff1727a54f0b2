"""Being asked to stop: by Ctrl-C (KeyboardInterrupt) or by SIGTERM (`Terminated`), with the same tidy end."""

from __future__ import annotations

import signal

__all__ = ["Terminated", "status_of", "stop_word"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, such as a job scheduler's or a container's end; whatever tidies up after Ctrl-C does so after it."""


def status_of(stop: KeyboardInterrupt) -> int:
    """The exit status of a process so ended, 128 and the signal's number.

    Example:
        >>> status_of(KeyboardInterrupt()), status_of(Terminated())
        (130, 143)
    """
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def stop_word(stop: KeyboardInterrupt) -> str:
    """What has happened, as a participle.

    Example:
        >>> stop_word(KeyboardInterrupt()), stop_word(Terminated())
        ('interrupted', 'terminated')
    """
    return "terminated" if isinstance(stop, Terminated) else "interrupted"
