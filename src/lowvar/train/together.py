"""What the processes of a run say to each other, and the handle by which they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lowvar.errors import UserError

__all__ = ["gathered", "make_accelerator", "of_the_main_process", "summed", "written"]


def make_accelerator(mixed_precision: str, **settings: Any) -> Any:
    """Accelerate's handle of this process, an `Accelerator`.

    Raises:
        UserError: if the process has one of another precision: accelerate keeps one.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    begun = AcceleratorState().mixed_precision if is_initialized() else mixed_precision
    if begun != mixed_precision:
        raise UserError(
            f"mixed_precision is {mixed_precision}, and a run of this process began with {begun}; accelerate keeps one "
            "precision a process: begin another process (in a notebook: restart the kernel)"
        )
    return Accelerator(mixed_precision=mixed_precision, **settings)


def summed(accelerator: Any, values: Tensor) -> Tensor:
    """The sum over processes, on the CPU."""
    if accelerator.num_processes == 1:
        return values.cpu()
    return accelerator.reduce(values.to(accelerator.device), "sum").cpu()


def gathered(accelerator: Any, bins: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Bins and losses of all processes, in the order of the sample numbers."""
    if accelerator.num_processes == 1:
        return bins, losses
    return accelerator.gather(bins.to(accelerator.device)), accelerator.gather(losses.detach())


def of_the_main_process(accelerator: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The main process's values of tensors that all processes have, on the CPU."""
    from accelerate.utils import broadcast

    return {k: cast("Tensor", broadcast(v.to(accelerator.device))).cpu() for k, v in tensors.items()}


def written(accelerator: Any, action: Callable[[], object], path: Path) -> None:
    """Lets the main process write; the others wait, and stop where it failed.

    Raises:
        UserError: what the action raised, in the main process; in the others that it could not write `path`.
    """
    failure: UserError | None = None
    if accelerator.is_main_process:
        try:
            action()
        except UserError as error:
            failure = error
    if accelerator.num_processes > 1:
        failed = bool(summed(accelerator, torch.tensor(float(failure is not None))))
        failure = failure or (UserError(f"the main process could not write {path}") if failed else None)
    if failure is not None:
        raise failure
