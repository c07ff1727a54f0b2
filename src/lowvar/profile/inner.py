r"""Inner products of the gradients of single samples, by parameter group: exact, or sketched where they don't fit.

Exact: n gradients of P numbers each, one forward and backward pass a sample, and their Gram matrix.

Sketched: for a direction r ~ N(0, I) in the space of the parameters E <g_a, r> <g_b, r> = <g_a, g_b>, so with m
directions

    <g_a, g_b>  is estimated without bias by  1/m sum_k <g_a, r_k> <g_b, r_k>,

with variance (||g_a||^2 ||g_b||^2 + <g_a, g_b>^2) / m. The n numbers <g_a, r> are one product of the losses' Jacobian
with r, whatever P is. It is taken by reverse mode twice (the gradient of sum_a u_a loss_a is linear in u; its product
with r, differentiated in u, is what is wanted), which every network supports that can be differentiated twice; no
gradient of a single sample is ever held. What the directions add to the variance is in the intervals, since every block
has directions of its own.

Source: M. Charikar, K. Chen, M. Farach-Colton, "Finding frequent items in data streams", 2002 (inner products of
sketches).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowvar.process.jacobian import plain_attention
from lowvar.process.noise import NoiseSource
from lowvar.train.noise_probe import flat_gradient

__all__ = ["Exact", "InnerProducts", "Sketched", "parameter_groups"]

SampleLosses = Callable[[slice], Tensor]
"""Losses (n,) of some of the samples, with their graph."""


def parameter_groups(network: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """A network's trainable parameters by part: its children, those of a list one by one.

    Example:
        >>> from torch.nn import Linear, ModuleList
        >>> net = nn.ModuleDict({"into": Linear(2, 3), "blocks": ModuleList([Linear(3, 3), Linear(3, 3)])})
        >>> {name: len(parameters) for name, parameters in parameter_groups(net).items()}
        {'into': 2, 'blocks.0': 2, 'blocks.1': 2}
    """
    found: dict[str, list[nn.Parameter]] = {}
    lists = {name for name, child in network.named_children() if isinstance(child, nn.ModuleList)}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            first, *rest = name.split(".")
            found.setdefault(f"{first}.{rest[0]}" if first in lists else first, []).append(parameter)
    return {name: tuple(parameters) for name, parameters in found.items()}


class InnerProducts(ABC):
    """Inner products of per-sample gradients."""

    @abstractmethod
    def of(self, losses: SampleLosses, n: int, size: int, block: int) -> Tensor:
        """Gram matrices (n / size, groups, size, size) of n samples in blocks of `size`, float64.

        Args:
            losses: of the samples in a slice of 0 .. n.
            n: number of samples, a multiple of `size`.
            size: samples of a block.
            block: number of the first block, from which the noise of a sketch follows.
        """


@dataclass(frozen=True, eq=False)
class Exact(InnerProducts):
    """Gradient by gradient.

    Attributes:
        groups: parameters by group.

    Example:
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> Exact({"w": (w,)}).of(lambda s: x[s] @ w, 2, 2, 0)[0, 0].tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """

    groups: Mapping[str, Sequence[Tensor]]

    def of(self, losses: SampleLosses, n: int, size: int, block: int) -> Tensor:
        """See the base class."""
        weights = [w for group in self.groups.values() for w in group]
        lengths = [sum(w.numel() for w in group) for group in self.groups.values()]
        found = []
        for first in range(0, n, size):
            rows = []
            for k in range(first, first + size):
                rows.append(flat_gradient(losses(slice(k, k + 1)).sum(), weights))
            parts = torch.stack(rows).split(lengths, 1)
            found.append(torch.stack([(p @ p.T).double() for p in parts]))
        return torch.stack(found)


@dataclass(frozen=True, eq=False)
class Sketched(InnerProducts):
    """By random directions, without a gradient of a single sample.

    Attributes:
        groups: parameters by group.
        directions: m, for every block.
        noise: source of the directions; sample number = block m + direction, draw = place of the parameter.

    Example:
        >>> from lowvar.process import Independent
        >>> w = nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> found = Sketched({"w": (w,)}, 400, Independent(0)).of(lambda s: x[s] @ w, 2, 2, 0)[0, 0]
        >>> torch.allclose(found, torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64), atol=0.3)
        True
    """

    groups: Mapping[str, Sequence[Tensor]]
    directions: int
    noise: NoiseSource

    def __post_init__(self) -> None:
        """Refuses no directions."""
        if self.directions < 1:
            raise ValueError(f"directions is {self.directions}; a sketch needs at least 1")

    def of(self, losses: SampleLosses, n: int, size: int, block: int) -> Tensor:
        """See the base class."""
        weights = [w for group in self.groups.values() for w in group]
        found = []
        for first in range(0, n, size):
            with torch.enable_grad(), plain_attention():
                value = losses(slice(first, first + size))
                u = torch.ones_like(value, requires_grad=True)
                g = torch.autograd.grad((u * value).sum(), weights, create_graph=True, allow_unused=True)
            number = (block + first // size) * self.directions
            rows = torch.stack([self._products(g, u, number + k) for k in range(self.directions)])  # (m, groups, size)
            found.append(torch.einsum("mga,mgb->gab", rows, rows) / self.directions)
        return torch.stack(found)

    def _products(self, gradients: Sequence[Tensor | None], u: Tensor, number: int) -> Tensor:
        """<g_a, r> by group, (groups, size)."""
        products, place = [], 0
        for group in self.groups.values():
            total = u.new_zeros(()) * u.sum()
            for w in group:
                g = gradients[place]
                if g is not None:
                    r = self.noise.normal([number], w.shape, draw=place, dtype=w.dtype, device=w.device)[0]
                    total = total + (g * r).sum()
                place += 1
            products.append(torch.autograd.grad(total, u, retain_graph=True)[0].double())
        return torch.stack(products)
