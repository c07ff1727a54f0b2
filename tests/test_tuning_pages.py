"""The blocks of docs/tuning.md run one after the other, with fewer updates."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.slow
def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```(python|bash)\n(.*?)```", (DOCS / "tuning.md").read_text(), re.S)
    assert len(blocks) == 6
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for kind, code in blocks:
        code = code.replace("--updates 2000", "--updates 6 --batch-size 8")
        code = code.replace("--updates 40", "--updates 2 --batch-size 16 --n 64 --steps 3")
        command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stderr[-2000:]}"
    assert (tmp_path / "tuned-by-hand" / "model_index.json").is_file()
