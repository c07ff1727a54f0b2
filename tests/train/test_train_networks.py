"""Networks that are trained know the time, whatever their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowvar.process import Independent
from lowvar.train import NetworkConfig, build_network


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("width", [8, 16])
def test_every_block_answers_to_the_time(width: int, levels: int) -> None:
    """A group norm over one channel would remove the embedding, which a convolution adds to all pixels alike."""
    network = build_network((1, 8, 8), NetworkConfig(width=width, levels=levels), seed=3).double()
    x = Independent(0).normal(range(4), (1, 8, 8), dtype=torch.float64)
    found: list[torch.Tensor] = []
    first: Any = network.get_submodule("down_blocks.0.resnets.0")
    handle = first.register_forward_hook(lambda module, inputs, out: found.append(out))
    with torch.no_grad():
        outs = [network(x, torch.full((4,), t)).sample for t in (10.0, 900.0)]
    handle.remove()
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    assert float((outs[0] - outs[1]).abs().max()) > 1e-4
