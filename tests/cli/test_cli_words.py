"""What the command line says: help, usage errors, streams, exit statuses."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowvar.cli.app import COMMANDS
from lowvar.cli.console import score_table

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar

COMMAND = Path(sys.executable).with_name("lowvar")


def test_list_of_commands(lowvar: Lowvar) -> None:
    done = lowvar("--help")
    assert done.status == 0
    assert all(f"\n  {name} " in done.out for name in COMMANDS)
    assert "with a 95% interval" in " ".join(done.out.split())
    assert done.out == lowvar("-h").out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_command(lowvar: Lowvar, name: str) -> None:
    done = lowvar(name, "--help")
    assert done.status == 0
    assert f"usage: lowvar {name}" in done.out
    assert done.err == ""


def test_version(lowvar: Lowvar) -> None:
    assert lowvar("--version").out.startswith("lowvar 0.")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no command was given; the commands are demo, train"),
        (["tune-up"], "there is no command 'tune-up'; the commands are"),
        (["--fast"], "there is no option --fast"),
        (["sample"], "required and missing: --model PATH, --out PATH"),
        (["sample", "--modl", "x"], "required and missing: --model PATH, --out PATH, and there is no option --modl"),
        (["train", "--data", "digits", "--out", "o", "--udates", "3"], "no option --udates (perhaps --updates?)"),
        (["train", "--data", "digits", "--out", "o", "--updates", "x"], "--updates is 'x'; give a whole number"),
        (["sample", "--model", "m", "--out", "o", "--n", "x"], "--n is 'x'; give a whole number"),
        (["sample", "--model", "m", "--out", "o", "--eta", "x"], "--eta is 'x'; give a number"),
        (["train", "--data", "digits", "--out"], "--out needs a value"),
        (
            ["train", "--data", "d", "--out", "o", "--device", "tpu"],
            "--device is 'tpu'; allowed: 'auto', 'cpu', 'cuda'",
        ),
        (["report"], "required and missing: RUN"),
        (["report", "a", "b"], "there is no option b"),
    ],
)
def test_usage_is_one_sentence(lowvar: Lowvar, words: list[str], said: str) -> None:
    done = lowvar(*words)
    assert done.status == 2
    assert said in done.sentence
    assert "--help`" in done.sentence
    assert done.out == ""
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/1"), 2, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x (Permission denied)"),
        (MemoryError(), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_statuses(
    lowvar: Lowvar, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, status: int, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(COMMANDS["report"], "run", fail)
    done = lowvar("report", tmp_path)
    assert done.status == status
    assert said in done.sentence


def test_faults_of_the_program_are_not_hidden(lowvar: Lowvar, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(COMMANDS["report"], "run", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        lowvar("report", "x")


def test_third_parties_do_not_reach_stdout(lowvar: Lowvar, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatter(*_: object) -> dict[str, int]:
        sys.stdout.write("loading\n")
        return {"a": 1}

    monkeypatch.setattr(COMMANDS["report"], "run", chatter)
    done = lowvar("report", "x", "--json")
    assert done.json == {"a": 1}
    assert "loading" in done.err
    assert lowvar("report", "x").out == ""


def test_as_a_process() -> None:
    done = subprocess.run([COMMAND, "sample", "--steps", "3"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lowvar: required and missing: --model PATH, --out PATH;")


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lowvar.cli.app import parse; parse(['demo', '--quick', '--seed', '3']);"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_score_table_has_a_line_a_cell() -> None:
    row = {"sampler": "ddim", "grid": "trailing", "steps": 5, "nfe": 5, "metric": "energy", "low": 0.1, "high": 0.3}
    rows = [row | {"value": 0.2}, row | {"steps": 10, "nfe": 10, "value": 0.15}]
    text = score_table(rows, {"energy": 0.01}, ["energy"])
    assert text.count("ddim") == 2
    assert "0.2 ±0.1" in text
    assert "data against data" in text
