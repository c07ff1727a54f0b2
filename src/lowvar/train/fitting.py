"""A training run from beginning to end, with a progress bar: `fit`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lowvar.process.schedule import Schedule
from lowvar.train.cautions import cautions
from lowvar.train.config import TrainConfig
from lowvar.train.loop import Trainer, TrainingData
from lowvar.train.records import Update, Validation

__all__ = ["Fitted", "fit"]


@dataclass(frozen=True)
class Fitted:
    """A finished run.

    Attributes:
        network: with the averaged weights, on the CPU.
        schedule: its noise schedule.
        config: its settings.
        last: the final validation.
        sigma_data: of process edm: standard deviation of the data that the network was trained for.
    """

    network: nn.Module
    schedule: Schedule
    config: TrainConfig
    last: Validation
    sigma_data: float = 0.5


def fit(
    data: TrainingData,
    config: TrainConfig,
    folder: Path | str | None = None,
    *,
    network: nn.Module | None = None,
    resume: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: bool = True,
) -> Fitted:
    """Trains to the end, with a progress bar and warnings on stderr.

    Args:
        data, config, folder, network, resume, device: as for `Trainer`.
        progress: whether to show them.

    Raises:
        UserError: as `Trainer` and its `run` do.
    """
    from tqdm import tqdm

    trainer = Trainer(data, config, folder, network=network, resume=resume, device=device)
    quiet = not (progress and trainer.accelerator.is_main_process)
    last: Validation | None = None
    warned = quiet
    with tqdm(
        total=config.updates, initial=trainer.update, unit="update", desc="train", file=sys.stderr, disable=quiet
    ) as bar:
        for sentence in [] if quiet else cautions(config):
            bar.write(f"warning: {sentence}", file=sys.stderr)
        for record in trainer.run():
            if isinstance(record, Update):
                bar.update()
            elif isinstance(record, Validation):
                last = record
                if not warned and record.target is not None and record.target.warning is not None:
                    bar.write(f"warning: {record.target.warning}", file=sys.stderr)
                    warned = True
                bar.set_postfix(validation=f"{record.validation.loss:.4f}", speed=f"{record.images_per_second:,.0f}/s")
    last = trainer.validate() if last is None else last
    return Fitted(trainer.ema_network(), trainer.schedule, config, last, trainer.sigma_data)
