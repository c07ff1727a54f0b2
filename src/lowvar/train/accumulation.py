r"""Gradient accumulation: a batch's gradient from pieces that fit into memory one at a time.

With n samples of a process in K pieces of rows P_1 .. P_K,

    g = sum_k grad L_k,     L_k = 1/n sum_{i in P_k} weight_i loss_i,

is the gradient of the weighted mean, whatever K is. The batch is *drawn* whole: pairs, strata, couplings, reference
sets and learned times are those of all its samples, so K changes rounding (and the masks of dropout) and nothing else.
Processes exchange gradients once, after the last piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowvar.train.batch_loss import BatchLoss, weighted_mean
from lowvar.train.draws import Draws, rows_of
from lowvar.train.targets import GivenTarget, Target

__all__ = ["backward", "pieces_of"]


def pieces_of(n: int, size: int) -> Iterator[slice]:
    """The rows of n samples in pieces of `size`, the last one perhaps smaller.

    Example:
        >>> list(pieces_of(5, 2))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def backward(
    batch: BatchLoss, accelerator: Any, network: nn.Module, update: int, draws: Draws, target: Target, pieces: int = 1
) -> Tensor:
    """Adds the gradient of the batch's loss to the weights' `.grad`.

    Args:
        batch: the loss.
        accelerator: of the run.
        network: as accelerate prepared it.
        update: its number.
        draws: this process's share.
        target: of these draws, plain or known already.
        pieces: K, a divisor of the share.

    Returns:
        The samples' losses, (n,), without gradient and without weights.
    """
    n, found = len(draws.number), list[Tensor]()
    for k, rows in enumerate(pieces_of(n, n // pieces)):
        own = rows_of(draws, rows)
        clean = replace(target, value=target.value[rows]) if isinstance(target, GivenTarget) else target
        with nullcontext() if k == pieces - 1 else accelerator.no_sync(network):
            losses = batch.losses(network, update, own, clean, accelerator.process_index * pieces + k)
            accelerator.backward(weighted_mean(own, losses) / pieces)
        found.append(losses.loss.detach())
    return torch.cat(found)
