r"""Nodes and weights of a program's base noise: the quadrature behind certificates.

Site by site, in order. Uniform noise is split where the estimator says that it jumps (`Estimator.breaks`), in every
branch, and each piece gets the nodes that the integrand needs: one where it is constant, two where it is linear, a rule
of `QuadratureRule` where it is smooth. Normal noise gets Gauss-Hermite nodes. Elements and names make a product.

That product is too large for relaxed samples: RELAX on four bits needs eight smooth numbers, N^8 nodes. But given the
discrete value b, it is a *sum* of a function of v (through z) and one of w (through z~). For such a sum

    E g(v, w) = E g(v, w0) + E g(v0, w) - g(v0, w0)       for any v0, w0,

exactly: N^4 nodes twice, and one of weight -1. An estimator declares the names in which it is such a sum
(`Estimator.apart`); `exact_moments` looks whether it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.func import vmap

from lowvar.gradients.estimator import BaseNoise, Estimator
from lowvar.gradients.expectation import Expectation, Noises, ProgramState, without_validation
from lowvar.gradients.program import Sites
from lowvar.testing.quadrature import hermite, korobov, legendre, smoothed_legendre, tanh_sinh

__all__ = ["Nodes", "QuadratureRule", "is_smooth", "is_wide", "noise_nodes"]

_LATTICE_FROM = 5  # dimensions from which a lattice needs fewer nodes than a product
_PIECES = {"singular": tanh_sinh, "mild": smoothed_legendre, "analytic": legendre}


@dataclass(frozen=True)
class QuadratureRule:
    """How noise is integrated.

    Args:
        smooth: nodes a piece of a uniform number of which the estimator is no polynomial.
        normal: Gauss-Hermite nodes a normal number.
        chunk: nodes that are evaluated together.
        ends: what the integrand is at the ends of a piece: "singular" (tanh-sinh), "mild" (Gauss-Legendre with smoothed
            ends: powers and logarithms times powers; more digits than tanh-sinh below some 20 nodes) or "analytic"
            (Gauss-Legendre; relaxed bits whose temperature is 1 or 1/2).
        apart: whether noise in which an estimator declares itself a sum is integrated part by part.
        lattice: points of a lattice that takes the place of the product for five or more smooth uniform numbers of one
            noise (five classes); 0: the product.

    Raises:
        ValueError: if `ends` is another word, a number of nodes below 1 or `lattice` negative.
    """

    smooth: int = 40
    normal: int = 16
    chunk: int = 4096
    ends: Literal["singular", "mild", "analytic"] = "singular"
    apart: bool = False
    lattice: int = 0

    def __post_init__(self) -> None:
        """Checks the word and the numbers."""
        if self.ends not in _PIECES:
            raise ValueError(f"ends is {self.ends!r}; allowed: {', '.join(_PIECES)}")
        if min(self.smooth, self.normal, self.chunk) < 1 or self.lattice < 0:
            raise ValueError(
                f"smooth is {self.smooth}, normal {self.normal}, chunk {self.chunk}; give at least 1 of each"
            )


@dataclass(frozen=True)
class Nodes:
    """Noise of one sample at Q nodes.

    Attributes:
        noises: by site and name, (Q, *shape).
        weight: (Q,); some are negative where noise is integrated part by part.
        apart: names by site that are integrated part by part.
        cell, part: if there is one such site and its values move no jumps of later noise: which value of all other
            noise a node belongs to, and which part, the last of which is the anchor. None otherwise.
    """

    noises: Noises
    weight: Tensor
    apart: dict[str, tuple[str, ...]]
    cell: Tensor | None
    part: Tensor | None


class _Jumps(Sites):
    """Sites that note where their estimators jump, and which noise they are sums in."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.jumps: dict[str, dict[str, Tensor]] = {}
        self.apart: dict[str, tuple[str, ...]] = {}

    def sample(
        self,
        name: str,
        distribution: Distribution,
        estimator: Estimator | Literal["auto"],
        *,
        parents: Iterable[str] | None = None,
    ) -> Tensor:
        if not isinstance(estimator, Estimator):
            raise ValueError(f"site {name!r} has estimator {estimator!r}; give an Estimator")
        self.jumps[name] = {k: v.detach() for k, v in estimator.breaks(distribution).items()}
        self.apart[name] = estimator.apart
        return super().sample(name, distribution, estimator, parents=parents)


def _jumps(
    E: Expectation, theta: Any, state: ProgramState, noises: Noises, count: int, site: str, data: Sequence[Any]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Jumps of a site's noise for each node (Q, ...) in all worlds, (Q, *shape, k), and the names it is a sum in."""
    apart: list[tuple[str, ...]] = []

    def one(_: Tensor, noise: Noises, choice: Tensor) -> dict[str, Tensor]:
        s = _Jumps(state.plan, noise, choice.unbind(0), state.sites)
        E.program(theta, s, *data)
        apart[:] = [s.apart[site]]
        return s.jumps[site]

    choices = torch.tensor(state.worlds.choices)
    with without_validation():
        found = vmap(vmap(one, in_dims=(None, None, 0)), in_dims=(0, 0, None))(torch.zeros(count), noises, choices)
    return {name: x.movedim(1, -1).flatten(-2) for name, x in found.items()}, apart[0]


def _line(edges: Tensor, rule: QuadratureRule, between: str) -> tuple[Tensor, Tensor]:
    """Nodes and weights of uniform numbers with jumps (..., k): (..., pieces x nodes)."""
    edges = edges.clamp(0, 1).sort(-1).values
    zero = edges.new_zeros((*edges.shape[:-1], 1))
    low, high = torch.cat([zero, edges], -1), torch.cat([edges, zero + 1], -1)
    u, w = {"constant": legendre(1), "linear": legendre(2)}.get(between) or _PIECES[rule.ends](rule.smooth)
    nodes = low[..., None] + (high - low)[..., None] * u
    return nodes.flatten(-2), ((high - low)[..., None] * w).flatten(-2)


def _grid(noise: BaseNoise, jumps: Tensor | None, count: int, rule: QuadratureRule) -> tuple[Tensor, Tensor]:
    """All values of one noise for each of `count` nodes before it, (count, N, *shape), and weights (count, N)."""
    elements = noise.shape.numel()
    if rule.lattice and is_wide(noise) and jumps is None:
        u, weight = korobov(rule.lattice, elements)
        return u.reshape(1, -1, *noise.shape).expand(count, -1, *noise.shape), weight.expand(count, -1)
    if noise.kind == "normal":
        x, w = (v.expand(count, elements, -1) for v in hermite(rule.normal))
    else:
        none = torch.zeros((count, *noise.shape, 0), dtype=torch.float64)
        edges = none if jumps is None else jumps.double()
        x, w = _line(edges.flatten(1, -2) if noise.shape else edges[:, None], rule, noise.between)
    grid = torch.cartesian_prod(*[torch.arange(x.shape[-1])] * elements).reshape(-1, elements)
    pick = grid.T[None].expand(count, -1, -1)
    values, share = x.gather(2, pick), w.gather(2, pick).prod(1)  # (count, elements, N), (count, N)
    return values.transpose(1, 2).reshape(count, -1, *noise.shape), share


def noise_nodes(E: Expectation, theta: Any, state: ProgramState, rule: QuadratureRule, data: Sequence[Any]) -> Nodes:
    """Nodes of one sample's noise.

    Args:
        E, theta, state: the expectation, its parameters and its state.
        rule: how noise is integrated.
        data: one datum, without a batch axis.
    """
    noises: dict[str, dict[str, Tensor]] = {
        site.name: {
            name: torch.full((1, *noise.shape), 0.5 if noise.kind == "uniform" else 0.0, dtype=torch.float64)
            for name, noise in site.noise.items()
        }
        for site in state.plan.sites
    }
    weight = torch.ones(1, dtype=torch.float64)
    parts: dict[str, tuple[str, ...]] = {}
    cell = part = None

    def taken(row: Tensor) -> dict[str, dict[str, Tensor]]:
        first = torch.zeros_like(row)
        return {
            where: {key: v[row if len(v) == len(weight) else first] for key, v in own.items()}
            for where, own in noises.items()
        }

    for site in state.plan.sites:
        if not site.noise:
            continue
        jumps, apart = _jumps(E, theta, state, noises, len(weight), site.name, data)
        apart = apart if rule.apart and len(apart) > 1 else ()
        for name, noise in site.noise.items():
            if name in apart:
                continue
            values, share = _grid(noise, jumps.get(name), len(weight), rule)
            total = weight[:, None] * share
            row, column = torch.nonzero(total != 0, as_tuple=True)
            noises = taken(row)
            noises[site.name][name] = values[row, column]
            if cell is not None and part is not None:
                moves = name in jumps and jumps[name].numel() > 0
                cell, part = (None, None) if moves else (cell[row] * values.shape[1] + column, part[row])
            jumps = {k: v[row] for k, v in jumps.items()}
            weight = total[row, column]
        if apart:
            parts[site.name] = apart
            grids = [_grid(site.noise[name], jumps.get(name), len(weight), rule) for name in apart]
            anchors = [values[:, 2 * values.shape[1] // 5] for values, _ in grids]
            rows, numbers, weights = [], [], []
            pieces: list[list[Tensor]] = [[] for _ in apart]
            for j, (values, share) in enumerate(grids):
                row, column = torch.nonzero(weight[:, None] * share != 0, as_tuple=True)
                rows.append(row)
                numbers.append(torch.full_like(row, j))
                weights.append(weight[row] * share[row, column])
                for i, anchor in enumerate(anchors):
                    pieces[i].append(values[row, column] if i == j else anchor[row])
            every = torch.arange(len(weight))
            rows.append(every)
            numbers.append(torch.full_like(every, len(apart)))
            weights.append(weight * (1 - len(apart)))
            for i, anchor in enumerate(anchors):
                pieces[i].append(anchor)
            cell, part = torch.cat(rows), torch.cat(numbers)
            noises = taken(cell)
            for name, piece in zip(apart, pieces, strict=True):
                noises[site.name][name] = torch.cat(piece)
            weight = torch.cat(weights)
    single = len(parts) == 1
    return Nodes(noises, weight, parts, cell if single else None, part if single else None)


def is_smooth(noise: BaseNoise) -> bool:
    """Whether a number of it takes a quadrature rule, exact for no finite number of nodes."""
    return noise.kind == "normal" or noise.between == "smooth"


def is_wide(noise: BaseNoise) -> bool:
    """Whether it has so many smooth uniform numbers that a lattice is better than a product."""
    return noise.kind == "uniform" and is_smooth(noise) and noise.shape.numel() >= _LATTICE_FROM
