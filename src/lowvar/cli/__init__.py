"""The command `lowvar`: one module a command, parsed before anything heavy is imported.

`main(argv)` returns the exit status: 0, 2 for bad input (one sentence on stderr), 130 for Ctrl-C, 143 for SIGTERM.
Results go to stdout, progress, notes and warnings to stderr.
"""

from __future__ import annotations

from lowvar.cli.app import main

__all__ = ["main"]
