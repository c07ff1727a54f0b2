"""The one exception whose text is meant for the person at the command line.

`UserError` carries one sentence that says what was wrong, the allowed values and what to do. The command line prints
it without a traceback and leaves with `exit_status`; in a program it is a `ValueError` like any other.
"""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """Bad input: one sentence with the offending value, the allowed values and the next action.

    Example:
        >>> from lowvar.errors import UserError
        >>> try:
        ...     raise UserError("steps is 0; give a whole number from 1 to 1000")
        ... except ValueError as error:
        ...     print(error, error.exit_status)
        steps is 0; give a whole number from 1 to 1000 2
    """

    exit_status: int = 2
