r"""Low-rank adapters by peft: W + (alpha / r) B A in place of W, only A (r, in) and B (out, r) are tuned.

B begins at 0, so the policy begins as the model was. At the end the products are added to the weights and the adapters
go: what is saved is a network like the one before, and loads wherever that does.

Source: E. Hu et al., "LoRA: low-rank adaptation of large language models", 2022.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowvar.errors import UserError
from lowvar.process.noise import Independent

__all__ = ["add_lora", "lora_targets"]

_NAME = "lowvar"


def lora_targets(network: nn.Module, rank: int) -> list[str]:
    """Names of the linear layers and ungrouped convolutions that an adapter of this rank makes smaller.

    Example:
        >>> lora_targets(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1)), 4)
        ['0']
    """
    found = []
    for name, module in network.named_modules():
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        if isinstance(module, nn.Linear | nn.Conv2d) and not grouped and min(module.weight.shape[:2]) > rank:
            found.append(name)
    return found


def add_lora(network: Any, rank: int, *, seed: int = 0) -> tuple[list[nn.Parameter], Callable[[], None]]:
    """Adapters in a network, whose own weights are frozen.

    Args:
        network: a torch module; changed in place.
        rank: r, at least 1.
        seed: of A.

    Returns:
        The adapters' parameters, and a function that merges them into the weights and takes the adapters out.

    Raises:
        UserError: if peft is not installed, or no layer is large enough.
    """
    try:
        peft = importlib.import_module("peft")
        LoraLayer = importlib.import_module("peft.tuners.lora").LoraLayer
    except ImportError:
        raise UserError(
            "low-rank adapters need peft, which is not installed; `pip install 'lowvar[lora]'`, or tune all weights"
        ) from None
    if rank < 1:
        raise UserError(f"the rank of LoRA is {rank}; give a whole number from 1")
    names = lora_targets(network, rank)
    if not names:
        raise UserError(f"no layer of the network is larger than rank {rank}; give a smaller one")
    network.requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, network, adapter_name=_NAME)
    parameters = [p for name, p in network.named_parameters() if "lora_" in name]
    source = Independent(seed)
    with torch.no_grad():
        for i, p in enumerate([p for name, p in network.named_parameters() if "lora_A" in name]):
            w = source.normal([i], p.shape, dtype=p.dtype)[0]
            p.copy_(w.to(p.device) / math.sqrt(p[0].numel()))
    for p in parameters:
        p.requires_grad_(True)

    def merge() -> None:
        for name, module in list(network.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge()
                above, _, leaf = name.rpartition(".")
                setattr(network.get_submodule(above), leaf, module.get_base_layer())
        if hasattr(network, "peft_config"):
            del network.peft_config

    return parameters, merge
