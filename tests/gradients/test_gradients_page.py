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
    assert len(blocks) == 5
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks))
    done = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DisARM()" in done.stdout
