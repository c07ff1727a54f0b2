"""The forward process at the timesteps of a network's training: what `add_noise` and the tables of diffusers read."""

from __future__ import annotations

import torch
from torch import Tensor

from lowvar.process.denoiser import expand
from lowvar.process.discrete import DiscreteVP
from lowvar.process.schedule import Level, Schedule

__all__ = ["Noising"]


class Noising:
    """Levels by timestep; the table of a discrete schedule moves to the device that asks.

    Args:
        schedule: the schedule.
        steps: T of a schedule without a table of its own.

    Attributes:
        T: number of training timesteps.
        times: 1 / T .. 1, (T,) float64.
        alphas_cumprod, betas: as diffusers' schedulers have them, (T,) float32.
    """

    def __init__(self, schedule: Schedule, steps: int) -> None:
        self._schedule = schedule
        bar = schedule.alphas_cumprod if isinstance(schedule, DiscreteVP) else None
        self.T = steps if bar is None else len(bar)
        self.times = torch.arange(1, self.T + 1, dtype=torch.float64) / self.T
        self._table = schedule.at(self.times)
        bar = torch.sigmoid(self._table.logsnr) if bar is None else bar
        self.alphas_cumprod = bar.float()
        self.betas = (1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])).float()

    def level(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps, in the dtype of `like` and shaped to multiply it."""
        if isinstance(self._schedule, DiscreteVP) and not timesteps.is_floating_point():
            if self._table.alpha.device != like.device:
                self._table = self._table.to(like.device)
            level: Level = self._table[timesteps.to(like.device).reshape(-1)]
        else:
            level = self._schedule.at(self._schedule.time_of(timesteps.reshape(-1)).clamp(0, 1)).to(like.device)
        return expand(level.alpha, like), expand(level.sigma, like)
