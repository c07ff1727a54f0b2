r"""Networks for training from scratch: diffusers' UNet2DModel, sized by a few numbers.

Resolutions H, H/2, .., H / 2^(levels - 1) with widths w, 2 w, 4 w, ..; attention, where asked for, at the lowest. A
variance head adds output channels (see `lowvar.process.head`). Of a basis or low-rank head those that hold log
variances begin at 0, where their parametrisation begins right; the directions of a low rank begin random, because the
likelihood's gradient in U is 0 at U = 0. The size must be divisible by 2^(levels - 1), so that what is halved can be
doubled back.

Initial weights are a function of `seed` alone: torch's global generator is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from lowvar.errors import UserError
from lowvar.process.head import Head, head_channels

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["NetworkConfig", "build_network", "count_parameters"]

_GROUPS = 8


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NetworkConfig:
    """Size of the network.

    Attributes:
        width: channels at full resolution, a multiple of 8.
        levels: number of resolutions.
        layers: residual blocks a resolution.
        attention: attention at the lowest resolution of the way down and up (the middle block always has it).
        dropout: share of activations dropped in training.
    """

    width: Annotated[int, Field(ge=8, multiple_of=8)] = 32
    levels: Annotated[int, Field(ge=1, le=6)] = 2
    layers: Annotated[int, Field(ge=1, le=6)] = 1
    attention: bool = field(default=False)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


def build_network(
    shape: Sequence[int],
    config: NetworkConfig | None = None,
    head: Head | None = None,
    seed: int = 0,
    rank: int = 0,
) -> UNet2DModel:
    """A U-Net for images of a shape.

    Args:
        shape: (C, H, W) of the data.
        config: its size (default `NetworkConfig()`).
        head: variance head, if any: the output then has its channels as well.
        seed: of the initial weights.
        rank: r of head `lowrank`.

    Raises:
        UserError: if the size does not go through the network's levels.
        ValueError: if the rank is out of range.

    Example:
        >>> network = build_network((1, 8, 8), NetworkConfig(width=8), head="range")
        >>> network.config["out_channels"], count_parameters(network) < 100_000
        (2, True)
    """
    from diffusers import UNet2DModel

    config = NetworkConfig() if config is None else config
    channels, height, width = shape
    step = 2 ** (config.levels - 1)
    if height % step or width % step:
        fitting = [n for n in range(1, config.levels) if not (height % 2 ** (n - 1) or width % 2 ** (n - 1))]
        raise UserError(
            f"images of {width}x{height} pixels do not fit a network of {config.levels} levels, which needs both sides "
            f"divisible by {step}; give levels {max(fitting)} or less, or scale the images to "
            f"{step * -(-width // step)}x{step * -(-height // step)}"
        )
    widths = tuple(config.width * 2**k for k in range(config.levels))
    lowest = config.levels - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=head_channels(head, channels, rank),
            block_out_channels=widths,
            layers_per_block=config.layers,
            down_block_types=tuple(
                "AttnDownBlock2D" if config.attention and k == lowest else "DownBlock2D" for k in range(config.levels)
            ),
            up_block_types=tuple(
                "AttnUpBlock2D" if config.attention and k == 0 else "UpBlock2D" for k in range(config.levels)
            ),
            norm_num_groups=_GROUPS,
            attention_head_dim=min(16, config.width),
            dropout=config.dropout,
        )
    if head in ("basis", "lowrank"):
        last: Any = network.conv_out
        with torch.no_grad():
            for parameter in last.parameters():
                parameter[channels : 2 * channels] = 0
    return network


def count_parameters(network: torch.nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
