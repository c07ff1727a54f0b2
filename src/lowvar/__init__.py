"""lowvar: variance reduction in the reverse process of diffusion and flow models.

The package is a tower of floors, each importing only what lies below it:

1. `process`: what a reverse process is (schedule, denoiser, posterior, covariance, twin, kernel, grid, noise)
2. `data`, `metrics`: data sets in, scores out
3. `calibrate`, `sample`, `gradients`: fitting a reverse covariance, running the reverse process, stochastic gradients
4. `train`, `expect`, `reward`: learning the process, expectations over its samples, tuning by reward
5. `profile`, `report`, `schedulers`, `testing`: sources of variance, reports, adapters to diffusers, exact targets
6. `pipelines`, `adapters`, `evaluation`: opening model folders and models of other code bases, running and scoring
   samplers and peers on them
7. `cli`: the command `lowvar`

`errors`, which all but `process` may import, is the ground they stand on.

Importing `lowvar` itself imports none of them, and so not torch either: a subpackage is loaded on first access.

Example:
    >>> import lowvar
    >>> lowvar.__version__.count(".")
    2
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

# pyright: reportUnsupportedDunderAll=false
# The subpackages are resolved by __getattr__, which a type checker does not follow.
__all__ = [
    "__version__",
    "adapters",
    "calibrate",
    "cli",
    "data",
    "errors",
    "evaluation",
    "expect",
    "metrics",
    "pipelines",
    "process",
    "report",
    "reward",
    "sample",
    "schedulers",
    "testing",
    "train",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Import a subpackage on first access (PEP 562)."""
    if name in __all__:
        return importlib.import_module(f"lowvar.{name}")
    raise AttributeError(f"module 'lowvar' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
