"""A grid as diffusers' pipelines see it: timesteps, found again when a step names one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.schedule import Schedule

__all__ = ["Steps"]


class Steps:
    """The levels of a grid and the timesteps of its evaluations.

    Args:
        schedule: the schedule.
        times: decreasing, the last 0, (K + 1,).
        device: of the timesteps.

    Attributes:
        levels: (K + 1,) levels.
        timesteps: (K,), int64 where all are whole numbers, else float32.
        without_signal: whether alpha is 0 at an evaluation.
    """

    def __init__(self, schedule: Schedule, times: Tensor, device: str | torch.device | None) -> None:
        self.levels = schedule.at(times)
        self.without_signal: list[bool] = (self.levels.alpha == 0).tolist()
        values = schedule.timestep(times[:-1])
        whole = values.round()
        exact = bool(((values - whole).abs() < 1e-6).all())
        self.timesteps = (whole.long() if exact else values.float()).to(device)
        self._number = {float(v): k for k, v in enumerate(self.timesteps.tolist())}

    def index(self, timestep: Any) -> int:
        """The number of a timestep's step; entries of `timesteps` on an accelerator are found without a transfer.

        Raises:
            UserError: if it is not one timestep of the grid.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise UserError(f"step takes one timestep for the whole batch, got {timestep.numel()}")
            own = self.timesteps
            if own.device.type != "cpu" and _same_storage(timestep, own):
                return int(timestep.storage_offset() - own.storage_offset())  # an entry is a view of the whole
            timestep = timestep.item()
        k = self._number.get(float(timestep))
        if k is None:
            first = ", ".join(f"{v:g}" for v in list(self._number)[:3])
            raise UserError(
                f"timestep {timestep} is not among the {len(self._number)} that set_timesteps chose ({first}, ..): "
                "step through scheduler.timesteps"
            )
        return k


def _same_storage(a: Tensor, b: Tensor) -> bool:
    same = a.device == b.device and a.dtype == b.dtype
    return same and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
