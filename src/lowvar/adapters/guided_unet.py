r"""The U-Net of guided-diffusion and improved-diffusion as diffusers' `UNet2DModel`.

Both are one network (Dhariwal & Nichol 2021) under two names for its parameters. The original numbers its blocks in the
order in which they run, diffusers names them by level, block and kind:

    input_blocks.0.0                           conv_in
    input_blocks.n.0 / .1                      down_blocks.i.resnets.j / .attentions.j     n = 1 + i (R + 1) + j
    input_blocks.n.0, after R blocks           down_blocks.i.downsamplers.0
    middle_block.0 / 1 / 2                     mid_block.resnets.0 / attentions.0 / resnets.1
    output_blocks.n.0 / .1 / last              up_blocks.k.resnets.j / attentions.j / upsamplers.0   n = k (R + 1) + j
    time_embed.0 / 2, label_emb, out.0 / 2     time_embedding.linear_1 / 2, class_embedding, conv_norm_out, conv_out

The attention's one convolution makes 3 C channels for H heads of width w, in the order (q k v)(head)(w) with
`use_new_attention_order` and (head)(q k v)(w) without; diffusers has a matrix each for q, k and v, in the order
(head)(w).

`UNet2DModel` has one head width for all levels and takes its sinusoidal embedding as wide as its first level. What does
not fit in that is refused in one sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lowvar.adapters.guided_flags import GuidedFlags
from lowvar.errors import UserError

if TYPE_CHECKING:
    from diffusers import UNet2DModel

__all__ = ["unet_from_guided"]

Kind = Literal["plain", "resnet", "attention"]
_GROUPS = 32
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

_ENDS: tuple[tuple[str, str, Kind], ...] = (
    ("time_embed.0", "time_embedding.linear_1", "plain"),
    ("time_embed.2", "time_embedding.linear_2", "plain"),
    ("input_blocks.0.0", "conv_in", "plain"),
    ("middle_block.0", "mid_block.resnets.0", "resnet"),
    ("middle_block.1", "mid_block.attentions.0", "attention"),
    ("middle_block.2", "mid_block.resnets.1", "resnet"),
    ("out.0", "conv_norm_out", "plain"),
    ("out.2", "conv_out", "plain"),
)


def unet_from_guided(state: Mapping[str, Tensor], flags: GuidedFlags) -> UNet2DModel:
    """The network of a checkpoint, float32, in evaluation mode.

    Args:
        state: the checkpoint's tensors by their original names.
        flags: what it was trained with.

    Raises:
        UserError: if the flags make a network that `UNet2DModel` cannot hold, or other tensors than the checkpoint's.

    Example:
        >>> try:
        ...     unet_from_guided({}, GuidedFlags(image_size=32, num_channels=32))
        ... except ValueError as error:
        ...     print(str(error)[:68])
        the checkpoint does not fit the flags: 334 tensors are missing (such
    """
    from diffusers import UNet2DModel

    with torch.device("meta"):  # shapes only: every number comes from the checkpoint
        network = UNet2DModel(**_config(state, flags))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    wanted = dict(_sources(shapes, flags))
    _check(state, {source: shape for source, (shape, _) in wanted.items()})
    converted: dict[str, Tensor] = {}
    for source, (_, targets) in wanted.items():
        value = state[source].to(torch.float32)
        parts = _split(value, shapes[targets[0]][0], flags) if len(targets) == 3 else (value,)
        for target, part in zip(targets, parts, strict=True):
            converted[target] = part.reshape(shapes[target]).clone()
    network.load_state_dict(converted, strict=True, assign=True)
    return network.eval()


def _config(state: Mapping[str, Tensor], flags: GuidedFlags) -> dict[str, Any]:
    """The fields of `UNet2DModel`."""
    widths, attends = flags.widths, flags.attends
    if widths[0] != flags.num_channels:
        raise UserError(
            f"channel_mult starts with {widths[0] / flags.num_channels:g}: diffusers' UNet2DModel has a time embedding "
            "as wide as its first level, which cannot hold such a model; only a first multiplier of 1 is supported"
        )
    odd = [width for width in widths if width % _GROUPS]
    if odd:
        raise UserError(f"a level has {odd[0]} channels; the norms of these models need multiples of {_GROUPS}")
    first, labels = state.get("input_blocks.0.0.weight"), state.get("label_emb.weight")
    channels = first.shape[1] if first is not None and first.ndim == 4 else 3
    kind = "Resnet{}sampleBlock2D" if flags.resblock_updown else "{}Block2D"
    down = tuple("AttnDownBlock2D" if a else kind.format("Down") for a in attends)
    up = tuple("AttnUpBlock2D" if a else kind.format("Up") for a in reversed(attends))
    return {
        "sample_size": flags.image_size,
        "in_channels": channels,
        "out_channels": 2 * channels if flags.learn_sigma else channels,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": flags.num_res_blocks,
        "downsample_padding": 1,
        "downsample_type": "resnet" if flags.resblock_updown else "conv",
        "upsample_type": "resnet" if flags.resblock_updown else "conv",
        "dropout": flags.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_width(flags),
        "norm_num_groups": _GROUPS,
        "attn_norm_num_groups": _GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if flags.use_scale_shift_norm else "default",
        "num_class_embeds": (1000 if labels is None else labels.shape[0]) if flags.class_cond else None,
    }


def _head_width(flags: GuidedFlags) -> int | None:
    """`attention_head_dim`: the one width of a head that all attention has; None: one head each, as wide as its level.

    Raises:
        UserError: if there is no such width.
    """
    levels = {width for width, attends in zip(flags.widths, flags.attends, strict=True) if attends}
    levels.add(flags.widths[-1])  # the middle block
    if flags.num_head_channels != -1:
        odd = [width for width in levels if width % flags.num_head_channels]
        if odd:
            raise UserError(f"num_head_channels is {flags.num_head_channels}, which does not divide {odd[0]} channels")
        return flags.num_head_channels
    heads = flags.num_heads
    if any(flags.attends) and flags.num_heads_upsample not in (-1, heads):
        raise UserError(
            f"num_heads is {heads} and num_heads_upsample {flags.num_heads_upsample}: diffusers' UNet2DModel has one "
            "head width for both ways and cannot hold such a model"
        )
    if heads == 1:
        return None
    if len(levels) > 1:
        raise UserError(
            f"num_heads is {heads} at levels of {' and '.join(map(str, sorted(levels)))} channels: diffusers' "
            "UNet2DModel has one head width for all levels and cannot hold such a model; supported: num_heads=1, "
            "attention at levels of one width, or num_head_channels"
        )
    width = levels.pop()
    if width % heads:
        raise UserError(f"num_heads is {heads}, which does not divide {width} channels")
    return width // heads


def _modules(flags: GuidedFlags) -> Iterator[tuple[str, str, Kind]]:
    """Every part of the network: its original name, diffusers' name, its kind."""
    yield from _ENDS
    if flags.class_cond:
        yield "label_emb", "class_embedding", "plain"
    R, last = flags.num_res_blocks, len(flags.attends) - 1
    for i, attends in enumerate(flags.attends):
        for j in range(R):
            n = 1 + i * (R + 1) + j
            yield f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", "resnet"
            if attends:
                yield f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", "attention"
        if i < last:
            source, target = f"input_blocks.{(i + 1) * (R + 1)}.0", f"down_blocks.{i}.downsamplers.0"
            yield (source, target, "resnet") if flags.resblock_updown else (f"{source}.op", f"{target}.conv", "plain")
    for k, attends in enumerate(reversed(flags.attends)):
        for j in range(R + 1):
            n = k * (R + 1) + j
            yield f"output_blocks.{n}.0", f"up_blocks.{k}.resnets.{j}", "resnet"
            if attends:
                yield f"output_blocks.{n}.1", f"up_blocks.{k}.attentions.{j}", "attention"
        if k < last:
            source, target = f"output_blocks.{k * (R + 1) + R}.{1 + attends}", f"up_blocks.{k}.upsamplers.0"
            yield (source, target, "resnet") if flags.resblock_updown else (f"{source}.conv", f"{target}.conv", "plain")


def _sources(
    shapes: Mapping[str, tuple[int, ...]], flags: GuidedFlags
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    """Every tensor of the original: its name, its shape, and the names of diffusers' tensors that it holds."""
    for source, target, kind in _modules(flags):
        if kind == "attention":
            yield from _plain(f"{source}.norm", f"{target}.group_norm", shapes)
            for name in ("weight", "bias"):
                point = (1,) if name == "weight" else ()  # 1x1 convolutions, where diffusers has matrices
                parts = tuple(f"{target}.{part}.{name}" for part in ("to_q", "to_k", "to_v"))
                rows, *columns = shapes[parts[0]]
                yield f"{source}.qkv.{name}", ((3 * rows, *columns, *point), parts)
                out = f"{target}.to_out.0.{name}"
                yield f"{source}.proj_out.{name}", ((*shapes[out], *point), (out,))
        elif kind == "resnet":
            for old, new in _RESNET.items():
                yield from _plain(f"{source}.{old}", f"{target}.{new}", shapes)
        else:
            yield from _plain(source, target, shapes)


def _plain(
    source: str, target: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[str, ...]]]]:
    for name in ("weight", "bias"):
        key = f"{target}.{name}"
        if key in shapes:  # an embedding has no bias, a block of one width no shortcut
            yield f"{source}.{name}", (shapes[key], (key,))


def _split(qkv: Tensor, channels: int, flags: GuidedFlags) -> tuple[Tensor, ...]:
    """q, k and v, each (C, ...) in the order (head)(w), from (3 C, ...)."""
    if flags.use_new_attention_order:
        return qkv.chunk(3)
    width = flags.num_head_channels if flags.num_head_channels != -1 else channels // flags.num_heads
    heads = qkv.reshape(channels // width, 3, width, *qkv.shape[1:])
    return tuple(heads[:, i].flatten(0, 1) for i in range(3))


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError unless the checkpoint has the wanted tensors and no others."""
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    other = [name for name, shape in wanted.items() if name in state and tuple(state[name].shape) != shape]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing (such as {missing[0]})")
    if extra:
        faults.append(f"{len(extra)} have no place (such as {extra[0]})")
    if other:
        name = other[0]
        faults.append(
            f"{len(other)} have another shape (such as {name}, {tuple(state[name].shape)} where the flags make "
            f"{wanted[name]})"
        )
    if faults:
        raise UserError(
            f"the checkpoint does not fit the flags: {', '.join(faults)}; give the flags that it was trained with "
            "(classifiers and super-resolution models are not supported)"
        )
