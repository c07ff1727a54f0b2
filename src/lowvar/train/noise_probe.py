r"""Measuring the noise scale in a run: which draws are independent, and what their gradients say.

`noise_scale` wants k independent blocks of n draws each (k n = B, the batch). Draws are independent across groups of a
draw plan, so a block is a number of whole groups:

    one process         k = the smallest divisor >= 2 of the number of groups: two halves where it is even
    P processes         k = P, every process's share
    one group           times, classes or noises spread over the whole batch, or one reference set for all of it: then
                        a block is a batch, that of this update and that of the next one, *at the same weights*; n = B

The gradients are taken beside the update, at the weights as they are before it, so a run that measures makes the same
updates as one that does not. A measurement costs one evaluation and gradient of the batch, or two where the batch is
one group; every N-th update that is 1/N, or 2/N, of the run. Processes add up ||g_a||^2 and sum_a g_a: one vector as
long as the weights is exchanged, or two.

With no second group and one process alone (a batch of one sample) the batch of the next update serves as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowvar.train.accumulation import pieces_of
from lowvar.train.batch_loss import BatchLoss, weighted_mean
from lowvar.train.draws import Draws, rows_of
from lowvar.train.noise_scale import NoiseScale, moments_of_sums
from lowvar.train.together import summed

__all__ = ["Blocks", "flat_gradient", "measured", "moments"]


@dataclass(frozen=True)
class Blocks:
    """How the draws of a measurement are cut.

    Attributes:
        count: k, over all processes.
        samples: n of each.
        own: blocks of one process.
        whole: whether every block is a batch, of successive updates, that all processes share.

    Example:
        >>> Blocks.of(batch_size=64, group=2, processes=1)
        Blocks(count=2, samples=32, own=2, whole=False)
        >>> Blocks.of(batch_size=64, group=64, processes=4)
        Blocks(count=2, samples=64, own=2, whole=True)
    """

    count: int
    samples: int
    own: int
    whole: bool

    @classmethod
    def of(cls, batch_size: int, group: int, processes: int) -> Blocks:
        """For groups of `group` consecutive samples; `batch_size` over all processes."""
        groups = batch_size // group
        if groups < 2 or (batch_size // processes) % group:
            return cls(2, batch_size, 2, whole=True)
        k = processes if processes > 1 else next(k for k in range(2, groups + 1) if groups % k == 0)
        return cls(k, batch_size // k, k // processes, whole=False)

    def rows(self, count: int) -> list[slice]:
        """The rows of a process's `count` draws in each of its blocks, where the batch is cut."""
        n = count // self.own
        return [slice(i * n, (i + 1) * n) for i in range(self.own)]


def flat_gradient(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient as one vector, float32 or wider; 0 where the loss does not depend on a weight."""
    found = torch.autograd.grad(loss, list(weights), allow_unused=True)
    rows = [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]
    return torch.cat([r.flatten().to(torch.promote_types(r.dtype, torch.float32)) for r in rows])


def moments(
    gradients: Iterable[Tensor], blocks: Blocks, summed: Callable[[Tensor], Tensor], processes: int = 1
) -> tuple[float, float]:
    """Unbiased (||mu||^2, V) from this process's gradients.

    Args:
        gradients: a process's mean gradient of each of its blocks, or of its share of every block that is a batch.
        blocks: the cut.
        summed: the sum of a tensor over the processes.
        processes: their number.

    Example:
        >>> cut = Blocks.of(batch_size=8, group=1, processes=1)
        >>> moments([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], cut, lambda x: x)
        (3.0, 16.0)
    """
    each, total = 0.0, None
    for g in gradients:
        g = (summed(g) / processes if blocks.whole else g).double()
        each += float((g**2).sum())
        total = g if total is None else total + g
    if total is None:
        raise ValueError("there is no gradient; a measurement needs those of its blocks")
    if not blocks.whole:
        each, total = float(summed(torch.tensor(each, dtype=torch.float64))), summed(total)
    return moments_of_sums(each, float((total**2).sum()), blocks.count, blocks.samples)


def measured(
    scale: NoiseScale,
    blocks: Blocks,
    batch: BatchLoss,
    accelerator: Any,
    network: nn.Module,
    update: int,
    draws: Draws,
    after: Callable[[], Draws],
    accumulation: int = 1,
) -> NoiseScale:
    """The noise scale with one more measurement, at the weights as they are.

    Args:
        scale: so far.
        blocks: the cut.
        batch: the loss.
        accelerator: of the run.
        network: without the hooks that would average gradients.
        update: its number.
        draws: this process's share of it.
        after: its share of the next update, asked for where a block is a batch.
        accumulation: pieces in which the share is computed; a block's are no larger.
    """
    if blocks.whole:
        pieces = [(update, draws), (update + 1, after())]
    else:
        pieces = [(update, rows_of(draws, rows)) for rows in blocks.rows(len(draws.number))]
    weights = [p for p in network.parameters() if p.requires_grad]
    scaled = (
        1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())
    )  # fp16: small ones would vanish

    def gradients() -> Iterator[Tensor]:
        for i, (number, own) in enumerate(pieces):
            seed = -2 - accelerator.process_index * len(pieces) - i
            share, total = len(own.number), None
            for rows in pieces_of(share, len(draws.number) // accumulation):
                some = rows_of(own, rows)
                with accelerator.autocast():
                    loss = weighted_mean(some, batch.losses(network, update, some, batch.target(number, some), seed))
                gradient = flat_gradient(scaled * loss * (len(some.number) / share), weights) / scaled
                total = gradient if total is None else total + gradient
            assert total is not None
            yield total

    return scale.counted(*moments(gradients(), blocks, lambda x: summed(accelerator, x), accelerator.num_processes))
