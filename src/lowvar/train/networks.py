r"""Networks for training from scratch, sized by a few numbers: diffusers' UNet2DModel for images, an MLP for rows.

Resolutions H, H/2, .., H / 2^(levels - 1) with widths w, 2 w, 4 w, ..; attention, where asked for, at the lowest. A
variance head adds output channels (see `lowvar.process.head`). Of a basis or low-rank head those that hold log
variances begin at 0, where their parametrisation begins right; the directions of a low rank begin random, because the
likelihood's gradient in U is 0 at U = 0. A group of the group norms has at least two channels: the norm of a single one
would take away the time's embedding, which is constant over the image. The size must be divisible by 2^(levels - 1), so
that what is halved can be doubled back.

Rows of a table (d,) go through a `lowvar.models.ResidualMLP` of 8 w hidden units and levels (layers + 1) blocks.

Initial weights are a function of `seed` alone: torch's global generator is left as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from lowvar.errors import UserError
from lowvar.process.head import Head, head_channels

if TYPE_CHECKING:
    from diffusers import UNet2DModel

    from lowvar.models import ResidualMLP

__all__ = ["NetworkConfig", "build_network", "count_parameters"]

_GROUPS = 8


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class NetworkConfig:
    """The network: its size, or where it comes from.

    Attributes:
        width: channels at full resolution, a multiple of 8.
        levels: number of resolutions.
        layers: residual blocks a resolution.
        attention: attention at the lowest resolution of the way down and up (the middle block always has it).
        dropout: share of activations dropped in training.
        source: an own network instead of one of these sizes (`lowvar.train.own_networks`): a folder that holds a
            UNet2DModel, DiTTransformer2DModel or `lowvar.models.ResidualMLP`, or `module:function`.
        weights: of a folder: `fresh` (random) or `kept`, what training begins with.
    """

    width: Annotated[int, Field(ge=8, multiple_of=8)] = 32
    levels: Annotated[int, Field(ge=1, le=6)] = 2
    layers: Annotated[int, Field(ge=1, le=6)] = 1
    attention: bool = field(default=False)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    source: str | None = None
    weights: Literal["fresh", "kept"] = "fresh"

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        """Refuses sizes beside a source, and weights without."""
        sizes = [f for f in fields(self) if f.name not in ("source", "weights")]
        given = [f.name for f in sizes if getattr(self, f.name) != f.default]
        if self.source is not None and given:
            raise ValueError(
                f"network.{given[0]} is {getattr(self, given[0])} and network.source {self.source}, which has sizes of "
                f"its own; leave {given[0]} out"
            )
        if self.source is None and self.weights != "fresh":
            raise ValueError(f"network.weights is {self.weights}, and there is no network.source that holds weights")
        return self


def build_network(
    shape: Sequence[int],
    config: NetworkConfig | None = None,
    head: Head | None = None,
    seed: int = 0,
    rank: int = 0,
    classes: int | None = None,
) -> UNet2DModel | ResidualMLP:
    """A U-Net for images of a shape, a residual MLP for rows.

    Args:
        shape: (C, H, W) of the data, (d,) of a table.
        config: its size (default `NetworkConfig()`).
        head: variance head, if any: the output then has its channels as well.
        seed: of the initial weights.
        rank: r of head `lowrank`.
        classes: number of classes it is conditioned on, the null class not counted; None: none.

    Raises:
        UserError: if the size does not go through the network's levels, or attention is asked for on rows.
        ValueError: if the rank is out of range.

    Example:
        >>> network = build_network((1, 8, 8), NetworkConfig(width=8), head="range")
        >>> network.config["out_channels"], count_parameters(network) < 100_000
        (2, True)
    """
    config = NetworkConfig() if config is None else config
    outputs = head_channels(head, shape[0], rank)
    embedded = None if classes is None else classes + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, last = (_mlp if len(shape) == 1 else _unet)(shape, config, outputs, embedded)
    if head in ("basis", "lowrank"):
        with torch.no_grad():
            for parameter in last.parameters():
                parameter[shape[0] : 2 * shape[0]] = 0
    return network


def _mlp(
    shape: Sequence[int], config: NetworkConfig, outputs: int, classes: int | None
) -> tuple[ResidualMLP, torch.nn.Module]:
    """The network for rows and its last layer."""
    from lowvar.models import ResidualMLP

    if config.attention:
        raise UserError("network.attention is true, and the data are rows of a table, which have none; leave it out")
    blocks = config.levels * (config.layers + 1)
    network = ResidualMLP(shape[0], outputs, 8 * config.width, blocks, config.dropout, classes)
    return network, network.out


def _unet(
    shape: Sequence[int], config: NetworkConfig, outputs: int, classes: int | None
) -> tuple[UNet2DModel, torch.nn.Module]:
    """The network for images and its last layer."""
    from diffusers import UNet2DModel

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
    network = UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=outputs,
        block_out_channels=widths,
        layers_per_block=config.layers,
        down_block_types=tuple(
            "AttnDownBlock2D" if config.attention and k == lowest else "DownBlock2D" for k in range(config.levels)
        ),
        up_block_types=tuple(
            "AttnUpBlock2D" if config.attention and k == 0 else "UpBlock2D" for k in range(config.levels)
        ),
        norm_num_groups=min(_GROUPS, config.width // 2),
        attention_head_dim=min(16, config.width),
        dropout=config.dropout,
        num_class_embeds=classes,
    )
    last: Any = network.conv_out
    return network, last


def count_parameters(network: torch.nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
