"""What every test runs under: one thread a worker, seeded global generators, no network, no display.

The settings are made when this file is imported, before any test imports torch.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, and no deadline: the machine that runs the tests may be busy.
hypothesis.settings.register_profile("lowvar", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("lowvar")

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Nothing is fetched in a test: a loader that tries to fails at once, and says so.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_name, "1")

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the global generators, which only network initialisation and third parties draw from."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _gpu_or_skip(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@dataclass(frozen=True)
class Browser:
    """A headless Chromium, one process a call, with a profile of its own and no network."""

    executable: str
    profile: Path

    def _run(self, page: Path, *flags: str, seconds: float) -> subprocess.CompletedProcess[str]:
        command = [
            self.executable,
            "--headless=new",
            "--no-sandbox",  # tests may run as root in a container
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # a self-contained page asks for nothing
            f"--user-data-dir={self.profile}",
            "--virtual-time-budget=5000",
            *flags,
            page.resolve().as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)

    def dom(self, page: Path, seconds: float = 60) -> str:
        """The document as HTML after its scripts have run."""
        return self._run(page, "--dump-dom", seconds=seconds).stdout

    def console(self, page: Path, seconds: float = 60) -> list[str]:
        """What the page wrote to the console, errors of loading and scripting included."""
        log = self._run(page, "--enable-logging=stderr", "--log-level=0", "--dump-dom", seconds=seconds).stderr
        return [line for line in log.splitlines() if ":CONSOLE" in line]

    def screenshot(self, page: Path, png: Path, width: int = 1280, height: int = 1600, seconds: float = 60) -> Path:
        """A picture of the top of the page."""
        self._run(page, f"--screenshot={png.resolve()}", f"--window-size={width},{height}", seconds=seconds)
        return png


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """Headless Chromium, found on the path or named by LOWVAR_CHROMIUM; the test is skipped where there is none."""
    names = (os.environ.get("LOWVAR_CHROMIUM", ""), *BROWSERS)
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path; LOWVAR_CHROMIUM may name one")
    return Browser(found, tmp_path_factory.mktemp("chromium"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, default=None, help="write the run's result, its date and version to FILE")


def _machine() -> str:
    kind = f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, CPython {platform.python_version()}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return f"{kind}, torch {torch.__version__.split('+')[0]}, one {torch.cuda.get_device_name(0)}"
    return f"{kind}, torch {torch.__version__.split('+')[0]}, no GPU" if torch is not None else kind


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With --record: the result line and what is needed to read it, in Markdown."""
    file: Path | None = config.getoption("--record")
    if file is None or hasattr(config, "workerinput"):
        return
    import torch  # noqa: F401  (its version and device belong to the record)

    from lowvar import __version__

    stats = terminalreporter.stats
    counts = {kind: len(stats.get(kind, [])) for kind in ("passed", "failed", "error", "skipped", "xfailed")}
    result = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n or kind in ("passed", "failed"))
    today = dt.datetime.now(dt.UTC).date().isoformat()
    lines = [
        "# Last run of the slow tests",
        "",
        "Written by `make test-slow`, committed as it came out.",
        "",
        f"- result: {result}",
        f"- date: {today}",
        f"- version: lowvar {__version__}",
        f"- machine: {_machine()}",
    ]
    names = [report.nodeid for kind in ("failed", "error") for report in stats.get(kind, [])]
    lines += ["", "Not passed:", "", *(f"- `{name}`" for name in sorted(names))] if names else []
    file.write_text("\n".join(lines) + "\n")
    terminalreporter.write_line(f"recorded in {file}")
