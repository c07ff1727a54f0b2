r"""What a program is made of, found by running it once on one sample.

The trace has the program's sites and costs (its plan), the estimators' states before any batch, and one set of values.
`refuse_steps` looks for what a pathwise derivative would miss without a word: a cost that changes with a site and has
no derivative in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from lowvar.gradients.estimator import Estimator, SiteState
from lowvar.gradients.program import ProgramPlan, Sites, first_noise

__all__ = ["Trace", "refuse_steps", "traced"]


@dataclass(frozen=True)
class Trace:
    """A trace: the plan, states before any batch, values and distributions."""

    plan: ProgramPlan
    starts: Mapping[str, SiteState]
    sites: Sites = field(repr=False)


def traced(program: Callable[..., Any], theta: Any, data: Sequence[Any]) -> Trace:
    """Runs a program once, on one sample, to see what it is made of."""
    s = Sites(None, {}, None, {})
    program(theta, s, *data)
    if not s.costs:
        raise ValueError("the program has no cost; say s.cost(name, value) at least once")
    return Trace(ProgramPlan(tuple(s.sites), tuple(c for c, _ in s.costs)), s.starts, s)


class _Watched(Sites):
    """Sites whose values carry a leaf of value 0, to see whether costs pass a gradient to them."""

    def sample(
        self,
        name: str,
        distribution: Distribution,
        estimator: Estimator | Literal["auto"],
        *,
        parents: Iterable[str] | None = None,
    ) -> Tensor:
        value = super().sample(name, distribution, estimator, parents=parents)
        if not value.is_floating_point():
            return value
        self.values[name] = leaf = torch.zeros_like(value).requires_grad_()
        return value + leaf


def refuse_steps(program: Callable[..., Any], theta: Any, data: Sequence[Any], found: Trace) -> None:
    """Refuses a cost that changes with a pathwise site without a derivative in it (rounding, arg max, detach).

    Looks at three draws; where a derivative is 0 in all, at whether the cost changes with this site's noise alone.
    Sites with later ones that are not pathwise are left out, as these carry a gradient of their own.
    """
    sites = found.plan.sites
    plain = {s.name for s in sites if s.estimator == "Pathwise"}
    watched = [
        (k, site)
        for k, site in enumerate(sites)
        if site.name in plain and all(s.name in plain for s in sites[k + 1 :] if site.name in s.ancestors)
    ]
    if not watched:
        return

    def run(seeds: Mapping[str, int]) -> Sites:
        noise = {site.name: first_noise(site, k, seeds.get(site.name, 0)) for k, site in enumerate(sites)}
        s = _Watched(None, noise, None, {})
        with torch.enable_grad():
            program(theta, s, *data)
        return s

    seen: set[tuple[str, str]] = set()
    for seed in range(3):
        s = run({site.name: seed for site in sites})
        for cost, value in s.costs:
            names = [site.name for _, site in watched if site.name in cost.ancestors]
            if names and value.requires_grad:
                leaves = [s.values[name] for name in names]
                slopes = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
                seen |= {(cost.name, n) for n, g in zip(names, slopes, strict=True) if g is not None and bool(g.any())}
    for _, site in watched:
        missing = [c.name for c in found.plan.costs if site.name in c.ancestors and (c.name, site.name) not in seen]
        if not missing:
            continue
        draws = [{c.name: float(v.detach()) for c, v in run({site.name: seed}).costs} for seed in range(3)]
        for name in missing:
            if len({draw[name] for draw in draws}) > 1:
                raise ValueError(
                    f"cost {name!r} changes with site {site.name!r} and has no derivative in it (rounded, compared or "
                    "detached?), so Pathwise would be wrong there; use Score or MeasureValued"
                )
