r"""Measure-valued (weak) derivatives: grad p_theta = c (p+ - p-), with p+ and p- laws of their own.

    d/dtheta_e E f(x) = c_e (E f(x with x_e ~ p+) - E f(x with x_e ~ p-)),        the other elements as drawn.

    Normal, mu       c = 1 / (sigma sqrt(2 pi)),  x_e = mu +- sigma W, W Rayleigh; both use the same W
    Normal, sigma    c = 1 / sigma,  x_e = mu + sigma M with M double-sided Maxwell against the sample itself, which is
                     mu + sigma M V with V uniform: a product of both is standard normal
    Poisson          c = 1, f(x_e + 1) - f(x_e)
    Bernoulli, p     c = 1, f(1) - f(0)
    Categorical, p_k sum_k zero(p_k) f(k)

Every element costs a branch or more (Normal 3, Poisson and Bernoulli 1, K values K), of which only the cost is asked: f
need not be differentiable. For N(mu, sigma^2) and f = (x - k)^2, delta = mu - k:
Var_mu = 16 delta^2 (2 - pi/2) / (2 pi).

Sources: G. Pflug, "Sampling derivatives of probabilities", 1989; B. Heidergott, F. Vazquez-Abad, W. Volk-Makarewicz,
"Sensitivity estimation for Gaussian systems", 2008; S. Mohamed et al., "Monte Carlo gradient estimation in machine
learning", 2020, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from lowvar.gradients.distributions import base, breaks, noise_of, sample
from lowvar.gradients.estimator import (
    BaseNoise,
    Branch,
    GradientLabel,
    SiteDraw,
    SiteRecord,
    SiteState,
    Stateless,
    zero,
)
from lowvar.gradients.implicit import gamma_quantile

__all__ = ["MeasureValued"]

_PROBE: Branch = "probe"
_KINDS = (td.Normal, td.Poisson, td.Bernoulli, td.Categorical, td.OneHotCategorical)


@dataclass(frozen=True)
class MeasureValued(Stateless):
    """Differences of costs at coupled values of one element at a time.

    Example:
        >>> draw = MeasureValued().draw(td.Poisson(torch.tensor(2.0)), {"u": torch.tensor(0.5)}, {})
        >>> draw.values.tolist()
        [2.0, 3.0]
    """

    label: ClassVar[GradientLabel] = "unbiased"
    source: ClassVar[str] = "Pflug 1989; Heidergott et al. 2008"

    def noise(self, d: Distribution) -> dict[str, BaseNoise]:
        """Uniform numbers; two an element for Normal.

        Raises:
            ValueError: if the distribution's weak derivative is not in the list.
        """
        d = base(d)
        if not isinstance(d, _KINDS):
            raise ValueError(
                f"MeasureValued is for Normal, Poisson, Bernoulli and Categorical sites, not for {type(d).__name__}"
            )
        if isinstance(d, td.Normal):
            return {"u": BaseNoise("uniform", d.batch_shape), "v": BaseNoise("uniform", d.batch_shape)}
        return noise_of(d)

    def breaks(self, d: Distribution) -> dict[str, Tensor]:
        """The sign of a Maxwell number at v = 1/2, or those of the sample."""
        d = base(d)
        if isinstance(d, td.Normal):
            return {"v": torch.full((*d.batch_shape, 1), 0.5, dtype=d.loc.dtype)}
        return breaks(d)

    def branches(self, d: Distribution) -> tuple[Branch, ...]:
        """The sample, and a probe for every term."""
        d = base(d)
        elements = d.batch_shape.numel()
        if isinstance(d, td.Normal):
            probes = 3
        elif isinstance(d, td.Poisson | td.Bernoulli):
            probes = 1
        else:
            probes = int(d.probs.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]
        return ("main", *[_PROBE for _ in range(elements * probes)])

    def draw(self, d: Distribution, noise: Mapping[str, Tensor], state: SiteState) -> SiteDraw:
        """The sample x, then x with one element changed; `terms` weigh the probes' costs less the sample's."""
        d = base(d)
        if isinstance(d, td.Normal):
            return _normal(d, noise)
        x = sample(d, noise).detach()
        if isinstance(d, td.Poisson):
            return SiteDraw(torch.cat([x[None], _replaced(x, x + 1)]), {"terms": zero(d.rate).reshape(-1)})
        if isinstance(d, td.Bernoulli):
            return SiteDraw(
                torch.cat([x[None], _replaced(x, 1 - x)]), {"terms": ((1 - 2 * x) * zero(d.probs)).reshape(-1)}
            )
        kinds = d.probs.shape[-1]  # pyright: ignore[reportAttributeAccessIssue]
        each = torch.arange(kinds, device=x.device)
        if isinstance(d, td.OneHotCategorical):
            flat, unit = x.reshape(-1, kinds), torch.eye(kinds, dtype=x.dtype, device=x.device)
            rows = torch.eye(len(flat), dtype=torch.bool, device=x.device)[:, None, :, None]
            probes = torch.where(rows, unit[None, :, None], flat).reshape(-1, *x.shape)
        else:
            probes = torch.stack([_replaced(x, each[k].expand_as(x)) for k in range(kinds)], 1).reshape(-1, *x.shape)
        return SiteDraw(torch.cat([x[None], probes]), {"terms": zero(d.probs).reshape(-1)})  # pyright: ignore[reportAttributeAccessIssue]

    def surrogate(self, record: SiteRecord, live: Tensor, costs: Tensor, state: SiteState) -> Tensor:
        """S_main + sum over probes of (f_probe - f_main) term."""
        change = costs[..., 1:, :] - costs[..., :1, :]
        return live[..., 0, :] + (change * record["terms"][..., None]).sum(-2)

    def value(self, record: SiteRecord, costs: Tensor) -> Tensor:
        """The sample's cost."""
        return costs[..., 0, :]


def _replaced(x: Tensor, new: Tensor) -> Tensor:
    """x with element e of `new` in place of its own, for every e: (elements, *shape)."""
    eye = torch.eye(x.numel(), dtype=torch.bool, device=x.device).reshape(-1, *x.shape)
    return torch.where(eye, new, x)


def _normal(d: td.Normal, noise: Mapping[str, Tensor]) -> SiteDraw:
    mu, sigma, u, side = d.loc.detach(), d.scale.detach(), noise["u"], 2 * noise["v"] - 1
    rayleigh = torch.sqrt(-2 * torch.log(u))
    maxwell = torch.sqrt(2 * gamma_quantile(torch.full_like(u, 1.5), u))
    x = mu + sigma * maxwell * side
    far = mu + sigma * maxwell * torch.sign(side)
    values = [x[None], _replaced(x, mu + sigma * rayleigh), _replaced(x, mu - sigma * rayleigh), _replaced(x, far)]
    loc = (zero(d.loc) / (sigma * math.sqrt(2 * math.pi))).reshape(-1)
    return SiteDraw(torch.cat(values), {"terms": torch.cat([loc, -loc, (zero(d.scale) / sigma).reshape(-1)])})
