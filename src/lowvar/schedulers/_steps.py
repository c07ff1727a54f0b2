"""A grid as diffusers' pipelines see it: timesteps, found again when a step names one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowvar.errors import UserError
from lowvar.process.schedule import Level, Schedule

__all__ = ["Steps"]


class Steps:
    """The timesteps of a grid's evaluations.

    Args:
        schedule: the schedule.
        evaluations: levels at which the network is asked, (N,); one may stand twice in a row (Heun).
        device: of the timesteps.

    Attributes:
        timesteps: (N,), int64 where all are whole numbers, else float32.
    """

    def __init__(self, schedule: Schedule, evaluations: Level, device: str | torch.device | None) -> None:
        values = schedule.timestep(evaluations.t)
        whole = values.round()
        exact = schedule.family != "ve" and bool(((values - whole).abs() < 1e-6).all())
        timesteps = whole.long() if exact else values.float()
        self._values: list[float] = [float(v) for v in timesteps.tolist()]
        self._number = {v: k for k, v in enumerate(self._values)}  # of two, the second: there a step begins
        self.timesteps = timesteps.to(device)

    def index(self, timestep: Any, expected: int = 0, trusted: bool = False) -> int:
        """The number of a timestep's evaluation; entries of `timesteps` on an accelerator are found without a transfer.

        Args:
            timestep: one timestep.
            expected: the number that would follow, which decides where a timestep stands twice.
            trusted: whether a timestep that cannot be read without a transfer is the expected one.

        Raises:
            UserError: if it is not one timestep of the grid.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise UserError(f"one timestep for the whole batch is needed here, got {timestep.numel()}")
            if timestep.device.type != "cpu":
                own = self.timesteps
                if _same_storage(timestep, own):
                    return int(timestep.storage_offset() - own.storage_offset())  # an entry is a view of the whole
                if trusted and expected < len(self._values):
                    return expected
            timestep = timestep.item()
        value = float(timestep)
        if expected < len(self._values) and self._values[expected] == value:
            return expected
        k = self._number.get(value)
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
