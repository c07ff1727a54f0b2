"""What a training run has to remember, as JSON and tensors: nothing that needs unpickling.

Weights by their names; the average by the parameters' order; the optimiser's moments as `parameter.name`; scheduler,
average and gradient scaler keep a few numbers each. `restore(parts, *capture(parts))` changes nothing, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Parts", "capture", "moments_of", "restore", "restore_moments"]


@dataclass(frozen=True)
class Parts:
    """The stateful objects of a run.

    Attributes:
        network: the network being trained, unwrapped.
        optimizer: torch optimiser, or accelerate's wrapper of one.
        scheduler: a LambdaLR.
        ema: diffusers' EMAModel.
        scaler: gradient scaler, or None.
    """

    network: nn.Module
    optimizer: Any
    scheduler: Any
    ema: Any
    scaler: Any = None


def moments_of(optimizer: Any) -> dict[str, Tensor]:
    """An optimiser's moments by `parameter.name`."""
    kept = optimizer.state_dict()["state"]
    return {f"{i:05d}.{k}": torch.as_tensor(v) for i, row in kept.items() for k, v in row.items()}


def restore_moments(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `moments_of` gave."""
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        moments.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def capture(parts: Parts) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """JSON-ready values, and tensors by file and key."""
    ema = parts.ema.state_dict()
    shadow = ema.pop("shadow_params")
    state = {
        "scheduler": {k: v for k, v in parts.scheduler.state_dict().items() if k != "lr_lambdas"},
        "ema": ema,
        "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
    }
    tensors = {
        "network": dict(parts.network.state_dict()),
        "ema": {f"{i:05d}": p for i, p in enumerate(shadow)},
        "optimizer": moments_of(parts.optimizer),
    }
    return state, tensors


def restore(
    parts: Parts,
    state: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    device: torch.device | str = "cpu",
) -> None:
    """Puts captured state back."""
    parts.network.load_state_dict(dict(tensors["network"]))
    shadow = [tensors["ema"][k].to(device) for k in sorted(tensors["ema"])]
    parts.ema.load_state_dict({**state["ema"], "shadow_params": shadow})
    restore_moments(parts.optimizer, tensors["optimizer"])
    parts.scheduler.load_state_dict({**parts.scheduler.state_dict(), **state["scheduler"]})
    for group, lr in zip(parts.optimizer.param_groups, parts.scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    if state["scaler"] is not None and parts.scaler is not None:
        parts.scaler.load_state_dict(state["scaler"])
