"""Outputs that are there completely or not at all.

A folder is written under a temporary name beside its place and renamed at the end; a file likewise. Whatever happens in
between, Ctrl-C and a full disk included, what stood there before still stands there. A long run lives in OUT.partial,
with its checkpoints, until it is done.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowvar.errors import UserError

__all__ = [
    "check_free",
    "clear_partial",
    "is_run",
    "kept",
    "make_way",
    "new_file",
    "new_folder",
    "partial_of",
    "publish",
]


def is_run(folder: Path) -> bool:
    """Whether the folder was written by a command of this package."""
    return (folder / "summary.json").is_file() and (folder / "config.yaml").is_file()


def _is_precious(path: Path) -> bool:
    """Whether replacing the folder would take away more than a run: a home, a repository, where we stand."""
    path = path.resolve()
    return path in (Path.home(), *Path.cwd().parents, Path.cwd()) or (path / ".git").exists() or path.is_mount()


def check_free(out: Path, *, overwrite: bool, replaces_runs: bool = False) -> None:
    """Raises UserError unless `out` may be written.

    Args:
        out: file or folder.
        overwrite: whether --overwrite was given.
        replaces_runs: whether a folder that holds a run is replaced without being asked.
    """
    if not (out.exists() or out.is_symlink()):
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"--out is {out}, but {above} is a file; give a path in a folder")
        return
    if replaces_runs and out.is_dir() and is_run(out) and not _is_precious(out):
        return
    if not overwrite:
        raise UserError(f"--out {out} exists already; give another path, or --overwrite to replace it")
    if out.is_dir() and _is_precious(out):
        raise UserError(
            f"--out {out} is not replaced: it is a repository, a home or the current folder; give another path"
        )


def publish(temporary: Path, out: Path) -> None:
    """Renames a finished folder to its place; what stood there goes only after that has worked."""
    if not (out.exists() or out.is_symlink()):
        temporary.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    old = aside / "old"
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        old.rename(out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def partial_of(out: Path) -> Path:
    """Where an unfinished run lives."""
    return out.with_name(out.name + ".partial")


def clear_partial(partial: Path) -> None:
    """Removes an unfinished run.

    Raises:
        UserError: if the folder is something else.
    """
    if not partial.is_dir() or (any(partial.iterdir()) and not (partial / "config.yaml").is_file()):
        raise UserError(f"{partial} is no unfinished run, and is not removed; give another --out")
    shutil.rmtree(partial)


def make_way(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuses what is in the way of `out` and of its unfinished run, or removes the latter where that was asked for."""
    check_free(out, overwrite=overwrite)
    partial = partial_of(out)
    if partial.exists() and not resume:
        if not overwrite:
            raise UserError(f"{partial} holds an unfinished run; go on with --resume, or start anew with --overwrite")
        clear_partial(partial)


def kept(partial: Path) -> str:
    """Which checkpoint an interrupted run has, in words."""
    folder = partial / "checkpoints"
    newest = max((path.name for path in folder.glob("update-*")), default=None) if folder.is_dir() else None
    return f"{partial} has no checkpoint yet" if newest is None else f"{folder / newest} is kept"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def new_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block succeeds, and goes if it does not.

    Raises:
        UserError: if `out` exists and is not to be replaced.
    """
    check_free(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        publish(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def new_file(out: Path, *, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A temporary file beside `out`, open for binary writing, that becomes `out` if the block succeeds.

    Raises:
        UserError: if `out` exists and is not to be replaced.
    """
    check_free(out, overwrite=overwrite)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder, and one file is written; give the file's path")
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
