"""docs/gradients.md: the table is what the code declares, and every block runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lowvar.gradients.properties import properties_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gradients.md"


def test_table_is_made_from_the_code() -> None:
    found = re.search(r"<!-- estimators -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.S)
    assert found is not None
    assert found.group(1) == properties_table(), f"put this into {PAGE.name}:\n{properties_table()}"


def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 7
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DisARM()" in done.stdout
    found = dict(line.split(" [") for line in done.stdout.splitlines() if line.startswith(("on with", "by how")))
    on, weights = (
        [float(v) for v in found[k].rstrip("]").split(",")] for k in ("on with probability", "by how much        ")
    )
    assert [i for i, p in enumerate(on) if p > 0.9] == [0, 3, 6]  # the tutorial finds the features that matter
    assert all(p < 0.8 for i, p in enumerate(on) if i not in (0, 3, 6))
    assert [round(weights[i]) for i in (0, 6)] == [2, 1]
    share = float(done.stdout.split("variance of the gradient, of what it was:")[1].split()[0])
    assert share < 0.5
