"""Being asked to stop: by Ctrl-C (KeyboardInterrupt) or by SIGTERM (`Terminated`), with the same tidy end."""

from __future__ import annotations

__all__ = ["Terminated", "stop_word"]


class Terminated(KeyboardInterrupt):
    """SIGTERM, such as a job scheduler's or a container's end; whatever tidies up after Ctrl-C does so after it."""

    status = 143


def stop_word(stop: KeyboardInterrupt) -> str:
    """What has happened, as a participle.

    Example:
        >>> stop_word(KeyboardInterrupt()), stop_word(Terminated())
        ('interrupted', 'terminated')
    """
    return "terminated" if isinstance(stop, Terminated) else "interrupted"
