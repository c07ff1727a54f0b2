"""The benchmark of expectations: its page is what its results say, and its sums are what they say they are."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))


def _module() -> Any:
    """benchmarks/expect.py, by its path: the tests have a folder of that name."""
    spec = importlib.util.spec_from_file_location("benchmark_of_expectations", FOLDER / "expect.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark = _module()
FOUND = json.loads(benchmark.RESULTS.read_text())


def test_the_page_is_the_results() -> None:
    assert benchmark.TABLE.read_text() == benchmark.tables(FOUND)
    assert f"<!-- factors -->\n{benchmark.block(FOUND)}\n<!-- end factors -->" in benchmark.PAGE.read_text()
    for which in benchmark.SAMPLES:
        assert json.loads(json.dumps(benchmark.summary(FOUND["runs"], which))) == FOUND["summary"][which]


def test_a_factor_is_the_geometric_mean_over_seeds() -> None:
    place, alone = ("mixture2", "ODE", "norm"), benchmark.STEPS * benchmark.SAMPLES["exact"]
    runs = {f"mixture2/ODE/norm/auto/{s}": {"nfe": alone / f} for s, f in enumerate((4.0, 9.0))}
    found = benchmark.factors(runs, place, "auto")
    assert found is not None
    assert found["factor"] == pytest.approx(6)
    assert math.log(found["high"] / found["factor"]) == pytest.approx(12.706 * math.log(9 / 4) / 2, rel=1e-3)
    assert benchmark.factors(runs, place, "sobol") is None


def test_no_run_of_the_planner_is_worse_than_independent_sampling() -> None:
    """The claim of the page, on what was measured: goals 10 and 3 on the median smooth statistic, no loss."""
    exact, learned = (FOUND["summary"][k] for k in ("exact", "learned"))
    assert exact["median_smooth"] >= 10
    assert learned["median_smooth"] >= 3
    assert exact["below_one"] == learned["below_one"] == 0
