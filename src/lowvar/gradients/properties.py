"""What each site estimator declares, read off the code: the table of the documentation is made from it."""

from __future__ import annotations

import torch
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.antithetic import Antithetic
from lowvar.gradients.arm import ARM
from lowvar.gradients.dice import DiCE
from lowvar.gradients.disarm import DisARM
from lowvar.gradients.enumeration import Enumerate
from lowvar.gradients.estimator import Estimator
from lowvar.gradients.gumbel_softmax import GumbelSoftmax
from lowvar.gradients.measure_valued import MeasureValued
from lowvar.gradients.multisample import MultiSample
from lowvar.gradients.pathwise import Pathwise
from lowvar.gradients.rebar import REBAR
from lowvar.gradients.relax import RELAX
from lowvar.gradients.score import Score
from lowvar.gradients.straight_through import StraightThrough

__all__ = ["properties_table"]

_SITES: dict[str, Distribution] = {
    "Normal": td.Normal(torch.zeros(3), torch.ones(3)),
    "Gamma": td.Gamma(torch.ones(3), torch.ones(3)),
    "Bernoulli": td.Bernoulli(logits=torch.zeros(3)),
    "Categorical": td.Categorical(logits=torch.zeros(3, 4)),
    "OneHotCategorical": td.OneHotCategorical(logits=torch.zeros(3, 4)),
    "Poisson": td.Poisson(torch.ones(3)),
}

_ESTIMATORS: tuple[Estimator, ...] = (
    Pathwise(),
    Score(),
    MultiSample(2),
    MeasureValued(),
    Enumerate(),
    ARM(),
    DisARM(),
    REBAR(),
    RELAX(torch.sum),
    DiCE(),
    Antithetic(Score()),
    GumbelSoftmax(),
    StraightThrough(),
)


def properties_table() -> str:
    """Markdown: name, label, sites, whether costs must be smooth, orders, branches of a site of 3 elements, source.

    Example:
        >>> print(properties_table().splitlines()[2].split("|")[1].strip())
        Pathwise
    """
    head = "| estimator | label | sites | smooth cost | derivatives | branches, 3 elements | source |"
    lines = [head, "|" + "---|" * 7]
    for e in _ESTIMATORS:
        taken: dict[str, int] = {}
        for name, d in _SITES.items():
            try:
                e.noise(d)
                taken[name] = len(e.branches(d))
            except ValueError:
                continue
        counts = list(dict.fromkeys(taken.values()))
        branches = str(counts[0]) if len(counts) == 1 else ", ".join(f"{name} {count}" for name, count in taken.items())
        name = "Antithetic(any)" if isinstance(e, Antithetic) else type(e).__name__
        sites = "all" if len(taken) == len(_SITES) else ", ".join(taken)
        orders = "any" if e.orders == 0 else "first"
        smooth = "yes" if e.smooth else "no"
        lines.append(f"| {name} | {e.label} | {sites} | {smooth} | {orders} | {branches} | {e.source} |")
    return "\n".join(lines)
