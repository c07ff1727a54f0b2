"""The squared gradient norm of one sample, from which `gradient-norm` times learn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lowvar.train.batch_loss import BatchLoss
from lowvar.train.draws import Draws, rows_of
from lowvar.train.noise_probe import flat_gradient
from lowvar.train.targets import GivenTarget, Target
from lowvar.train.together import summed

__all__ = ["squared_norm"]


def squared_norm(
    batch: BatchLoss, accelerator: Any, network: nn.Module, update: int, draws: Draws, target: Target, place: int
) -> tuple[Tensor, Tensor]:
    """Bin and squared gradient norm (1,) each of one sample's unweighted loss, for all processes.

    Args:
        batch: the loss.
        accelerator: of the run.
        network: without the hooks that would average gradients.
        update: its number.
        draws: this process's share.
        target: of these draws.
        place: the sample's, in the batch of all processes.
    """
    place = place - accelerator.process_index * len(draws.number)
    found = torch.zeros(2, dtype=torch.float64)
    if 0 <= place < len(draws.number):
        here = slice(place, place + 1)
        one = rows_of(draws, here)
        if isinstance(target, GivenTarget):
            target = replace(target, value=target.value[here])
        with accelerator.autocast():
            loss = batch.losses(network, update, one, target, -1).loss.sum()
        gradient = flat_gradient(loss, [p for p in network.parameters() if p.requires_grad])
        found = torch.tensor([float(one.bin), float((gradient.double() ** 2).sum())], dtype=torch.float64)
    found = summed(accelerator, found)
    return found[:1].long(), found[1:]
