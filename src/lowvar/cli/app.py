"""Parsing, dispatch, and the one place where errors become exit statuses.

tyro reads the commands' dataclasses; what it would print as a box becomes one sentence. While a command runs, stdout is
stderr for everybody else (diffusers, datasets and accelerate print as they like), so that a script reads results only.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from lowvar.cli.calibrate import Calibrate
from lowvar.cli.console import Console
from lowvar.cli.demo import Demo
from lowvar.cli.evaluate import Evaluate
from lowvar.cli.options import Command
from lowvar.cli.report import Report
from lowvar.cli.sample import Sample
from lowvar.cli.train import Train
from lowvar.errors import UserError

__all__ = ["COMMANDS", "main", "parse"]

COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "calibrate": Calibrate,
    "sample": Sample,
    "evaluate": Evaluate,
    "report": Report,
}
_ABOUT = "Variance reduction in the reverse process of diffusion and flow models."
_INTERRUPTED = 130


def _sentence(box: str, words: Sequence[str]) -> str:
    """tyro's error box as one sentence."""
    text = re.sub(r"[╭╮╰╯│─━┃┏┓┗┛|]+", lambda match: "\n" if "─" in match.group() else " ", box)
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=\s*\n)", text)]
    flat = " ".join(part for part in parts if part)
    command = words[0] if words and words[0] in COMMANDS else ""
    flat = re.split(r"For full helptext|Argument helptext", flat)[0].strip()
    # the box's title repeats its first words: "Missing argument Missing value for ..."
    titles = "Value error|Required options|Unrecognized options|Missing subcommand|Invalid choice|Missing argument"
    flat = re.sub(rf"^(?:{titles})\s+", "", flat)
    if not words or flat.startswith("Expected one of"):
        flat = f"no command was given; the commands are {', '.join(COMMANDS)}"
    elif not command and not words[0].startswith("-"):
        flat = f"there is no command {words[0]!r}; the commands are {', '.join(COMMANDS)}"
    else:
        flat = re.sub(r"Perhaps you meant: (--[\w-]+).*", r"(perhaps you meant \1)", flat)
        flat = re.sub(rf"Missing from lowvar {command}:", "these are required and missing:", flat)
        flat = re.sub(r"Error parsing ", "", flat).rstrip(".")
        flat = flat[:1].lower() + flat[1:]
    return f"{flat}; see `lowvar {command + ' ' if command else ''}--help`"


def parse(words: Sequence[str]) -> Command:
    """The command that the words ask for.

    Raises:
        UserError: if they ask for none, in one sentence.
        SystemExit: with status 0, after help was printed.
    """
    import tyro

    errors = io.StringIO()
    words = list(words)
    if words == ["--version"]:
        from lowvar import __version__

        sys.stdout.write(f"lowvar {__version__}\n")
        raise SystemExit(0)
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="lowvar", description=_ABOUT, args=words, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_sentence(errors.getvalue(), words)) from None


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


def _explain(error: Exception) -> str | None:
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


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, through every `finally`; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(text: str) -> None:
    sys.stderr.write(f"lowvar: {' '.join(text.split())}\n")


def _print(lines: Sequence[str]) -> None:
    """Lines on stdout; a reader that has gone away is no error."""
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (what is flushed at exit goes there)


def _environment() -> None:
    """Settings that third parties read when they are imported: nothing is fetched, nothing is announced."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the words after `lowvar` (default: the process's).

    Returns:
        The exit status.

    Example:
        >>> main(["sample", "--steps", "ten"])
        2
    """
    words = sys.argv[1:] if argv is None else list(argv)
    summary: dict[str, Any] = {}
    console = Console()
    try:
        with _tidy_end():
            command = parse(words)
            console = Console(json=command.json, quiet=command.quiet)
            _environment()
            with contextlib.redirect_stdout(sys.stderr):
                summary = command.run(console)
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted; nothing was written to --out")
        return _INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        sentence = _explain(error)
        if sentence is None:
            raise
        _complain(sentence)
        return UserError.exit_status
    if console.json:
        _print([json.dumps(summary, indent=2, allow_nan=False)])
    elif not console.quiet:
        _print(console.results)
    return 0
