"""Several processes, one run; and being asked to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowvar.cli import ranks
from lowvar.cli.app import main
from lowvar.cli.stops import Terminated
from lowvar.errors import UserError

if TYPE_CHECKING:
    from tests.cli.conftest import Lowvar

TINY = "updates: 4\nbatch_size: 6\ncheckpoint_every: 2\nvalidate_every: 2\nwarmup: 0\nnetwork: {width: 8}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(TINY)
    return file


# ------------------------------------------------------------------------------------------- two processes, simulated


class Line:
    """What the main process has told, in order; the other reads it afterwards."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[int] = []
        self.patch = monkeypatch
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("lowvar.cli.ranks.join", lambda device: None)
        monkeypatch.setattr("accelerate.utils.broadcast_object_list", self.broadcast)

    def broadcast(self, values: list[int]) -> list[int]:
        if os.environ["RANK"] == "0":
            self.said.append(values[0])
            return values
        return [self.said.pop(0)]

    def as_rank(self, rank: int) -> None:
        self.patch.setenv("RANK", str(rank))


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(monkeypatch)


def test_only_the_main_process_works(line: Line) -> None:
    done: list[int] = []

    def work() -> int:
        done.append(int(os.environ["RANK"]))
        return 7

    line.as_rank(0)
    assert ranks.main_first(work) == 7
    line.as_rank(1)
    assert ranks.main_first(work) is None
    assert done == [0]
    assert line.said == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("no"), 2),
        (OSError(28, "No space left on device"), 2),
        (KeyError("fault"), 1),
        (KeyboardInterrupt(), 130),
        (Terminated(), 143),
    ],
    ids=["user", "disk", "fault", "Ctrl-C", "SIGTERM"],
)
def test_others_end_with_the_main_process_status(line: Line, error: BaseException, status: int) -> None:
    def work() -> None:
        raise error

    line.as_rank(0)
    with pytest.raises(type(error)):
        ranks.main_first(work)
    line.as_rank(1)
    with pytest.raises(ranks.ElsewhereError) as caught:
        ranks.main_first(work)
    assert caught.value.code == status


def test_refusal_is_said_once(line: Line, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--out is there already: the same status in both, the sentence in one, nothing written."""
    out = tmp_path / "run"
    out.mkdir()
    words = ["train", "--data", "digits", "--config", str(config), "--out", str(out)]
    said = []
    for rank in (0, 1):
        line.as_rank(rank)
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        said.append(captured.err)
    assert "exists already" in said[0]
    assert said[1] == ""
    assert list(out.iterdir()) == []
    assert not (tmp_path / "run.partial").exists()


def test_other_commands_refuse_a_launcher(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for rank in (0, 1):
        line.as_rank(rank)
        assert main(["sample", "--model", "m", "--out", str(tmp_path / "s.npz")]) == 2
        said.append(capsys.readouterr().err)
    assert "lowvar sample runs in one process, and a launcher started 2" in said[0]
    assert said[1] == ""


def test_aftermath_is_quiet(line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The main process is gone: the others' broken connection is no news; a fault of their own is."""
    from lowvar.cli.train import Train

    def breaking(error: Exception) -> Callable[..., dict[str, Any]]:
        def run(*_: object) -> dict[str, Any]:
            raise error

        return run

    words = ["train", "--data", "digits", "--out", "run"]
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:30000")
    line.as_rank(1)
    monkeypatch.setattr(Train, "run", breaking(gone))
    assert main(words) == 1
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Train, "run", breaking(KeyError("fault")))
    with pytest.raises(KeyError):
        main(words)
    line.as_rank(0)
    monkeypatch.setattr(Train, "run", breaking(gone))
    with pytest.raises(RuntimeError):
        main(words)


def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone:
        num_processes = 1

        def __init__(self, cpu: bool) -> None: ...

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", Alone)
    with pytest.raises(UserError, match=r"started 2 processes .* and 1 of them found each other"):
        ranks.join("cpu")


# --------------------------------------------------------------------------------------------------- two real processes


def environment(rank: int, port: int) -> dict[str, str]:
    own = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    return os.environ | own | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def both(words: list[object], port: int) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of the two processes of a run."""
    script = "import sys; from lowvar.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *(str(w) for w in words)]
    started = [
        subprocess.Popen(
            command, env=environment(rank, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    ended = [process.communicate(timeout=200) for process in started]
    return [(p.returncode, out, err) for p, (out, err) in zip(started, ended, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("head", ["range", "basis"])
def test_two_processes_make_one_run(config: Path, tmp_path: Path, port: int, head: str) -> None:
    """One folder, written once; a second run is refused by both with one sentence."""
    out = tmp_path / "run"
    words: list[object] = ["train", "--data", "digits", "--config", config, "--head", head, "--out", out, "--json"]
    (status, said, _), (other, other_said, other_err) = both(words, port)
    assert (status, other) == (0, 0)
    assert said.startswith("{")
    assert (other_said, other_err) == ("", "")
    assert {"model_index.json", "summary.json", "report.html", "unet"} <= {p.name for p in out.iterdir()}
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml", "run"]
    (status, _, err), (other, _, other_err) = both(words, port)
    assert (status, other) == (2, 2)
    assert "exists already" in err
    assert other_err == ""


@pytest.mark.slow
def test_torchrun(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom lowvar.cli import main\nsys.exit(main())\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words = ["train", "--data", "digits", "--config", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("validation loss") == 1
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert not (tmp_path / "run.partial").exists()


# -------------------------------------------------------------------------------------------------------------- SIGTERM


def test_sigterm_keeps_the_run(lowvar: Lowvar, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, status 143 and the checkpoints kept, as after Ctrl-C (whose resumed run is tested there)."""
    from lowvar.train.loop import Trainer

    words = ["train", "--data", "digits", "--config", config]
    before, whole = signal.getsignal(signal.SIGTERM), Trainer.run

    def run(self: Trainer) -> Iterator[Any]:
        for record in whole(self):
            yield record
            if self.update == 3:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", run)
        done = lowvar(*words, "--out", tmp_path / "run")
    assert done.status == 143
    assert done.sentence.startswith("terminated after 3 of 4 updates; ")
    assert done.sentence.endswith("update-0000002 is kept: give the same command with --resume to go on")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "run.partial" / "checkpoints" / "update-0000002").is_dir()


def test_sigterm_in_other_commands(lowvar: Lowvar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("lowvar.cli.sample.Sample.run", stopped)
    done = lowvar("sample", "--model", "m", "--out", tmp_path / "s.npz")
    assert done.status == 143
    assert done.sentence == "terminated; nothing was written to --out"
