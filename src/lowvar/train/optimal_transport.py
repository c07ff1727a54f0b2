r"""Minibatch optimal transport: within a batch each image gets the noise that makes the sum of distances least.

    pi = argmin over permutations of sum_i ||x_i - eps_pi(i)||^2,    x_t = alpha x_i + sigma eps_pi(i)

The noises of a batch are the same ones, in another order, so each alone, its image forgotten, remains N(0, I); given
its image it does not. The network then learns another field than the plain one (with straighter paths), which is why
the label is `changes the objective`: a loss or a likelihood bound of the plain process no longer describes it. This is
the permutation itself; the plan with replacement, drawn pair by pair, repeats some noises and loses others.

Sources: Pooladian et al. 2023 ("Multisample flow matching"), Tong et al. 2024 (OT-CFM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowvar.train.objectives import Label

__all__ = ["OptimalTransport", "optimal_transport"]


def optimal_transport(x0: Tensor, eps: Tensor) -> Tensor:
    """The permutation pi, (n,) int64 on the CPU, that makes sum_i ||x0_i - eps_pi(i)||^2 least: `eps[pi]` is used.

    Args:
        x0: images, (n, *event_shape).
        eps: noises, same shape.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> optimal_transport(torch.tensor([[-1.0], [2.0]]), torch.tensor([[1.5], [-0.5]])).tolist()
        [1, 0]
    """
    from scipy.optimize import linear_sum_assignment

    if x0.shape != eps.shape:
        raise ValueError(f"x0 is {tuple(x0.shape)} and eps {tuple(eps.shape)}; give one noise an image")
    # |x - e|^2 = |x|^2 + |e|^2 - 2 <x, e>: the squares are the same in every permutation
    cost = -(x0.detach().flatten(1).cpu().double() @ eps.detach().flatten(1).cpu().double().mT)
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1]).long()


@dataclass(frozen=True)
class OptimalTransport:
    """The coupling as a part of a draw plan: applied to the global batch, whatever its parts.

    Example:
        >>> OptimalTransport().label
        'changes the objective'
    """

    label: ClassVar[Label] = "changes the objective"

    def __call__(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The noises in the order of the images, same shape as eps."""
        return eps[optimal_transport(x0, eps).to(eps.device)]
