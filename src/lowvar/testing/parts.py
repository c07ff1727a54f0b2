r"""Nodes of several samples, and the sums over them, also where noise is integrated part by part.

If one site of a program is (`nodes`), given all other noise a gradient is g = sum_j A_j(v_j) - (k - 1) c, A_j = c at
the anchor, over the k noises of that site and of every sample: a sample's gradient knows no other sample's. Then

    E g = sum_j E A_j - (k - 1) c,      Var g = sum_j Var A_j,

so variances are exact as well, and n samples cost n times one sample's nodes in each cell of their other noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowvar.testing.nodes import Nodes

__all__ = ["SampleNodes", "Sums", "sample_nodes"]


@dataclass(frozen=True)
class SampleNodes:
    """Nodes of n samples.

    Attributes:
        index: the node of each sample, (Q, n).
        weight: (Q,).
        cell, part: which values of all noise that is not integrated part by part, and which part, the last of which is
            the anchor; None for a product.
        parts: their number, the anchor left out.
        exact: whether the weighted mean of squares is one.
    """

    index: Tensor
    weight: Tensor
    cell: Tensor | None
    part: Tensor | None
    parts: int
    exact: bool


def sample_nodes(single: Nodes, n: int) -> SampleNodes:
    """A product of samples; of those with one site integrated part by part, sums over samples as well.

    Args:
        single: nodes of one sample.
        n: samples, >= 1.
    """
    if single.cell is None or single.part is None:
        index = torch.cartesian_prod(*[torch.arange(len(single.weight))] * n).reshape(-1, n)
        return SampleNodes(index, single.weight[index].prod(1), None, None, 0, not single.apart)
    (names,) = single.apart.values()
    k = len(names)
    anchors = torch.nonzero(single.part == k)[:, 0]
    anchors = anchors[single.cell[anchors].argsort()]
    own = single.cell[anchors]
    place = torch.zeros(int(own.max()) + 1, dtype=torch.int64)
    place[own] = torch.arange(len(own))
    chance = single.weight[anchors] / (1 - k)
    cells = torch.cartesian_prod(*[torch.arange(len(own))] * n).reshape(-1, n)  # all samples' cells
    stride = len(own) ** torch.arange(n - 1, -1, -1)
    others = torch.cartesian_prod(*[torch.arange(len(own))] * max(n - 1, 1)).reshape(-1, max(n - 1, 1))[:, : n - 1]
    others = others if n > 1 else others[:1]
    moving = torch.nonzero(single.part != k)[:, 0]
    row, rest = (
        x.reshape(-1) for x in torch.meshgrid(torch.arange(len(moving)), torch.arange(len(others)), indexing="ij")
    )
    node, theirs = moving[row], others[rest]
    index, weight, cell, part = [], [], [], []
    for i in range(n):
        mine = place[single.cell[node]]
        all_cells = torch.cat([theirs[:, :i], mine[:, None], theirs[:, i:]], 1)
        index.append(torch.cat([anchors[theirs[:, :i]], node[:, None], anchors[theirs[:, i:]]], 1))
        weight.append(single.weight[node] * chance[theirs].prod(1))
        cell.append((all_cells * stride).sum(1))
        part.append(single.part[node] + i * k)
    index.append(anchors[cells])
    weight.append((1 - n * k) * chance[cells].prod(1))
    cell.append((cells * stride).sum(1))
    part.append(torch.full((len(cells),), n * k))
    return SampleNodes(torch.cat(index), torch.cat(weight), torch.cat(cell), torch.cat(part), n * k, True)


class Sums:
    """Sums over nodes, in cells and by part where noise is integrated part by part."""

    def __init__(self, nodes: SampleNodes) -> None:
        self.nodes = nodes
        self.where = None if nodes.cell is None or nodes.part is None else nodes.cell * (nodes.parts + 1) + nodes.part
        self.value = 0.0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def add(self, index: Tensor, g: Tensor, value: Tensor) -> None:
        """Adds gradients (Q, p) and values (Q,) of nodes `index`."""
        weight = self.nodes.weight[index]
        self.value += float((weight * value).sum())
        where = torch.zeros_like(index) if self.where is None else self.where[index]
        rows = 1 if self.where is None else int(self.where.max()) + 1
        if self.first is None or self.second is None:
            self.first, self.second = g.new_zeros(rows, g.shape[1]), g.new_zeros(rows, g.shape[1])
        self.first = self.first.index_add(0, where, weight[:, None] * g)
        self.second = self.second.index_add(0, where, weight[:, None] * g**2)

    def result(self) -> tuple[Tensor, Tensor, float]:
        """Mean and variance (p,), and the mean value."""
        assert self.first is not None
        assert self.second is not None
        mean, k = self.first.sum(0), self.nodes.parts
        if self.where is None:
            variance = self.second.sum(0) - mean**2
            return mean, variance if self.nodes.exact else torch.full_like(mean, torch.nan), self.value
        anchor = self.where % (k + 1) == k
        chance = mean.new_zeros(len(self.first) // (k + 1))  # of each cell
        chance = chance.index_add(0, self.where[anchor] // (k + 1), self.nodes.weight[anchor] / (1 - k))
        chance = chance[:, None, None]
        first = self.first.reshape(-1, k + 1, len(mean)) / chance
        second = self.second.reshape(-1, k + 1, len(mean)) / chance
        square = (second[:, :k] - first[:, :k] ** 2).sum(1) + first.sum(1) ** 2
        return mean, (chance[:, 0] * square).sum(0) - mean**2, self.value
