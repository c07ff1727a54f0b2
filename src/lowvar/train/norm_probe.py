"""The squared gradient norm of one sample an update, from which `gradient-norm` times learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowvar.train.batch_loss import BatchLoss
from lowvar.train.draws import Draws
from lowvar.train.noise_probe import flat_gradient, rows_of
from lowvar.train.targets import PlainTarget
from lowvar.train.together import summed

__all__ = ["squared_norm"]


def squared_norm(
    batch: BatchLoss, accelerator: Any, network: nn.Module, update: int, draws: Draws, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Bin and squared gradient norm (1,) each of sample u mod B's unweighted loss, u the update, for all processes.

    Args:
        batch: the loss.
        accelerator: of the run.
        network: without the hooks that would average gradients.
        update: its number.
        draws: this process's share.
        batch_size: B, over all processes.
    """
    place = update % batch_size - accelerator.process_index * len(draws.number)
    found = torch.zeros(2, dtype=torch.float64)
    if 0 <= place < len(draws.number):
        one = rows_of(draws, slice(place, place + 1))
        with accelerator.autocast():
            loss = batch.losses(network, update, one, PlainTarget(), -1).loss.sum()
        gradient = flat_gradient(loss, [p for p in network.parameters() if p.requires_grad])
        found = torch.tensor([float(one.bin), float((gradient.double() ** 2).sum())], dtype=torch.float64)
    found = summed(accelerator, found)
    return found[:1].long(), found[1:]
