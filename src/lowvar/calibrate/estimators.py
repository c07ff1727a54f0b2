"""Every estimator of Cov[x_0 | x_t] and what it claims, and the table of it that the docs show."""

from __future__ import annotations

from collections.abc import Mapping

from lowvar.calibrate.analytic import ANALYTIC
from lowvar.calibrate.claims import Claims
from lowvar.calibrate.convert import Converted
from lowvar.calibrate.heads import HEADS
from lowvar.calibrate.jacobian import JacobianTrace
from lowvar.calibrate.table import CovarianceTable

__all__ = ["ESTIMATORS", "estimator_table"]

ESTIMATORS: Mapping[str, Claims] = {
    "analytic": ANALYTIC,
    "table": CovarianceTable.declares,
    **{name: cls.declares for name, cls in HEADS.items()},
    "convert": Converted.declares,
    "trace": JacobianTrace.declares,
}
"""Claims by name; `table` stands for isotropic, channel, pixel and basis; `trace` is `JacobianTrace`, one probe."""


def estimator_table() -> str:
    """The claims as a Markdown table.

    Example:
        >>> estimator_table().splitlines()[0]
        '| name | source | around | exact | bias | depends on x_t | NFE a step | NFE a training draw |'
    """
    lines = [
        "| name | source | around | exact | bias | depends on x_t | NFE a step | NFE a training draw |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, c in ESTIMATORS.items():
        cells = (name, c.source, c.centre, c.exact, c.bias, "yes" if c.per_sample else "no", c.nfe, c.training_nfe)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
