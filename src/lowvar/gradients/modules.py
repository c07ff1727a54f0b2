"""Programs whose parameters are an `nn.Module`, as programs of a dict of tensors.

`torch.func` differentiates functions of tensors. A program of a module, `program(module, s)`, becomes one of its
parameters by name: the module is called with them put in its parameters' places (`torch.func.functional_call`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.func import functional_call
from torch.nn import Module

__all__ = ["by_tensors"]


class _Run(Module):
    """Calls the program on the module it holds."""

    def __init__(self, program: Callable[..., Any], module: Module) -> None:
        super().__init__()
        self.program, self.module = program, module

    def forward(self, *args: Any) -> Any:
        return self.program(self.module, *args)


def by_tensors(program: Callable[..., Any], theta: Any) -> tuple[Callable[..., Any], Any]:
    """The program as one of tensors, and these; both as they are unless theta is a module.

    Example:
        >>> import torch
        >>> def program(net, s):
        ...     return net(s)
        >>> of_dict, weights = by_tensors(program, torch.nn.Linear(2, 1))
        >>> sorted(weights), of_dict({k: torch.ones_like(v) for k, v in weights.items()}, torch.ones(2)).tolist()
        (['bias', 'weight'], [3.0])
    """
    if not isinstance(theta, Module):
        return program, theta
    run = _Run(program, theta)

    def of_dict(weights: Any, *args: Any) -> Any:
        return functional_call(run, {f"module.{name}": w for name, w in weights.items()}, args)

    return of_dict, {name: w.detach() for name, w in theta.named_parameters()}
