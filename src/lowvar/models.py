r"""A network for vectors: residual blocks whose norms are modulated by the noise level.

    h_0 = W x,    h_{k+1} = h_k + B_k silu(A_k ((1 + scale_k) LN(h_k) + shift_k)),    out = V silu(LN(h_K)),

    (scale_k, shift_k) = M_k silu(e),    e = MLP(cos, sin of timestep frequencies) + class embedding.

B_k and M_k begin at 0, so that the blocks begin as the identity (adaLN-Zero of Peebles & Xie 2023; residual MLPs for
tables: Gorishniy et al. 2021). It is a model of diffusers: registers its config, saves safetensors, and is called as
UNet2DModel is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers asks this module for the name ModelMixin when it looks for the way to load the class below.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ResidualMLP", "ResidualMLPOutput", "null_class"]

_FREQUENCIES = 64


def null_class(network: Any) -> int | None:
    """The number K of a network's null class, its last; None for a network without classes.

    A UNet2DModel or `ResidualMLP` counts it in `num_class_embeds`; a DiT has it beside its `num_embeds_ada_norm`.

    Example:
        >>> null_class(ResidualMLP(3, width=8, blocks=1, num_class_embeds=5)), null_class(ResidualMLP(3))
        (4, None)
    """
    config: Any = getattr(network, "config", None)
    if not hasattr(config, "get"):
        return None
    number, beside = config.get("num_class_embeds"), config.get("num_embeds_ada_norm")
    if number is None and config.get("norm_type") == "ada_norm_zero":
        return None if beside is None else int(beside)
    return None if number is None else int(number) - 1


@dataclass
class ResidualMLPOutput(BaseOutput):
    """What the network returns.

    Attributes:
        sample: (B, out_channels).
    """

    sample: Tensor


class _Block(nn.Module):
    """One residual block."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.modulation, self.second):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulation(e).chunk(2, 1)
        return h + self.second(self.dropout(F.silu(self.first(self.norm(h) * (1 + scale) + shift))))


class ResidualMLP(ModelMixin, ConfigMixin):
    """A residual network (B, in_channels), timestep -> (B, out_channels).

    Args:
        in_channels: numbers a row.
        out_channels: numbers it returns: as many, or more with a variance head; None: as many.
        width: of the hidden layers.
        blocks: residual blocks.
        dropout: share of hidden activations dropped in training.
        num_class_embeds: classes it is conditioned on, a null class included; None: none.

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> network = ResidualMLP(3, width=16, blocks=2)
        >>> tuple(network(torch.zeros(5, 3), torch.tensor(7)).sample.shape)
        (5, 3)
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        width: int = 256,
        blocks: int = 4,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        if min(in_channels, out_channels, width, blocks) < 1:
            raise ValueError(
                f"in_channels, out_channels, width and blocks are {in_channels}, {out_channels}, {width} and {blocks}; "
                "give whole numbers from 1"
            )
        self.into = nn.Linear(in_channels, width)
        self.time = nn.Sequential(nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if num_class_embeds is None else nn.Embedding(num_class_embeds, width)
        self.body = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> ResidualMLPOutput | tuple[Tensor]:
        """The network's output.

        Args:
            sample: states (B, in_channels).
            timestep: of each, 0 to 1000, scalar or (B,).
            class_labels: class numbers (B,), where the network has classes.
            return_dict: whether to return an object with `sample` instead of a tuple.

        Raises:
            ValueError: if classes are missing, or given to a network without.
        """
        if (class_labels is None) != (self.classes is None):
            raise ValueError(
                "the network is conditioned on a class: give class_labels"
                if class_labels is None
                else "class_labels were given, and the network has no classes (num_class_embeds is None)"
            )
        t = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample)).float()
        k = torch.arange(_FREQUENCIES, device=sample.device, dtype=torch.float32)
        angle = t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * k / _FREQUENCIES)
        e = self.time(torch.cat([angle.cos(), angle.sin()], 1).to(self.out.weight.dtype))
        if self.classes is not None:
            e = e + self.classes(cast("Tensor", class_labels))
        e, h = F.silu(e), self.into(sample)
        for block in self.body:
            h = block(h, e)
        out: Any = self.out(F.silu(self.norm(h)))
        return ResidualMLPOutput(sample=out) if return_dict else (out,)
