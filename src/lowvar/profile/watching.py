r"""Shares of the variance while a run goes on, at a price that is bounded.

    for record in watched(trainer, every=500):
        ...

yields the trainer's records, and now and then a `SharesRecord`: the decomposition of a sample's gradient at the weights
of the moment (`lowvar.profile.crossed`), logged to the run's trackers. Nothing of the run changes: draws of the blocks
have a source of their own, and gradients of parameters are left alone.

Price. Let T be the seconds of training so far, S those spent on blocks, c the time of the last block. A block is made
only while S + c <= p T, p the stated share (2%), so that what is spent exceeds p T by at most the excess of one block
over the one before it, and of the first block over its estimate: an update of B samples has B gradients, so a block's 8
take about 8 / B of it, but at least an update. Blocks are spread over updates, so none makes a long pause; after every
`every` updates those since the last record are summed up, if they are 16 or more, else they wait for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowvar.metrics.intervals import MIN_BLOCKS
from lowvar.process.noise import Independent
from lowvar.profile.crossed import Crossed, Decomposition
from lowvar.profile.gradient import CrossedDraws, crossed_blocks
from lowvar.profile.training import inner_products
from lowvar.train import FixedTimes, Trainer, Update
from lowvar.train.processes import objective_times
from lowvar.train.records import Record
from lowvar.train.validation import logsnr_edges

__all__ = ["SharesRecord", "watched"]

_BLOCKS = 2**41  # the blocks' own numbers


@dataclass(frozen=True)
class SharesRecord:
    """Shares of the variance around an update.

    Attributes:
        update: updates done.
        sources: the decomposition, over blocks made since the last record.
        seconds: spent on blocks so far.
        share: of the run's time so far.
    """

    update: int
    sources: Decomposition
    seconds: float
    share: float

    def scalars(self) -> Mapping[str, float]:
        """What a tracker logs."""
        found = {f"variance share/{u}": i.value for u, i in self.sources.shares.items()}
        scale = self.sources.noise_scale
        found |= {"variance share/blocks": float(self.sources.blocks), "variance share/part of the run": self.share}
        return found | ({"variance share/noise scale": scale.value} if scale.value < float("inf") else {})


def watched(
    trainer: Trainer,
    every: int = 500,
    *,
    most: float = 0.02,
    memory: float = 4e9,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Record | SharesRecord]:
    """A trainer's records with shares of the variance between them.

    Args:
        trainer: a run on a data set with a length, whose trackers, if any, log the shares.
        every: updates between records.
        most: p, share of the run's time that blocks may take.
        memory: bytes that gradients of a block may take; random directions stand for them beyond.
        clock: seconds.

    Raises:
        ValueError: if `every` or `most` is out of range.

    Example:
        >>> from lowvar.data import load
        >>> from lowvar.train import TrainConfig
        >>> config = TrainConfig(updates=2, batch_size=4, network={"width": 8}, warmup=0, head="none")
        >>> trainer = Trainer(load("digits"), config, device="cpu")
        >>> [type(record).__name__ for record in watched(trainer, every=1, most=0.5)]
        ['Update', 'Update', 'Validation']
    """
    if every < 1 or not 0 < most < 1:
        raise ValueError(f"every is {every} and most {most:g}; give at least 1 update, and a share between 0 and 1")
    blocks: Iterator[Crossed] | None = None
    found: list[Crossed] = []
    bins, begun, spent, last = 0, clock(), 0.0, None
    before, updates = begun, 0
    for record in trainer.run():
        yield record
        if not isinstance(record, Update):
            continue
        updates += 1
        now = clock()
        training = now - begun - spent
        one = training / updates if last is None else last
        if spent + one <= most * training:
            if blocks is None:
                blocks, bins = _blocks(trainer, memory)
            before = clock()
            found.append(next(blocks))
            last = clock() - before
            spent += last
        if updates % every == 0 and len(found) >= MIN_BLOCKS:
            sources = Crossed.joined(found).decomposition(bins)
            found = []
            made = SharesRecord(record.update, sources, spent, spent / max(clock() - begun, 1e-12))
            trainer.accelerator.log(dict(made.scalars()), step=record.update)
            yield made


def _blocks(trainer: Trainer, memory: float) -> tuple[Iterator[Crossed], int]:
    """The run's crossed blocks, at the weights that it has when they are asked for; number of bins."""
    config = trainer.config
    denoiser = trainer.denoiser
    network: Any = denoiser.network
    images: Any = trainer.plan.images
    times: FixedTimes = objective_times(config, trainer.schedule)
    edges = logsnr_edges(trainer.schedule, max(trainer.schedule.t_min, 1e-5))
    labels = None if trainer.classes is None else torch.as_tensor(trainer.classes.train)
    stream = crossed_blocks(
        denoiser,
        trainer.objective,
        CrossedDraws(images, times, Independent(config.seed + _BLOCKS)),
        inner_products(network, memory, config.seed),
        edges,
        begin=trainer.update,
        labels=labels,
        device=trainer.accelerator.device,
    )
    return stream, len(edges) - 1
