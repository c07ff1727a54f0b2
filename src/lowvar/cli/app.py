"""Parsing, dispatch, and the one place where errors become exit statuses.

tyro reads the commands' dataclasses; what it would print as a box becomes one sentence. While a command runs, stdout is
stderr for everybody else (diffusers, datasets and accelerate print as they like), so that a script reads results only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from lowvar.cli import ranks
from lowvar.cli.calibrate import Calibrate
from lowvar.cli.console import Console
from lowvar.cli.demo import Demo
from lowvar.cli.estimate import Estimate
from lowvar.cli.evaluate import Evaluate
from lowvar.cli.explain import explain
from lowvar.cli.options import Command
from lowvar.cli.profile import Profile
from lowvar.cli.report import Report
from lowvar.cli.sample import Sample
from lowvar.cli.stops import Terminated, status_of, stop_word
from lowvar.cli.train import Train
from lowvar.cli.tune import Tune
from lowvar.errors import UserError

__all__ = ["COMMANDS", "main", "parse"]

COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "calibrate": Calibrate,
    "sample": Sample,
    "evaluate": Evaluate,
    "tune": Tune,
    "estimate": Estimate,
    "profile": Profile,
    "report": Report,
}
_ABOUT = "Variance reduction in the reverse process of diffusion and flow models."


_PLAIN = (  # tyro's wording of a wrong value, and ours
    (r"^(--\S+): .*\bINT\b.* from \['(.*?)'\].*", r"\1 is '\2'; give a whole number"),
    (r"^(--\S+): .*\bFLOAT\b.* from \['(.*?)'\].*", r"\1 is '\2'; give a number"),
    (r"^(--\S+): invalid literal for int\(\) with base 10: (.*)", r"\1 is \2; give a whole number"),
    (r"^(--\S+): could not convert string to float: (.*)", r"\1 is \2; give a number"),
    (r"^invalid choice (.*?) for argument '(.*?)'\. Expected one of \((.*)\)", r"\2 is \1; allowed: \3"),
    (r"^[Mm]issing value for argument '(.*?)'.*", r"\1 needs a value"),
)


def _lines(box: str) -> list[str]:
    """The lines of tyro's error box without its frame, up to the pointer to the help; rules between parts are ''.

    Where stdout is not UTF-8 the frame is a heading with a rule of hyphens below it.
    """
    found = [line.replace("│", " ").rstrip() for line in box.splitlines() if not re.match(r"\s*[╭╰]", line)]
    found = ["" if set(line.strip()) <= {"─", "-"} else line for line in found]
    if "╭" not in box:
        found = found[found.index("") + 1 :] if "" in found else found
    end = next((i for i, line in enumerate(found) if "For full helptext" in line or "Argument helptext" in line), None)
    return textwrap.dedent("\n".join(found[:end])).splitlines()


def _sentence(box: str, command: str, words: Sequence[str]) -> str:
    """tyro's error box as one sentence."""
    help_ = f"see `lowvar {command + ' ' if command else ''}--help`"
    if not command:
        known = f"the commands are {', '.join(COMMANDS)}"
        if not words:
            return f"no command was given; {known}; {help_}"
        what = f"there is no option {words[0]}" if words[0].startswith("-") else f"there is no command {words[0]!r}"
        return f"{what}; {known}; {help_}"
    lines = _lines(box)
    if lines and lines[0].startswith("Missing from"):
        entries = [line for line in lines[1:] if re.match(r" {1,6}[-A-Z]", line)]
        missing = ", ".join(line.strip() for line in entries if re.fullmatch(r"\s*(--\S+ )?[A-Z]\S*", line))
        unknown = re.search(r"Unrecognized options:\s+([^\s,]+)", " ".join(lines))
        extra = f", and there is no option {unknown[1]}" if unknown else ""
        return f"required and missing: {missing}{extra}; {help_}"
    flat = " ".join(" ".join(lines).split())
    unknown = re.match(r"Unrecognized options: ([^\s,]+)", flat)
    if unknown:
        near = re.search(r"Perhaps you meant: (--[\w-]+)", flat)
        hint = f" (perhaps {near[1]}?)" if near else ""
        return f"there is no option {unknown[1]}{hint}; {help_}"
    flat = re.sub(r"^Error parsing ", "", flat).rstrip(".")
    for pattern, plain in _PLAIN:
        flat = re.sub(pattern, plain, flat)
    return f"{flat[:1].lower() + flat[1:]}; {help_}"


def _listing() -> str:
    """What `lowvar --help` prints: the commands, each with the first line of its own help."""
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in COMMANDS.items()}
    rows = [
        textwrap.fill(text, 80, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)
        for name, text in about.items()
    ]
    usage = "usage: lowvar [-h] [--version] COMMAND [OPTIONS]"
    return "\n".join([usage, "", _ABOUT, "", "commands:", *rows, "", "`lowvar COMMAND --help` lists its options.", ""])


def parse(words: Sequence[str]) -> Command:
    """The command that the words ask for.

    Raises:
        UserError: if they ask for none, in one sentence.
        SystemExit: with status 0, after help was printed.
    """
    words = list(words)
    if words == ["--version"]:
        from lowvar import __version__

        sys.stdout.write(f"lowvar {__version__}\n")
        raise SystemExit(0)
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write(_listing())
        raise SystemExit(0)
    command = words[0] if words and words[0] in COMMANDS else ""
    if not command:
        raise UserError(_sentence("", command, words))

    import tyro

    errors, config = io.StringIO(), (tyro.conf.FlagCreatePairsOff,)
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(COMMANDS[command], prog=f"lowvar {command}", args=words[1:], config=config)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_sentence(errors.getvalue(), command, words)) from None


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


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
    if ranks.is_main():
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
    # Threads that spin while they wait for each other stall when another program wants the same cores. Measured for a
    # training step of the digits network on two cores: idle .06 s with the default as with 30,000 turns (sleeping at
    # once: .10 s), on a busy machine .50 s with the default and .18 s with 30,000. Read when torch loads, so set here.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


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
            if ranks.count() > 1 and not isinstance(command, Train | Tune):
                raise UserError(
                    f"lowvar {command.name} runs in one process, and a launcher started {ranks.count()} (WORLD_SIZE); "
                    "run it by itself: only `lowvar train` and `lowvar tune` share their work"
                )
            console = Console(json=command.json and ranks.is_main(), quiet=command.quiet or not ranks.is_main())
            _environment()
            with contextlib.redirect_stdout(sys.stderr):
                summary = command.run(console)
    except KeyboardInterrupt as stop:
        _complain(str(stop) or f"{stop_word(stop)}; nothing was written to --out")
        return status_of(stop)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except Exception as error:
        sentence = explain(error)
        if sentence is None and ranks.is_aftermath(error):
            return 1
        if sentence is None:
            raise
        _complain(sentence)
        return UserError.exit_status
    if console.json:
        _print([json.dumps(summary, indent=2, allow_nan=False)])
    elif not console.quiet:
        _print(console.results)
    return 0
